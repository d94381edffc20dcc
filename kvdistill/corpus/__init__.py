"""Samples and their segments, readers of corpus files, and synthetic corpora."""
