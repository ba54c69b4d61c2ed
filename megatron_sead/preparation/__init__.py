"""A training set from a released one: without duplicates, unusable rows, long prompts and benchmark problems."""
