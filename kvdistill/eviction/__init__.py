"""Which teacher tokens are kept when a budget is smaller than the text.

Extraction uses it to write less, stage 2 to read everything and choose anew in every run.
"""

from kvdistill.eviction.rkv import DEFAULT_MIX, rkv_original_score, rkv_score
from kvdistill.eviction.select import DEFAULT_BUDGET, Eviction, evict, num_evicted

__all__ = [
    "DEFAULT_BUDGET",
    "DEFAULT_MIX",
    "Eviction",
    "evict",
    "num_evicted",
    "rkv_original_score",
    "rkv_score",
]
