"""Ranks from start to end: torchrun around them, one owner of an output, one account of a failure."""

CONTINUES = "; the same command continues from the last checkpoint"  # what is said of a rank that was killed
