"""All checks of a latent student at once, as figures and rows of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdistill.corpus import Sample
from kvdistill.distill.answers import is_gradable
from kvdistill.distill.held_out import HeldOut
from kvdistill.distill.latent.reading import MIN_SAMPLES, intermediate_results, probe, read_latents
from kvdistill.distill.latent.student import LatentStudent
from kvdistill.distill.latent.tampering import tamper_with


def diagnose_latents(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    found: HeldOut,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> HeldOut:
    """An evaluation with what tampering does to it, and what can be read off the latents.

    ``exact_match_zeroed``, ``…_shuffled``, ``…_swapped``   see ``tampering``
    ``probe_<step>``       share of right results of a step, read off the latent that knows it best
    ``commonest_<step>``   what guessing would score; both only where rationales have equations
    Rows get ``nearest_tokens``: per latent the tokens that it is nearest to, best first.

    Raises:
        StudentError: there are no latents.
    """
    asked = [sample for sample in samples if is_gradable(sample)]
    tampered = tamper_with(
        student, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    metrics = found.metrics | {f"exact_match_{name}": share for name, share in tampered.items()}
    latents = read_latents(student, tokenizer, asked, batch_size=batch_size)
    if sum(bool(intermediate_results(sample)) for sample in asked) >= MIN_SAMPLES:
        probes = probe(latents, asked)
        for step, commonest in enumerate(probes.commonest, start=1):
            best = max(row[step - 1] for row in probes.accuracy)
            metrics |= {f"probe_{step}": best, f"commonest_{step}": commonest}
    nearest = {
        sample.sample_id: [tokenizer.batch_decode(ids.unsqueeze(-1)) for ids in row]
        for sample, row in zip(asked, latents.nearest_NMK, strict=True)
    }
    rows = [row | {"nearest_tokens": nearest[row["sample_id"]]} for row in found.rows]
    return HeldOut(metrics, rows)
