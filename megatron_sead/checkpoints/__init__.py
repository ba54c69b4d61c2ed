"""Saving and resuming a run; a trained model as a Hugging Face directory."""
