"""What a teacher thought of its own text: how likely it found every token, and what instead.

Of the distribution that predicted a token from those before it: the token's negative
log-likelihood and the entropy, in nats, the most likely tokens with their log-probabilities, and
the log of the others' mass. The head runs on a few tokens at a time, so the logits of a batch never
exist together. A text's first token, which nothing predicts, has NaN. Of an encoder-decoder's
``decoder`` the tokens are the decoder's; encoders predict no text.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.attention.fitting import Verified
from kvdistill.attention.language_head import OutputHead
from kvdistill.attention.verification import TOLERANCE, probe_ids
from kvdistill.config.base import log_once
from kvdistill.config.extraction import ExtractionConfig
from kvdistill.errors import TeacherError
from kvdistill.extract.tokenise import TeacherBatch
from kvdistill.text import shorten

LOWEST: Final = torch.finfo(torch.float16).min
"""Stands for the log of no mass at all."""


def output_head(
    name: str, whole: Any, model: Any, verified: Verified, extraction: ExtractionConfig
) -> OutputHead | None:
    """The head of ``whole`` on hidden states of its ``model``; None where nothing is to be stored.

    Raises:
        TeacherError: there is none, it reads more than these, or its vocabulary is too small.
    """
    if not extraction.stores_predictions:
        return None
    if verified.kind == "encoder" or verified.adapter.stream in ("encoder", "cross"):
        log_once(
            f"teacher {name!r} is an encoder and predicts no text: extraction.confidence and "
            "extraction.logits store nothing of it"
        )
        return None
    fault, vocabulary = _fault(whole, model, paired=verified.adapter.stream == "decoder")
    if fault:
        raise TeacherError(
            f"teacher {name!r}: {type(whole).__name__} gives no logits of hidden states: {fault}; "
            "set extraction.confidence to false and extraction.logits to 0"
        )
    if extraction.logits > vocabulary:
        raise TeacherError(
            f"teacher {name!r}: extraction.logits is {extraction.logits}, but its vocabulary has "
            f"{vocabulary} tokens; set it to fewer"
        )
    return OutputHead(whole)


@torch.inference_mode()
def _fault(whole: Any, model: Any, *, paired: bool) -> tuple[str, int]:
    """How logits of hidden states differ from the whole model's; the size of the vocabulary."""
    ids = probe_ids(model)[:1]
    own = (ids.shape[1],), ids
    inputs = TeacherBatch((0,), *own, *(own if paired else ())).inputs
    if whole is model:
        return "transformers has no head for it", 0
    try:
        wanted = whole(**inputs, use_cache=False).logits
        found = OutputHead(whole)(model(**inputs, use_cache=False).last_hidden_state)
    except Exception as error:  # a model's own forward may raise anything
        return f"{type(error).__name__}: {shorten(str(error), 150)}", 0
    apart = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    fault = "" if apart <= 10 * TOLERANCE[found.dtype] else f"they differ by {apart:.1e}"
    return fault, int(wanted.shape[-1])


@torch.inference_mode()
def predictions(
    head: OutputHead, hidden_BTE: Tensor, batch: TeacherBatch, *, confidence: bool, num_logits: int
) -> dict[str, Tensor]:
    """Of all tokens of a batch but the first of each sample, in order, float32 on the CPU.

    ``nll`` and ``entropy [N]``, if ``confidence``; ``top_ids`` (int32) and ``top_logprobs``
    ``[N, num_logits]`` in falling order and ``rest_logprob [N]``, if ``num_logits``. Empty where no
    sample has a second token.
    """
    predicted = batch.real_mask[:, 1:]
    hidden_NE = hidden_BTE[:, :-1][predicted.to(hidden_BTE.device)]
    labels_N = batch.input_ids[:, 1:][predicted]
    parts = (torch.split(x, head.num_rows) for x in (hidden_NE, labels_N))
    found: list[dict[str, Tensor]] = []
    for hidden, labels in zip(*parts, strict=True) if len(labels_N) else ():
        logprob = head(hidden[None])[0].float().log_softmax(-1)
        columns = {}
        if confidence:
            chosen = logprob.gather(1, labels.to(logprob.device)[:, None])
            columns["nll"] = -chosen[:, 0]
            columns["entropy"] = torch.special.entr(logprob.exp()).sum(-1)
        if num_logits:
            top = logprob.topk(num_logits)
            rest = logprob.scatter_(1, top.indices, -torch.inf).logsumexp(-1)
            columns |= {"top_ids": top.indices.int(), "rest_logprob": rest.clamp_min(LOWEST)}
            columns["top_logprobs"] = top.values.clamp_min(LOWEST)
        found.append(columns)
    return {name: torch.cat([part[name] for part in found]).cpu() for name in (found or [{}])[0]}
