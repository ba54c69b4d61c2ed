"""Ranks from start to end: torchrun around them, one owner of an output, one account of a failure."""
