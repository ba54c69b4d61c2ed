"""Prompts: sets of problems, the models' tokenizers, and packing of rollouts into micro-batches."""
