"""Finding how a model is read: its family's adapter, any that fits, or its own cache."""

from __future__ import annotations

from typing import Any, Final

import torch

from kvdistill.adapters import Adapter, separate
from kvdistill.errors import TeacherError
from kvdistill.extract.cached import verify_cache
from kvdistill.extract.capture import sites
from kvdistill.extract.describe import Verified
from kvdistill.extract.families import adapters_for, is_known
from kvdistill.extract.rotary import candidates
from kvdistill.extract.verify import verify
from kvdistill.types import Stream

CACHE: Final = Adapter("own cache, un-rotated", layers="", attention="", taps=(), cut=separate)
"""Not an adapter but the absence of one: see ``cached.py``."""
PROBE_TOKENS: Final = 13
"""Length of the verification run; prime, so that no axis is mistaken for the token axis."""


def fit(name: str, model: Any, stream: Stream | None) -> Verified:
    """Verify the adapters that may fit a model, and take the first that does.

    Raises:
        TeacherError: none fits; says what was wrong with the likeliest.
    """
    problems: list[str] = []
    for adapter in adapters_for(name, model, stream):
        try:
            found, skipped = sites(model, adapter)
            rotations = candidates(model, max(site.layer_idx for site in found) + 1)
            layers = verify(model, found, rotations, lambda: _probe(model))
        except (TeacherError, RuntimeError) as error:
            # A stranger's tensors need not split as the adapter at hand would have them.
            problems.append(" ".join(str(error).split()))
            continue
        return Verified(adapter, found, skipped, layers)
    if not is_known(model) and not model.config.is_encoder_decoder:
        try:
            cached, without = verify_cache(model, _probe_ids(model))
        except TeacherError as error:
            raise TeacherError(f"teacher {name!r}: {error}") from None
        return Verified(CACHE, [], without, cached)
    raise TeacherError(f"teacher {name!r}: {problems[0]}")


def _probe_ids(model: Any) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator)
    return ids.to(model.get_input_embeddings().weight.device)


@torch.inference_mode()
def _probe(model: Any) -> None:
    """A pass over a few random tokens, through every stream that the model has."""
    inputs = {"input_ids": _probe_ids(model)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :-2]
    model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)
