"""Grading: is this answer right? Competence, never the loss."""
