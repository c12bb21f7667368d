"""Pruning: which entries of a model are removed, when, and by whom."""
