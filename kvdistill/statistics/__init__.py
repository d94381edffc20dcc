"""How sure one can be that one arm is better than another.

Runs of two arms are paired twice: a seed fixes the initial student and the order of the data, and
every run is scored on the same held-out texts. The differences of a comparison are therefore a
matrix ``[S, N]`` of S seeds and N texts, and "is the difference real?" is three questions:

- over texts (``sign_flip`` on the mean over seeds): would these very students differ on other
  texts? Many texts, so small p-values can be reached; says nothing of another initialisation.
- over seeds (``sign_flip`` on the mean over texts): would other initialisations differ on these
  texts? Exact and free of assumptions, but S seeds cannot give less than ``2 / 2**S``.
- over both (``crossed_test``): other initialisations *and* other texts. The question that is
  usually meant; it assumes that seeds vary normally.
"""

from kvdistill.statistics.bootstrap import Interval, bootstrap, crossed_bootstrap
from kvdistill.statistics.crossed import CrossedTest, crossed_test
from kvdistill.statistics.effect import cohens_d, hedges_g
from kvdistill.statistics.permutation import holm, sign_flip, smallest_p

__all__ = [
    "CrossedTest",
    "Interval",
    "bootstrap",
    "cohens_d",
    "crossed_bootstrap",
    "crossed_test",
    "hedges_g",
    "holm",
    "sign_flip",
    "smallest_p",
]
