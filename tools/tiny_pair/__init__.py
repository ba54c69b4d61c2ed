"""Parts of ``make_tiny_pair``: problems, tokenizer, models, supervised training, answers."""
