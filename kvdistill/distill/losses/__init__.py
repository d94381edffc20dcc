"""Losses: per-token errors in float32, and how they are weighted and reduced."""
