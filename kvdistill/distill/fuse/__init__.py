"""Fusion: how much each teacher counts, and their weighted sum."""
