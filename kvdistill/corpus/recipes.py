"""Corpora whose rationales can be dosed: GSM8K in words or equations, and arithmetic made here.

A latent student is taught by what a rationale computes on the way to the answer, so the form of
the rationale matters: the same questions are worth having in words and in bare equations, with
and without the step that already states the answer (KaVa, arXiv 2510.02312, leaves it out).
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


ANNOTATION: Final = re.compile(r"<<(.*?)>>")


OPERATIONS: Final = "+-*"


def with_rationale(sample: Sample, form: RationaleForm, *, drop_last: bool = False) -> Sample:
    """A GSM8K sample with its rationale in another form.

    Args:
        sample: with a rationale as GSM8K writes it: a line per step, ``<<48/2=24>>`` inside.
        form: ``annotated`` as it is; ``words`` without the annotations; ``equations`` nothing but
            them, ``48/2=24 48+24=72``. A sample without annotations has no equations and keeps an
            empty rationale.
        drop_last: leave out the last step (line or equation).
    """
    text = dict(sample.segments).get("rationale")
    if text is None:
        return sample
    if form == "equations":
        steps, joint = ANNOTATION.findall(text), " "
    else:
        steps, joint = [line for line in text.split("\n") if line.strip()], "\n"
        if form == "words":
            steps = [ANNOTATION.sub("", step) for step in steps]
    steps = steps[:-1] if drop_last else steps
    body = "\n" + joint.join(steps) if steps else ""
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
    """Chains such as ``7+3*4-6``, read from left to right, every step modulo ``modulus``.

    No two samples of one seed are alike, so what ``skip`` leaves out is held out.

    Args:
        num_samples: how many.
        steps: operations per chain.
        modulus: values are 0 … modulus - 1; the numbers written are 1 … modulus - 1.
        seed: of the endless list of chains.
        skip: begin so far into that list.
        form: a rationale of ``equations`` (``7+3=0 0*4=0``) or of ``results`` alone (``0 0``).
        drop_last: leave the last step out of the rationale; the answer then has to compute it.

    Raises:
        CorpusError: fewer such chains exist.
    """
    if steps < 1 or modulus < 2:
        raise CorpusError(f"arithmetic: {steps} steps modulo {modulus}; at least 1 and 2")
    possible = (modulus - 1) ** (steps + 1) * len(OPERATIONS) ** steps
    if skip + num_samples > possible // 2:
        raise CorpusError(
            f"arithmetic: {skip + num_samples} different chains of {steps} steps modulo {modulus} "
            f"are asked for, of {possible}; ask for at most half, or take more steps"
        )
    chains = islice(_chains(steps, modulus, seed), skip, skip + num_samples)
    return [
        _chain_sample(f"{seed}-{skip + i:08d}", chain, modulus, form, drop_last)
        for i, chain in enumerate(chains)
    ]


def _chains(steps: int, modulus: int, seed: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Different chains without end: the first number, and ``("+3", "*4", …)``."""
    draw = random.Random(seed)
    seen: set[tuple[int, tuple[str, ...]]] = set()
    while True:
        first = draw.randrange(1, modulus)
        terms = (f"{draw.choice(OPERATIONS)}{draw.randrange(1, modulus)}" for _ in range(steps))
        chain = (first, tuple(terms))
        if chain not in seen:
            seen.add(chain)
            yield chain


def _chain_sample(
    sample_id: str,
    chain: tuple[int, tuple[str, ...]],
    modulus: int,
    form: ChainForm,
    drop_last: bool,
) -> Sample:
    value, terms = chain
    question = f"{value}{''.join(terms)}"
    written = []
    for term in terms:
        number = int(term[1:])
        result = {"+": value + number, "-": value - number, "*": value * number}[term[0]] % modulus
        written.append(f"{value}{term}={result}" if form == "equations" else str(result))
        value = result
    steps = written[:-1] if drop_last else written
    segments: list[tuple[SegmentName, str]] = [("prompt", question)]
    if steps:
        segments.append(("rationale", "\n" + " ".join(steps)))
    return Sample(sample_id, (*segments, ("answer", f"\n{value}")), task="arithmetic")
