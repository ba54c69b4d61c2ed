"""Directories and files that appear whole, last, and replace nothing of others. No torch here."""
