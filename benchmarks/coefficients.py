"""Is regression onto the coefficients of ``klt`` cheaper than onto decoded keys and values?

    python benchmarks/coefficients.py STORE TEACHER

An orthonormal change of basis leaves a squared error as it is, so a student could predict the
stored coefficients, without the inverse transform and without components that got no bits. Both
ways are timed, in turn, with the bases of a stored teacher: forward and backward of a linear head
for one student layer, from unpacked codes on.

    channels      the codes are decoded to one layer of the teacher, which the head predicts
    coefficients  the head predicts all components of the block that this layer is in

The median of the ratios is printed, with the operations that it should follow from. On a device
that computes both at one speed, what is below 1 pays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvdistill.store.codecs.klt import Basis
from kvdistill.store.reader import KVStore


def seconds(student: Tensor, head: Tensor, target: Callable[[], Tensor]) -> float:
    """Forward and backward of a linear head, its target included."""
    began = time.perf_counter()
    torch.nn.functional.mse_loss(student @ head, target()).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - began


def time_ratio(basis: Basis, num_tokens: int, wide: int, width: int, rounds: int) -> float:
    """Time onto coefficients over time onto ``wide`` decoded channels, for a student's width."""
    codes = torch.randint(-3, 4, (num_tokens, len(basis.bits))).float()
    student = torch.randn(num_tokens, width, requires_grad=True)
    narrow = torch.randn(width, wide, requires_grad=True)
    broad = torch.randn(width, len(basis.bits), requires_grad=True)
    ratios = [
        seconds(student, broad, lambda: codes)
        / seconds(student, narrow, lambda: basis.decode(codes, slice(0, wide)))
        for _ in range(rounds)
    ]
    return statistics.median(ratios[1:])  # the first one is warm-up


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 192, 512])
    asked = parser.parse_args()
    print("| kind | components of channels | student's width | operations | time |")
    print("|---|---|---|---|---|")
    for kind, transform in KVStore.open(asked.store).transforms(asked.teacher).items():
        layers, basis = transform.blocks[0]
        num_components, num_channels = basis.basis.shape
        wide = num_channels // len(layers)
        share = f"{num_components} of {num_channels} ({len(layers)} layers)"
        for width in asked.widths:
            ratio = time_ratio(basis, asked.tokens, wide, width, asked.rounds)
            work = 3 * width * num_components / (num_components * wide + 3 * width * wide)
            print(f"| {kind} | {share} | {width} | {work:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
