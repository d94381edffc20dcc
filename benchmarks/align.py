"""Share of a training step that is spent on alignment, projection and fusion.

Three teachers of the sizes of SmolLM2-135M, Gemma 3 270M and MiniLM supervise a student of the size
of SmolLM2 (random weights, which do not affect cost), batch 8 x 512 tokens, in both modes with a
fixed target. The measurement covers all work of a step on keys and values, with the code of
training: from stored int8 codes (decoding and standardising included) to gradients on the student's
KV. Also: the banded product against a dense matrix product and against gathers.

Figures are CPU seconds, by default of one thread, which are comparable on a shared machine.

    python benchmarks/align.py            # a few minutes
    python benchmarks/align.py --quick    # batch 2 x 256
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import ProjectionConfig
from kvdistill.distill.align.band import Band
from kvdistill.distill.align.character_iou import Spans, align_tokens
from kvdistill.distill.align.layers import layer_map
from kvdistill.distill.distiller import StudentOutput
from kvdistill.distill.fuse.weights import fixed_weights, fuse, renormalise
from kvdistill.distill.losses.pointwise import kv_error
from kvdistill.distill.losses.regression import regression_error
from kvdistill.distill.losses.weighting import reduce_tokens
from kvdistill.distill.targets import (
    BandProduct,
    GroupSpace,
    TargetStatistics,
    TeacherHead,
    TeacherSpace,
)
from kvdistill.store.codecs import CODECS
from kvdistill.types import KINDS, CodecSpec, Kind

STUDENT_LAYERS, STUDENT = 30, HeadShape(3, 64)
TEACHERS = {  # layers, KV heads x dim, characters per token
    "SmolLM2-135M": (30, HeadShape(3, 64), 3.9),
    "Gemma 3 270M": (18, HeadShape(1, 256), 4.1),
    "MiniLM": (6, HeadShape(12, 32), 4.4),
}
STUDENT_CHARS = 3.5
CODEC = "int8"


@dataclass
class Teacher:
    """Stored codes of one teacher, and everything prepared for it before the step."""

    parts: dict[Kind, dict[str, dict[str, Tensor]]]
    band: Band
    heads: dict[Kind, TeacherHead]
    frozen: dict[Kind, TeacherHead]


def spans(batch: int, tokens: int, chars_per_token: float, seed: int) -> Spans:
    """Token spans of a simulated tokenizer over one long text per sample."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.poisson(torch.full((batch, tokens), chars_per_token - 1), generator) + 1
    end = lengths.cumsum(1).long()
    start = end - lengths.long()
    limit = int(tokens * STUDENT_CHARS)
    return Spans(start, end, torch.zeros_like(start), start < limit)


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return sorted(times)[len(times) // 2]


def make_teachers(batch: int, tokens: int, student: Spans) -> list[Teacher]:
    out = []
    for seed, (layers, shape, chars) in enumerate(TEACHERS.values(), start=1):
        length = int(tokens * STUDENT_CHARS / chars) + 1
        band = align_tokens(student, spans(batch, length, chars, seed))
        space = space_of(layers, shape)
        stored = len(space.needed)
        parts: dict[Kind, dict[str, dict[str, Tensor]]] = {}
        for kind in KINDS:
            x = torch.randn(batch, stored, shape.num_heads, length, shape.head_dim)
            parts[kind] = {"": CODECS[CODEC].encode(x, kind)}
        heads, frozen = (
            {kind: TeacherHead(space, kind, STUDENT, config, projects=projects) for kind in KINDS}
            for config, projects in (
                (ProjectionConfig(), False),
                (ProjectionConfig(mode="frozen"), True),
            )
        )
        out.append(Teacher(parts, band, heads, frozen))
    return out


def space_of(layers: int, shape: HeadShape) -> TeacherSpace:
    mapping = layer_map("ratio", STUDENT_LAYERS, range(layers))
    channels = (len(mapping.needed), *shape)
    statistics = TargetStatistics(torch.randn(channels), torch.rand(channels) + 0.5)
    group = GroupSpace(
        "",
        tuple(range(STUDENT_LAYERS)),
        mapping,
        dict.fromkeys(KINDS, shape),
        dict.fromkeys(KINDS, statistics),
    )
    return TeacherSpace("", CodecSpec(key=CODEC, value=CODEC), (group,), causal=True)


def weights(teachers: list[Teacher]) -> Tensor:
    covered = torch.stack([teacher.band.covered for teacher in teachers])
    return renormalise(fixed_weights([1.0] * len(teachers)), covered.unsqueeze(2))


def regress(teachers: list[Teacher], student: StudentOutput, mask: Tensor) -> None:
    """``student_to_teacher``, forward and backward down to the student's KV."""
    total = torch.zeros(())
    for kind in KINDS:
        regressions = [
            one
            for teacher, alpha in zip(teachers, weights(teachers), strict=True)
            for one in teacher.heads[kind].regressions(
                teacher.heads[kind].layers(teacher.parts[kind], teacher.band), alpha
            )
        ]
        total = total + regression_error(student.kind(kind), regressions)
    (total / mask.sum()).backward()


def compare_with_fused(teachers: list[Teacher], student: StudentOutput, mask: Tensor) -> None:
    """``frozen``: project and fuse without gradient, then compare with the student's KV."""
    alpha = weights(teachers)
    loss = torch.zeros(())
    for kind in KINDS:
        with torch.no_grad():
            projected = [
                t.frozen[kind].projected(
                    [x.stacked() for x in t.frozen[kind].layers(t.parts[kind], t.band)]
                )
                for t in teachers
            ]
            fused = fuse(alpha, projected)
        loss = loss + reduce_tokens(kv_error(student.kind(kind), fused).mean(1), mask)
    loss.backward()


def banded_product(band: Band, x_BLHTD: Tensor) -> Tensor:
    product = BandProduct(band, *x_BLHTD.shape[2:4])
    return torch.stack([product(layer) for layer in x_BLHTD.unbind(1)], dim=1)


def dense_product(band: Band, x_BLHTD: Tensor) -> Tensor:
    b, rows, width = band.weight.shape
    matrix = torch.zeros(b, rows, x_BLHTD.shape[3] + width)
    matrix.scatter_add_(2, band.start.unsqueeze(-1) + torch.arange(width), band.weight)
    return matrix[:, None, None, :, : x_BLHTD.shape[3]] @ x_BLHTD


def gathered(band: Band, x_BLHTD: Tensor) -> Tensor:
    b, layers, heads, columns, dim = x_BLHTD.shape
    out = x_BLHTD.new_zeros(b, layers, heads, band.start.shape[1], dim)
    for offset in range(band.weight.shape[-1]):
        index = (band.start + offset).clamp_max(columns - 1)[:, None, None, :, None]
        weight = band.weight[:, None, None, :, offset, None]
        out += x_BLHTD.gather(3, index.expand(out.shape)) * weight
    return out


def student_step(batch: int, tokens: int) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 49_152, (batch, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch, tokens = (2, 256) if args.quick else (8, 512)
    torch.manual_seed(0)
    student = spans(batch, tokens, STUDENT_CHARS, 0)
    teachers = make_teachers(batch, tokens, student)
    shape = (batch, STUDENT_LAYERS, STUDENT.num_heads, tokens, STUDENT.head_dim)
    none = torch.empty(0)
    view = StudentOutput(none, none, *(torch.randn(shape, requires_grad=True) for _ in KINDS), None)
    band = teachers[0].band
    big = CODECS[CODEC].decode(teachers[0].parts["key"][""], "key")
    torch.testing.assert_close(banded_product(band, big), dense_product(band, big))
    works: dict[str, Callable[[], object]] = {
        "build_band": lambda: align_tokens(student, student),
        "banded_product": lambda: banded_product(band, big),
        "dense_product": lambda: dense_product(band, big),
        "gathered_product": lambda: gathered(band, big),
        "student_to_teacher": lambda: regress(teachers, view, student.mask),
        "frozen": lambda: compare_with_fused(teachers, view, student.mask),
        "student_step": student_step(batch, tokens),
    }
    cost = {name: seconds(work, args.repeats) for name, work in works.items()}
    ratios = {
        "dense_over_banded": cost["dense_product"] / cost["banded_product"],
        "gathered_over_banded": cost["gathered_product"] / cost["banded_product"],
        "student_to_teacher_share": cost["student_to_teacher"] / cost["student_step"],
        "frozen_share": cost["frozen"] / cost["student_step"],
    }
    figures = {f"{name}_cpu_s": value for name, value in cost.items()} | ratios
    print(
        json.dumps(
            {
                "batch": batch,
                "tokens": tokens,
                "threads": args.threads,
                "band_width": band.weight.shape[-1],
                **{name: float(f"{value:.3g}") for name, value in figures.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
