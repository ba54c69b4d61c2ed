"""Rollouts: an engine writes the student's responses and takes its new weights after every step."""
