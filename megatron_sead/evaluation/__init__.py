"""Evaluation: how often a model is right, on held-out prompts."""
