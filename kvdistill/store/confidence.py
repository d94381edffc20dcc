"""How well a teacher predicts text, in nats per character.

Characters, because teachers cut a text into different tokens. A token counts if it stands for text
and something predicts it: a text's first token only where a special one precedes it. Of a text with
a rationale that the teacher wrote itself, the corpus's part counts alone: everyone finds likely
what they sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import TokenTable
from kvdistill.types import SEGMENT_IDS


def likelihoods(
    tokens: TokenTable, nll: NDArray[np.float16], *, own_text: bool, span: slice = slice(None)
) -> NDArray[np.float64]:
    """Nats of the tokens in ``span``, and the characters they add: ``[2, T]``, 0 if not counted.

    Tokens of one character, as byte-level tokenizers make them, add it once.
    """
    start, end, segment = tokens.char_start[span], tokens.char_end[span], tokens.segment[span]
    before = np.where(np.roll(start, 1) <= start, np.roll(end, 1), 0)
    counted = np.isfinite(nll[span]) & (segment >= 0)
    if own_text:
        counted &= segment != SEGMENT_IDS["rationale"]
    added = np.maximum(end - np.maximum(start, before), 0)
    return np.where(counted, np.stack([nll[span].astype(np.float64), added]), 0.0)


def mean_likelihoods(
    shards: Iterable[tuple[Sequence[Sample], TokenTable, NDArray[np.float16]]], *, own_text: bool
) -> dict[str, float]:
    """Nats per character of ``all texts`` and by task, of samples with their tokens and ``nll``."""
    sums: dict[str, NDArray[np.float64]] = {"all texts": np.zeros(2)}
    for samples, tokens, nll in shards:
        counted = likelihoods(tokens, nll, own_text=own_text)
        for i, sample in enumerate(samples):
            found = counted[:, tokens.span(i)].sum(1)
            for name in {"all texts", sample.task or "all texts"}:
                sums[name] = sums.get(name, 0) + found
    return {name: float(nats / chars) for name, (nats, chars) in sums.items() if chars}


def nats_per_character(store: KVStore, teacher: str) -> dict[str, float]:
    """Of all committed texts of a teacher and by task; empty where no confidence is stored."""
    manifest = store.teacher(teacher)
    ids = store.committed_in_order(teacher) if manifest.has_confidence else []
    shards = (
        (store.samples(i), store.token_table(teacher, i), store.token_array(teacher, i, "nll"))
        for i in ids
    )
    return mean_likelihoods(shards, own_text=manifest.own_text)
