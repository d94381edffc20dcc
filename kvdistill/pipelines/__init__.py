"""Whole jobs, from a config to files on disk: extraction, training, evaluation, reports."""
