"""A teacher's own rationales: generated once per prompt, then read and stored like any text.

Sampling uses the Gumbel-max trick: noise from a generator per sample is added to the truncated
log-probabilities, and the largest wins. That draws exactly from the truncated softmax, and makes a
rationale a function of (weights, prompt, seed, draw), whatever batch it was in, up to rounding in
near ties. Several rationales per prompt are several teachers that differ in ``draw``, since fusing
them is fusing teachers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from kvdistill.attention.padded_generation import end_token_ids, generate_padded
from kvdistill.config.extraction import GenerateConfig
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.teacher import Teacher, max_positions
from kvdistill.types import SegmentName


def generate_rationales(
    teacher: Teacher, samples: Sequence[Sample], config: GenerateConfig, batch_tokens: int
) -> list[Sample]:
    """The same samples with the teacher's rationales in place of the corpus's.

    Prompt, answer, id and task stay; the answer is the corpus's, so that importance has queries.
    A rationale's token budget is ``max_new_tokens`` or what its own prompt leaves of the teacher's
    ``max_length``, so it does not depend on the samples beside it.

    Raises:
        TeacherError: a sample has no prompt, or the prompt template has no rationale to fill in.
    """
    for sample in samples:
        if "prompt" not in dict(sample.segments):
            raise TeacherError(
                f"sample {sample.sample_id!r} has no prompt to continue; generated rationales "
                "need a corpus of prompts"
            )
    tokenizer = teacher.tokenizer
    prompts = _prompts(teacher, samples)
    lengths = [len(prompt) for prompt in prompts]
    texts = [""] * len(samples)
    for chosen, budgets in _batches(teacher, lengths, config.max_new_tokens, batch_tokens):
        written = generate_padded(
            teacher.causal_lm,
            [prompts[i] for i in chosen],
            GenerationConfig(
                do_sample=False,
                max_new_tokens=max(budgets),
                pad_token_id=teacher.pad_id,
                eos_token_id=end_token_ids(teacher.causal_lm, tokenizer) or None,
                stop_strings=list(config.stop) or None,
            ),
            logits_processor=_sampler(config, [samples[i].sample_id for i in chosen]),
            tokenizer=tokenizer,
        )
        within = [ids[:budget] for ids, budget in zip(written, budgets, strict=True)]
        decoded = tokenizer.batch_decode(within, skip_special_tokens=True)
        for i, text in zip(chosen, decoded, strict=True):
            ends = [end for stop in config.stop if (end := text.find(stop)) >= 0]
            texts[i] = text[: min(ends, default=len(text))].rstrip()
    return [_with_rationale(sample, text) for sample, text in zip(samples, texts, strict=True)]


def _prompts(teacher: Teacher, samples: Sequence[Sample]) -> list[NDArray[np.int32]]:
    """Token ids of everything before the rationale."""
    template = teacher.prompt_tokenizer.template.before("rationale")
    tokenizer = replace(teacher.prompt_tokenizer, template=template, is_continued=True)
    prompts = [prompt.token_ids for prompt in tokenizer.tokenise(samples)]
    for sample, token_ids in zip(samples, prompts, strict=True):
        if not token_ids.size:
            raise TeacherError(f"sample {sample.sample_id!r} has an empty prompt to continue")
    return prompts


def _batches(
    teacher: Teacher, lengths: Sequence[int], max_new_tokens: int, batch_tokens: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Samples of every batch, and their token budgets; samples without any budget are in none.

    The rows of a batch take as many steps as the largest budget, and some models have no embedding
    for positions beyond their last. Prompts that reach it are therefore batched by length.
    """
    limit = math.inf if teacher.max_length is None else teacher.max_length
    positions = max_positions(teacher.causal_lm, None) or math.inf
    budgets = [int(min(max_new_tokens, limit - length)) for length in lengths]
    groups: dict[float, list[int]] = {}
    for i, length in enumerate(lengths):
        if budgets[i] > 0:
            groups.setdefault(max(0, length + max_new_tokens - positions), []).append(i)
    for group in groups.values():
        steps = max(budgets[i] for i in group)
        for batch in teacher.batches([lengths[i] + steps for i in group], batch_tokens):
            chosen = [group[i] for i in batch]
            yield chosen, [budgets[i] for i in chosen]


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


def _with_rationale(sample: Sample, text: str) -> Sample:
    """Separators belong to segments: a rationale that begins without white space gets one."""
    if text and not text[0].isspace():
        text = "\n" + text
    parts = dict(sample.segments)
    parts["rationale"] = text
    order: tuple[SegmentName, ...] = ("prompt", "rationale", "answer")
    segments = tuple((name, parts[name]) for name in order if name in parts)
    return Sample(sample.sample_id, segments, sample.task, chat=sample.chat)
