"""What a teacher thought of its own text: how likely it found every token, and what instead.

Of the distribution that predicted a token from those before it: the token's negative
log-likelihood (nats), the entropy (nats), the most likely tokens with their log-probabilities, and
the log of the others' mass. The head runs on the hidden states of a few tokens at a time, so no
logits of a whole batch exist. A text's first token, which nothing predicts, has NaN.

Of an encoder-decoder's ``decoder``, the tokens are the decoder's, given the encoder's. Encoders,
and the encoder of an encoder-decoder, predict no text.
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
"""Stands for the log of a mass of zero, where the most likely tokens are the whole vocabulary."""


def output_head(
    name: str, whole: Any, model: Any, verified: Verified, extraction: ExtractionConfig
) -> OutputHead | None:
    """The head of a teacher whose predictions are to be stored; None for an encoder.

    Args:
        name: the teacher's.
        whole: the model with its head.
        model: the part of it that is read, whose last hidden states the head receives.
        verified: how that reads.
        extraction: what is to be stored.

    Raises:
        TeacherError: it has no head, one that reads more than hidden states, or fewer tokens than
            are to be stored.
    """
    if not extraction.stores_predictions:
        return None
    if verified.kind == "encoder" or verified.adapter.stream in ("encoder", "cross"):
        log_once(
            f"teacher {name!r} is an encoder and predicts no text: extraction.confidence and "
            "extraction.logits store nothing of it"
        )
        return None
    off = "set extraction.confidence to false and extraction.logits to 0"
    if whole is model or whole.get_output_embeddings() is None:
        raise TeacherError(
            f"teacher {name!r}: transformers has no language-model head for "
            f"{type(model).__name__}; {off}"
        )
    head = OutputHead(whole)
    vocabulary = _verify(name, head, model, verified, off)
    if extraction.logits > vocabulary:
        raise TeacherError(
            f"teacher {name!r}: extraction.logits is {extraction.logits}, but its vocabulary has "
            f"{vocabulary} tokens; set it to fewer"
        )
    return head


@torch.inference_mode()
def _verify(name: str, head: OutputHead, model: Any, verified: Verified, off: str) -> int:
    """Compare the head on hidden states with the whole model; the size of its vocabulary."""
    ids = probe_ids(model)[:1]
    lengths = (ids.shape[1],)
    batch = TeacherBatch((0,), lengths, ids)
    if verified.adapter.stream == "decoder":
        batch = TeacherBatch((0,), lengths, ids, lengths, ids)
    try:
        wanted = head.model(**batch.inputs, use_cache=False).logits
        found = head(model(**batch.inputs, use_cache=False).last_hidden_state)
    except Exception as error:  # a model's own forward may raise anything
        seen = f"{type(error).__name__}: {shorten(str(error), 150)}"
    else:
        apart = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if apart <= 10 * TOLERANCE[found.dtype]:
            return int(wanted.shape[-1])
        seen = f"they differ by {apart:.1e}"
    raise TeacherError(
        f"teacher {name!r}: the logits of {type(head.model).__name__} cannot be computed from its "
        f"last hidden states ({seen}); {off}"
    )


@torch.inference_mode()
def predictions(
    head: OutputHead, hidden_BTE: Tensor, batch: TeacherBatch, *, confidence: bool, num_logits: int
) -> dict[str, Tensor]:
    """Predictions of all tokens of a batch but the first of each sample, in order, on the CPU.

    Returns:
        ``nll`` and ``entropy`` float32 ``[N]``, if ``confidence``; ``top_ids`` int32 and
        ``top_logprobs`` float32 ``[N, num_logits]`` in falling order, and ``rest_logprob`` ``[N]``,
        if ``num_logits``. Empty where no sample has a second token.
    """
    predicted = batch.real_mask[:, 1:]
    hidden_NE = hidden_BTE[:, :-1][predicted.to(hidden_BTE.device)]
    labels_N = batch.input_ids[:, 1:][predicted]
    parts = (torch.split(x, head.num_rows) for x in (hidden_NE, labels_N))
    found = [
        _of_chunk(head(hidden[None])[0], labels, confidence=confidence, num_logits=num_logits)
        for hidden, labels in (zip(*parts, strict=True) if len(labels_N) else ())
    ]
    return {name: torch.cat([part[name] for part in found]).cpu() for name in (found or [{}])[0]}


def _of_chunk(
    logits_NV: Tensor, labels_N: Tensor, *, confidence: bool, num_logits: int
) -> dict[str, Tensor]:
    logprob = logits_NV.float().log_softmax(-1)
    found = {}
    if confidence:
        label = labels_N.to(logprob.device)[:, None]
        found["nll"] = -logprob.gather(1, label)[:, 0]
        found["entropy"] = torch.special.entr(logprob.exp()).sum(-1)
    if num_logits:
        top = logprob.topk(num_logits)
        found |= {"top_ids": top.indices.int(), "top_logprobs": top.values.clamp_min(LOWEST)}
        rest = logprob.scatter_(1, top.indices, -torch.inf).logsumexp(-1)
        found["rest_logprob"] = rest.clamp_min(LOWEST)
    return found
