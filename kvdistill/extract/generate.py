"""A teacher's own rationales: sampled once per prompt, then read and stored like any text.

Sampling is by the Gumbel trick: noise from a generator of the sample's own is added to the
truncated log-probabilities, and the largest wins. That draws exactly from the truncated softmax,
and makes a rationale a function of (weights, prompt, seed, draw), whatever batch it came in; up
to rounding, which may tip a near tie. Several rationales per prompt are several teachers that
differ in ``draw``, since fusing them is fusing teachers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from kvdistill.attention.padded_generation import generate_padded
from kvdistill.config.extraction import GenerateConfig
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.batches import batch_by_tokens
from kvdistill.extract.teacher_tokens import Encoded, Reader
from kvdistill.types import SegmentName


def with_own_rationales(
    model: Any,
    reader: Reader,
    samples: Sequence[Sample],
    config: GenerateConfig,
    *,
    batch_tokens: int,
    max_length: int | None,
) -> list[Sample]:
    """The same samples with the model's rationales in place of the corpus's.

    Prompt, answer, id and task stay; the answer is the corpus's, so that importance has a query.

    Raises:
        TeacherError: a sample has no prompt, or the view has no rationale to fill in.
    """
    for sample in samples:
        if "prompt" not in dict(sample.segments):
            raise TeacherError(
                f"sample {sample.sample_id!r} has no prompt to continue; generated rationales "
                "need a corpus of prompts"
            )
    prompts = Reader(
        reader.tokenizer, reader.view.before("rationale"), reader.add_special_tokens, reader.bos
    ).read(samples)
    prompts = [_open_ended(prompt, reader.tokenizer) for prompt in prompts]
    texts = [""] * len(samples)
    lengths = [prompt.num_tokens + config.max_new_tokens for prompt in prompts]
    for chosen in batch_by_tokens(lengths, batch_tokens):
        longest = max(prompts[i].num_tokens for i in chosen)
        room = config.max_new_tokens
        if max_length is not None:
            room = min(room, max_length - longest)
        if room < 1:
            continue
        seeds = [_seed(config, samples[i].sample_id) for i in chosen]
        part = [prompts[i] for i in chosen]
        written = _sample_rationales(
            model, reader.tokenizer, part, config, seeds=seeds, max_new_tokens=room
        )
        for i, text in zip(chosen, written, strict=True):
            texts[i] = text
    return [_rewritten(sample, text) for sample, text in zip(samples, texts, strict=True)]


class RowNoise:
    """A logits processor: Gumbel noise of a generator per row, so that arg max draws a sample."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to ``[B, V]`` log-probabilities; -inf stays out."""
        uniform = torch.stack(
            [
                torch.rand(scores.shape[1], generator=g, dtype=torch.float64)
                for g in self._generators
            ]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
        return scores + gumbel.to(scores.device, scores.dtype)


def _sample_rationales(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    config: GenerateConfig,
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    processors = LogitsProcessorList()
    if config.temperature > 0:
        processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_p < 1:
            processors.append(TopPLogitsWarper(config.top_p))
        processors.append(RowNoise(seeds))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        stop_strings=list(config.stop) or None,
    )
    written = generate_padded(
        model,
        [prompt.token_ids for prompt in prompts],
        settings,
        logits_processor=processors,
        tokenizer=tokenizer,
    )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [_cut_at_stop(text, config.stop) for text in texts]


def _cut_at_stop(text: str, stops: Sequence[str]) -> str:
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].rstrip()


def _open_ended(prompt: Encoded, tokenizer: Any) -> Encoded:
    """Without the special tokens that a tokenizer puts after a text: a prompt goes on."""
    end = prompt.num_tokens
    special = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while end and prompt.segment[end - 1] < 0 and int(prompt.token_ids[end - 1]) in special:
        end -= 1
    return Encoded(
        prompt.token_ids[:end], prompt.char_start[:end], prompt.char_end[:end], prompt.segment[:end]
    )


def _rewritten(sample: Sample, text: str) -> Sample:
    """Separators belong to segments: a rationale that begins without white space gets one."""
    if text and not text[0].isspace():
        text = "\n" + text
    parts = dict(sample.segments)
    order: tuple[SegmentName, ...] = ("prompt", "rationale", "answer")
    parts["rationale"] = text
    segments = tuple((name, parts[name]) for name in order if name in parts)
    return Sample(sample.sample_id, segments, sample.task)


def _seed(config: GenerateConfig, sample_id: str) -> int:
    digest = hashlib.sha256(f"{config.seed}/{config.draw}/{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
