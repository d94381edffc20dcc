"""Samples and their segments, the readers that make them, and corpora made by recipe."""
