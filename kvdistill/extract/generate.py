"""A teacher's own rationales: generated once per prompt, then read and stored like any text.

Sampling uses the Gumbel-max trick: noise from a generator per sample is added to the truncated
log-probabilities, and the largest wins. That draws exactly from the truncated softmax, and makes a
rationale a function of (weights, prompt, seed, draw), whatever batch it was in, up to rounding in
near ties. Several rationales per prompt are several teachers that differ in ``draw``, since fusing
them is fusing teachers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from kvdistill.attention.padded_generation import generate_padded
from kvdistill.config.extraction import GenerateConfig
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.teacher import Teacher
from kvdistill.extract.tokenise import TokenisedSample, batch_by_tokens
from kvdistill.types import SegmentName


def generate_rationales(
    teacher: Teacher, samples: Sequence[Sample], config: GenerateConfig, batch_tokens: int
) -> list[Sample]:
    """The same samples with the teacher's rationales in place of the corpus's.

    Prompt, answer, id and task stay; the answer is the corpus's, so that importance has queries.

    Raises:
        TeacherError: a sample has no prompt, or the prompt template has no rationale to fill in.
    """
    for sample in samples:
        if "prompt" not in dict(sample.segments):
            raise TeacherError(
                f"sample {sample.sample_id!r} has no prompt to continue; generated rationales "
                "need a corpus of prompts"
            )
    tokenizer, limit = teacher.tokenizer, teacher.max_length
    generation = teacher.causal_lm.generation_config
    template = teacher.prompt_tokenizer.template.before("rationale")
    prompt_tokenizer = replace(teacher.prompt_tokenizer, template=template)
    prompts = [_without_end(prompt, tokenizer) for prompt in prompt_tokenizer.tokenise(samples)]
    texts = [""] * len(samples)
    lengths = [prompt.num_tokens + config.max_new_tokens for prompt in prompts]
    for chosen in batch_by_tokens(lengths, batch_tokens):
        max_new_tokens = config.max_new_tokens
        if limit is not None:
            longest = max(prompts[i].num_tokens for i in chosen)
            max_new_tokens = min(max_new_tokens, limit - longest)
        if max_new_tokens < 1:
            continue
        written = generate_padded(
            teacher.causal_lm,
            [prompts[i].token_ids for i in chosen],
            GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                eos_token_id=generation.eos_token_id or tokenizer.eos_token_id,
                stop_strings=list(config.stop) or None,
            ),
            logits_processor=_sampler(config, [samples[i].sample_id for i in chosen]),
            tokenizer=tokenizer,
        )
        decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
        for i, text in zip(chosen, decoded, strict=True):
            ends = [end for stop in config.stop if (end := text.find(stop)) >= 0]
            texts[i] = text[: min(ends, default=len(text))].rstrip()
    return [_with_rationale(sample, text) for sample, text in zip(samples, texts, strict=True)]


def _sampler(config: GenerateConfig, sample_ids: Sequence[str]) -> LogitsProcessorList:
    """Logits processors after which greedy decoding samples; none at temperature 0."""
    processors = LogitsProcessorList()
    if config.temperature > 0:
        processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_p < 1:
            processors.append(TopPLogitsWarper(config.top_p))
        digests = (
            hashlib.sha256(f"{config.seed}/{config.draw}/{sample_id}".encode()).digest()
            for sample_id in sample_ids
        )
        processors.append(GumbelNoise([int.from_bytes(d[:8], "big") >> 1 for d in digests]))
    return processors


class GumbelNoise:
    """A logits processor with one generator per row, after which arg max draws a sample."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to ``[B, V]`` log-probabilities; -inf stays -inf."""
        uniform = torch.stack(
            [
                torch.rand(scores.shape[1], generator=g, dtype=torch.float64)
                for g in self._generators
            ]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
        return scores + gumbel.to(scores.device, scores.dtype)


def _without_end(prompt: TokenisedSample, tokenizer: Any) -> TokenisedSample:
    """Drop the special tokens that a tokenizer puts after a text, since a prompt is continued."""
    end = prompt.num_tokens
    special = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while end and prompt.segment[end - 1] < 0 and int(prompt.token_ids[end - 1]) in special:
        end -= 1
    return prompt.part(slice(None, end))


def _with_rationale(sample: Sample, text: str) -> Sample:
    """Separators belong to segments: a rationale that begins without white space gets one."""
    if text and not text[0].isspace():
        text = "\n" + text
    parts = dict(sample.segments)
    parts["rationale"] = text
    order: tuple[SegmentName, ...] = ("prompt", "rationale", "answer")
    segments = tuple((name, parts[name]) for name in order if name in parts)
    return Sample(sample.sample_id, segments, sample.task)
