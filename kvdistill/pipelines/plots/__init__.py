"""Figures of runs and of arms, each from plain data to a matplotlib figure, in one style."""
