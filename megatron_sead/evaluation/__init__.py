"""Evaluation: how often a model is right, on held-out prompts."""

from megatron_sead.evaluation.accuracy import Accuracy, EvaluationResult, evaluate

__all__ = ["Accuracy", "EvaluationResult", "evaluate"]
