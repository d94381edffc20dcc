"""Losses against teachers that give way to the text as training goes on."""

from __future__ import annotations


def kv_scale(step: int, num_steps: int, fade_by: float | None) -> float:
    """How much of their weights the losses against teachers have at a step, 1 down to 0.

    Linear from 1 at step 0 to 0 at ``fade_by · num_steps``, as in teacher annealing (*BAM!
    Born-Again Multi-Task Networks for Natural Language Understanding*, arXiv 1907.04829, section
    3.2); always 1 where ``fade_by`` is None. A student first learns what the teacher sees in a
    text, and in the end only what the text says.
    """
    if fade_by is None:
        return 1.0
    return max(0.0, 1 - step / (fade_by * num_steps))
