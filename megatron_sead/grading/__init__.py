"""Grading: is this answer right? Competence, never the loss."""

from megatron_sead.grading.grader import GRADER_VERSION, Grader

__all__ = ["GRADER_VERSION", "Grader"]
