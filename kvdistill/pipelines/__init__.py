"""Whole jobs, from a config to files on disk."""
