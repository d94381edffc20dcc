"""Are the latents load-bearing? What becomes of the answers when they are tampered with.

Tampering happens where the answer looks: at the latents' keys and values, before rotation, in
every layer. A student whose answers survive zeros, another order or another sample's latents has
them for decoration, whatever its accuracy.

``zeroed``    keys and values are zero
``shuffled``  the latents' positions are permuted, the same way in every layer
``swapped``   each sample gets the latents of the next one in its batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.corpus import Sample
from kvdistill.distill.latent.evaluate import latent_exact_match
from kvdistill.distill.latent.generation import Think
from kvdistill.distill.latent.student import LatentStudent, Thought
from kvdistill.distill.student import KVCapture
from kvdistill.errors import StudentError
from kvdistill.types import Kind

Tamper = Callable[[Tensor], Tensor]
"""From the latents' keys or values ``[B, H, M, D]`` to what the answer sees of them."""


def _shuffled(x_BHMD: Tensor) -> Tensor:
    order = torch.randperm(x_BHMD.shape[2], generator=torch.Generator().manual_seed(0))
    return x_BHMD[:, :, order.to(x_BHMD.device)]


TAMPERINGS: Final[dict[str, Tamper]] = {
    "zeroed": torch.zeros_like,
    "shuffled": _shuffled,
    "swapped": lambda x_BHMD: x_BHMD.roll(1, dims=0),
}


def tampered(student: LatentStudent, tamper: Tamper) -> Think:
    """A way of thinking whose latents are tampered with before the answer sees them."""
    capture = KVCapture(student.backbone)

    def think(question_BT: Tensor, mask_BT: Tensor) -> Thought:
        prefix, x_BME = student.think(question_BT, mask_BT)
        with capture() as captured:
            thought = student.conclude(prefix, x_BME)
        columns = thought.columns
        own = [(tamper(layer.key[:, :, columns]), tamper(layer.value[:, :, columns]))
               for layer in captured]  # fmt: skip

        def rewrite(x_BHTD: Tensor, layer: int, kind: Kind) -> Tensor:
            out = x_BHTD.clone()
            out[:, :, columns] = own[layer][kind == "value"]
            return out

        with capture.rewriting(rewrite):
            return student.conclude(prefix, x_BME)

    return think


def tamper_with(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, float]:
    """Exact match under every tampering, by its name.

    Raises:
        StudentError: there are no latents to tamper with.
        CorpusError: a sample has no prompt or no answer.
    """
    if not student.config.positions:
        raise StudentError("a student with latent.method none has no latents to tamper with")
    found = {}
    for name, tamper in TAMPERINGS.items():
        result = latent_exact_match(
            student,
            tokenizer,
            samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            think=tampered(student, tamper),
        )
        found[name] = result.share
    return found
