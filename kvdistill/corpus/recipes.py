"""Rationales in several forms: GSM8K in words or in equations, and synthetic arithmetic.

A latent student is trained on what a rationale computes on the way to the answer, so the form of
the rationale is an experimental variable: words or bare equations, with or without the last step,
which already states the answer (KaVa, arXiv 2510.02312, omits it).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Final, Literal

from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError
from kvdistill.types import SegmentName

RationaleForm = Literal["annotated", "words", "equations"]
ChainForm = Literal["equations", "results"]
Chain = tuple[int, tuple[str, ...]]
"""First number and terms: ``(7, ("+3", "*4"))`` is 7+3*4."""

ANNOTATION: Final = re.compile(r"<<(.*?)>>")
OPERATIONS: Final = "+-*"


def with_rationale(sample: Sample, form: RationaleForm, *, drop_last: bool = False) -> Sample:
    """A GSM8K sample with its rationale in another form; unchanged if it has none.

    Args:
        sample: with a rationale as in GSM8K: a line per step, annotated ``<<48/2=24>>``.
        form: ``annotated`` as it is; ``words`` without the annotations; ``equations`` the
            annotations alone, ``48/2=24 48+24=72`` (empty if there are none).
        drop_last: omit the last step (line or equation).
    """
    text = dict(sample.segments).get("rationale")
    if text is None:
        return sample
    if form == "equations":
        steps, separator = ANNOTATION.findall(text), " "
    else:
        steps, separator = [line for line in text.split("\n") if line.strip()], "\n"
        if form == "words":
            steps = [ANNOTATION.sub("", step) for step in steps]
    if drop_last:
        steps = steps[:-1]
    body = "\n" + separator.join(steps) if steps else ""
    segments: tuple[tuple[SegmentName, str], ...] = tuple(
        (name, body if name == "rationale" else old) for name, old in sample.segments
    )
    return replace(sample, segments=segments)


def arithmetic_samples(
    num_samples: int,
    *,
    steps: int = 4,
    modulus: int = 10,
    seed: int = 0,
    skip: int = 0,
    form: ChainForm = "equations",
    drop_last: bool = False,
) -> list[Sample]:
    """Chains such as ``7+3*4-6``, evaluated from left to right, every step modulo ``modulus``.

    The chains of one seed are distinct, so those before ``skip`` are held out from those after it.

    Args:
        num_samples: number of samples.
        steps: operations per chain.
        modulus: results are 0 … modulus - 1; the numbers in a chain are 1 … modulus - 1.
        seed: of the infinite sequence of chains.
        skip: chains of that sequence to skip.
        form: a rationale of ``equations`` (``7+3=0 0*4=0``) or of ``results`` (``0 0``).
        drop_last: omit the last step of the rationale; the answer then has to compute it.

    Raises:
        CorpusError: too few distinct chains exist.
    """
    if steps < 1 or modulus < 2:
        raise CorpusError(
            f"arithmetic: expected at least 1 step and modulus 2, got {steps} and {modulus}"
        )
    possible = (modulus - 1) ** (steps + 1) * len(OPERATIONS) ** steps
    if skip + num_samples > possible // 2:
        raise CorpusError(
            f"arithmetic: {skip + num_samples} distinct chains requested, but only {possible} of "
            f"{steps} steps modulo {modulus} exist; request at most half, or increase the steps"
        )
    chains = islice(_distinct_chains(steps, modulus, seed), skip, skip + num_samples)
    return [
        _chain_sample(f"{seed}-{skip + i:08d}", chain, modulus, form, drop_last)
        for i, chain in enumerate(chains)
    ]


def _distinct_chains(steps: int, modulus: int, seed: int) -> Iterator[Chain]:
    draw = random.Random(seed)
    seen: set[Chain] = set()
    while True:
        first = draw.randrange(1, modulus)
        terms = (f"{draw.choice(OPERATIONS)}{draw.randrange(1, modulus)}" for _ in range(steps))
        chain = (first, tuple(terms))
        if chain not in seen:
            seen.add(chain)
            yield chain


def _chain_sample(
    sample_id: str, chain: Chain, modulus: int, form: ChainForm, drop_last: bool
) -> Sample:
    value, terms = chain
    question = f"{value}{''.join(terms)}"
    steps = []
    for term in terms:
        number = int(term[1:])
        result = {"+": value + number, "-": value - number, "*": value * number}[term[0]] % modulus
        steps.append(f"{value}{term}={result}" if form == "equations" else str(result))
        value = result
    if drop_last:
        steps = steps[:-1]
    segments: list[tuple[SegmentName, str]] = [("prompt", question)]
    if steps:
        segments.append(("rationale", "\n" + " ".join(steps)))
    return Sample(sample_id, (*segments, ("answer", f"\n{value}")), task="arithmetic")
