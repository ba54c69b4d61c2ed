"""Scaling studies: training runs of many layouts on the same rollouts, and what they cost.

``study`` what is asked; ``rollouts`` the tokens that all runs see; ``rank`` one rank of a run, watched; ``records`` raw
records and the numbers in them; ``report`` and ``plots`` what a reader sees, from records alone.
"""
