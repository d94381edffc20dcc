"""How each kind of teacher reads a batch, so that a stored teacher always has one token axis.

An encoder-decoder is three teachers. ``encoder``: its self-attention over the whole text.
``cross``: what its decoder's cross-attention sees of that text. ``decoder``: self-attention over
what follows the prompt, with the prompt as the encoder's input; a plain text is both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.batches import TeacherBatch
from kvdistill.extract.prompt_template import PromptTemplate, TemplateSlot
from kvdistill.extract.teacher_tokens import Encoded, Reader, with_start
from kvdistill.types import Stream

SOURCE: Final = PromptTemplate((TemplateSlot("source"),))


TARGET: Final = PromptTemplate((TemplateSlot("target"),))


def forward(model: Any, stream: Stream, batch: TeacherBatch) -> Tensor:
    """One pass without cache or head; the final hidden state ``[B, T, E]`` on the token axis."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if stream == "self":
        return last_hidden(model(**inputs, use_cache=False))
    if stream == "encoder":
        return last_hidden(model.get_encoder()(**inputs))
    if stream == "cross":
        start = torch.full_like(batch.input_ids[:, :1], start_token(model))
        output = model(**inputs, decoder_input_ids=start, use_cache=False)
        return last_hidden(output, "encoder_last_hidden_state")
    return last_hidden(
        model(
            input_ids=batch.source_ids,
            attention_mask=batch.source_mask,
            decoder_input_ids=batch.input_ids,
            decoder_attention_mask=batch.attention_mask,
            use_cache=False,
        )
    )


def read_pair(
    reader: Reader, model: Any, samples: Sequence[Sample], limit: int | None
) -> list[Encoded]:
    """Tokens of a decoder stream: the target after the start token, beside its source."""
    sources = Reader(reader.tokenizer, SOURCE).read(samples, limit)
    targets = Reader(reader.tokenizer, TARGET).read(samples, limit and limit - 1)
    start = start_token(model)
    return [with_start(t, start, s) for t, s in zip(targets, sources, strict=True)]


def start_token(model: Any) -> int:
    """What an encoder-decoder's decoder begins with.

    Raises:
        TeacherError: the model's config does not say.
    """
    token_id: int | None = model.config.decoder_start_token_id
    if token_id is None:
        raise TeacherError(f"{type(model).__name__}: its config has no decoder_start_token_id")
    return token_id


def last_hidden(output: Any, name: str = "last_hidden_state") -> Tensor:
    """The final hidden state of a model's output."""
    hidden: Tensor = getattr(output, name)
    return hidden
