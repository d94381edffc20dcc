"""Logits of a causal LM a few tokens at a time, so that none of a large vocabulary exist at once.

Logits are the largest tensor of a step: 8 texts of 512 tokens over 150,000 words are 2.5 GB in
float32, held several times by the cross-entropy. Above ``MAX_LOGITS`` the model computes them for
one token only (``logits_to_keep``), what its head would read is taken from its body, and a loss
runs the head on a chunk of tokens, and again in the backward pass (as Liger Kernel, arXiv
2410.10989, and Cut Cross-Entropy, arXiv 2411.09009, do in fused kernels of their own).

The head is the model's own forward around a body that returns the given hidden states, so that
scales, soft caps and biases are the family's. It is verified on the model in hand; a model that
does not reproduce its logits so computes all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from kvdistill.attention.geometry import text_model

log = logging.getLogger(__name__)

MAX_LOGITS: Final = 2**25
"""Logits that are computed at once: 128 MB in float32."""


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """Logits that are computed chunk by chunk, and not kept."""

    hidden_BTE: Tensor
    head: OutputHead

    def map(self, function: Callable[[Tensor, Tensor], Tensor], labels_BT: Tensor) -> Tensor:
        """``function(logits [N, V], labels [N])`` of every chunk: ``[B, T]``.

        Gradients compute the logits again.
        """

        def of_chunk(hidden_NE: Tensor, labels_N: Tensor) -> Tensor:
            return function(self.head(hidden_NE[None])[0], labels_N)

        hidden, labels = self.hidden_BTE.flatten(0, 1), labels_BT.flatten()
        parts = (torch.split(x, self.head.num_rows) for x in (hidden, labels))
        chunks = zip(*parts, strict=True)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        found = [checkpoint(of_chunk, *chunk, **options) for chunk in chunks]
        return torch.cat(found).view_as(labels_BT)

    def whole(self) -> Tensor:
        """All logits, ``[B, T, V]``."""
        return self.head(self.hidden_BTE)


class _BodyOutput(tuple[Tensor, ...]):
    """What a body returns to its head: the last hidden state and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class OutputHead:
    """The head of a language model, run on the last hidden states of its body."""

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        self.model, self.body = model, text_model(model) if decoder is model else decoder
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])

    @property
    def num_rows(self) -> int:
        """Tokens whose logits are computed at once."""
        return max(MAX_LOGITS // self.vocab_size, 1)

    def __call__(self, hidden_BTE: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of last hidden states, as the model computes them."""
        stub = _BodyOutput((hidden_BTE,))
        inputs: dict[str, Any] = {"inputs_embeds": hidden_BTE}
        if self.model.config.is_encoder_decoder:
            encoded = BaseModelOutput(last_hidden_state=hidden_BTE)  # which the stub does not read
            inputs = {"encoder_outputs": encoded, "decoder_inputs_embeds": hidden_BTE}
        own = self.body.__dict__.get("forward")
        self.body.forward = lambda *_, **__: stub
        try:
            logits: Tensor = self.model.forward(**inputs, use_cache=False).logits
        finally:
            del self.body.forward
            if own is not None:
                self.body.forward = own
        return logits


class LanguageHead(OutputHead):
    """The head of one causal LM, verified when it is made."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.is_separable = self._reproduces_logits()

    def run(
        self, *, columns: int | None = None, **inputs: Any
    ) -> tuple[Any, Tensor | DeferredLogits]:
        """The model's output, and logits of its last ``columns`` tokens; of all if not given."""
        given: Tensor = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
        num_columns = given.shape[1] if columns is None else columns
        if self.is_separable and given.shape[0] * num_columns > self.num_rows:
            with self._reading() as found:
                output = self.model(**inputs, logits_to_keep=1)
            return output, DeferredLogits(found[0][:, -num_columns:], self)
        some = self.is_separable and columns is not None
        output = self.model(**inputs, **({"logits_to_keep": num_columns} if some else {}))
        return output, output.logits[:, -num_columns:]

    @contextmanager
    def _reading(self) -> Iterator[list[Tensor]]:
        """Collects what the body returns to the head."""
        found: list[Tensor] = []
        hook = self.body.register_forward_hook(lambda *args: found.append(args[-1][0]))
        try:
            yield found
        finally:
            hook.remove()

    @torch.no_grad()
    def _reproduces_logits(self) -> bool:
        """Whether logits can be had of chosen tokens, and of last hidden states alone."""
        device = self.model.get_input_embeddings().weight.device
        if self.body is self.model or device.type == "meta":
            return False
        ids = torch.arange(5, device=device)[None] % self.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with self._reading() as found:
                wanted = self.model(**inputs).logits
            kept = self.model(**inputs, logits_to_keep=2).logits
            error_of = [(kept - wanted[:, -2:]).abs().max(), (self(found[0]) - wanted).abs().max()]
            if max(error_of) <= 1e-4 * wanted.abs().max():
                return True
            reason = "it computes the logits of all tokens"
        except Exception as error:  # a model's own forward may raise anything
            reason = str(error).split("\n")[0]
        finally:
            for module in training:
                module.training = True
        log.info("%s: logits are not computed in chunks: %s", type(self.model).__name__, reason)
        return False
