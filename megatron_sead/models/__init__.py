"""What a model is, in Megatron-Core. Hugging Face directories in and out."""
