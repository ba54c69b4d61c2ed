"""What a model's generation_config.json may say, and no rollout may follow."""

GENERATION = {
    "do_sample": False,
    "temperature": 0.1,
    "top_k": 5,
    "top_p": 0.3,
    "min_p": 0.2,
    "num_beams": 4,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "max_length": 20,
    "max_new_tokens": 3,
    "min_new_tokens": 15,
    "suppress_tokens": [5, 6, 7],
    "begin_suppress_tokens": [8, 9],
    "bad_words_ids": [[10]],
    "forced_eos_token_id": 3,
    "eos_token_id": [20, 21, 22],
    "stop_strings": ["a"],
    "cache_implementation": "static",
    "renormalize_logits": True,
    "use_cache": False,
}
