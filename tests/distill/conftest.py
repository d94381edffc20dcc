"""Hypothesis without deadlines: the first call of a torch kernel takes as long as it takes."""

from hypothesis import settings

settings.register_profile("distill", deadline=None, max_examples=60)
settings.load_profile("distill")
