"""The kernel against targets that are decoded, standardised and placed: values and gradients.

Without a GPU it runs in Triton's interpreter (``tests/conftest.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import BalanceConfig, ProjectionConfig
from kvdistill.distill.align.band import Band
from kvdistill.distill.align.layers import LayerMap, layer_map
from kvdistill.distill.fuse.balance import TeacherBalance
from kvdistill.distill.losses.fused_residual import kernel_fault
from kvdistill.distill.losses.regression import regression_error
from kvdistill.distill.targets import GroupSpace, TargetStatistics, TeacherHead, TeacherSpace
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.klt import Transform, fit_basis, flatten_layers
from kvdistill.types import KINDS, CodecSpec, LayerGroup

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STUDENT = HeadShape(2, 6)
BETWEEN = LayerMap((1, 4, 4), (4, 7, 4), (0.25, 0.5, 0.0))
"""Two student layers between stored ones, and one at a stored layer."""


def fitted(x_LHTD):
    """klt of one block, about 2.7 bits an element."""
    num_layers, num_heads, _, dim = x_LHTD.shape
    flat = flatten_layers(x_LHTD)
    basis = fit_basis(flat, torch.ones(flat.shape[-1]), max(1, flat.shape[-1] // 3))
    layers = BETWEEN.needed[:num_layers]
    group = LayerGroup(layers, num_heads, dim, dim)
    return Transform(group, max(1, flat.shape[-1] // 3), ((layers, basis),), layers)


def make_head(codec, kind, mapping, shape, lengths, *, hidden=0):
    """A teacher's head, and its parts: samples of these lengths, padded with zero codes."""
    num_layers, how, transforms = len(mapping.needed), CODECS[codec], {}
    if codec == "klt":
        how = fitted(torch.randn(num_layers, shape.num_heads, 200, shape.head_dim))
        transforms = {kind: how}
    parts = []
    for length in lengths:
        x = torch.randn(num_layers, shape.num_heads, length, shape.head_dim)
        x = x * (1 + torch.arange(shape.head_dim) % 5) + 3 * torch.randn(shape.head_dim)
        parts.append(how.encode(x, kind))
    joined = {}
    for suffix in parts[0]:
        longest = max(part[suffix].shape[2] for part in parts)
        padded = [
            torch.zeros(*p.shape[:2], longest, p.shape[3], dtype=p.dtype)
            for p in (part[suffix] for part in parts)
        ]
        for row, part in zip(padded, parts, strict=True):
            row[:, :, : part[suffix].shape[2]] = part[suffix]
        joined[suffix] = torch.stack(padded).to(DEVICE)
    statistics = TargetStatistics(
        torch.randn(num_layers, *shape), torch.rand(num_layers, *shape) + 0.1
    )
    group = GroupSpace(
        "", (0, 2, 1)[: len(mapping.lower)], mapping, dict.fromkeys(KINDS, shape),
        dict.fromkeys(KINDS, statistics), transforms,
    )  # fmt: skip
    space = TeacherSpace("t", CodecSpec(key=codec, value=codec), (group,), causal=True)
    projection = ProjectionConfig(hidden=hidden)
    head = TeacherHead(space, kind, STUDENT, projection, projects=False).to(DEVICE)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head, {"": joined}


def make_band(lengths, num_tokens, width):
    """Every covered student token weighs up to ``width`` teacher tokens of its own sample."""
    limit = torch.tensor(lengths).view(-1, 1, 1)
    start = torch.arange(num_tokens) * limit[..., 0] // num_tokens
    weight = torch.rand(len(lengths), num_tokens, width) + 0.1
    weight *= start.unsqueeze(-1) + torch.arange(width) < limit
    weight[:, ::3] = 0  # not covered
    total = weight.sum(-1, keepdim=True)
    weight = weight / total.masked_fill(total == 0, 1)
    return Band(start.to(DEVICE), weight.to(DEVICE), (total[..., 0] > 0).to(DEVICE))


def outcome(head, parts, band, student, alpha, *, fused, distance="mse", balance=None):
    """The error, and its gradients for student, maps and weights."""
    head.is_fused = fused
    targets = head.layers(parts, band)
    (regression,) = head.regressions(targets, alpha)
    assert (regression.fused is not None) == fused
    if fused:
        regression.target.__dict__.clear()  # nothing else reads the codes
    balancing = None if balance is None else balance.balancing(head.kind)
    error = regression_error(student, [regression], distance, balancing)
    leaves = [student, alpha, *head.parameters()]
    return error, *torch.autograd.grad(2 * error, leaves)


def both(head, parts, band, *, num_tokens, by_layer=True, **options):
    samples = len(band.start)
    student = torch.randn(samples, 3, 2, num_tokens, 6, device=DEVICE, requires_grad=True)
    alpha = torch.rand(samples, 3 if by_layer else 1, num_tokens, device=DEVICE)
    alpha = (alpha * band.covered[:, None]).requires_grad_()
    args = head, parts, band, student, alpha
    return zip(
        outcome(*args, fused=True, **options), outcome(*args, fused=False, **options), strict=True
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_between_layers(codec, kind):
    torch.manual_seed(0)
    lengths = [70, 9]  # of more than a block of scales, and padded
    head, parts = make_head(codec, kind, BETWEEN, HeadShape(2, 12), lengths)
    for mine, theirs in both(head, parts, make_band(lengths, 90, 2), num_tokens=90):
        assert bool(theirs.any())
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


@given(data=st.data())
@settings(max_examples=12)
def test_any_sizes(data):
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    lengths = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=3), label="lengths")
    num_tokens = data.draw(st.integers(1, 20), label="tokens")
    codec = data.draw(st.sampled_from(["int8", "int4", "fp8_e4m3", "bf16"]), label="codec")
    dims = [2, 6, 34] if codec == "int4" else [1, 5, 16, 34]
    shape = HeadShape(
        data.draw(st.integers(1, 3), label="heads"), data.draw(st.sampled_from(dims), label="dim")
    )
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    mapping = data.draw(st.sampled_from([BETWEEN, layer_map("ratio", 3, (0, 1, 5))]), label="map")
    head, parts = make_head(
        codec, kind, mapping, shape, lengths, hidden=data.draw(st.sampled_from([0, 5]))
    )
    band = make_band(lengths, num_tokens, data.draw(st.integers(1, 4), label="width"))
    options = {
        "distance": data.draw(st.sampled_from(["mse", "smooth_l1"])),
        "by_layer": data.draw(st.booleans()),
    }
    for mine, theirs in both(head, parts, band, num_tokens=num_tokens, **options):
        torch.testing.assert_close(mine, theirs, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
def test_a_balance_measures_the_same(distance):
    torch.manual_seed(0)
    head, parts = make_head("int8", "key", BETWEEN, HeadShape(2, 8), [5, 7])
    band, found = make_band([5, 7], 9, 2), {}
    student = torch.randn(2, 3, 2, 9, 6, device=DEVICE, requires_grad=True)
    alpha = torch.rand(2, 3, 9, device=DEVICE, requires_grad=True)
    for fused in (True, False):
        balance = TeacherBalance(BalanceConfig(method="explained"), ["t"], 3).to(DEVICE).train()
        options = {"distance": distance, "balance": balance}
        outcome(head, parts, band, student, alpha, fused=fused, **options)
        balance.end_step(lambda x: x)
        found[fused] = balance.moments
    assert bool((found[False] > 0)[0].all())
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)


def test_under_autocast_the_slope_takes_the_predictions_memory():
    torch.manual_seed(0)
    head, parts = make_head("int8", "value", BETWEEN, HeadShape(2, 8), [5, 7])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pairs = list(both(head, parts, make_band([5, 7], 9, 2), num_tokens=9))
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype == torch.float32
        assert float((mine - theirs).detach().norm() / theirs.detach().norm()) < 1e-2


def test_where_the_kernel_cannot_run_the_reason_is_named(monkeypatch):
    from triton.runtime import driver

    def no_compiler():
        raise RuntimeError("Failed to find C compiler.")

    gpu, works = torch.device("cuda", 0), SimpleNamespace(get_current_target=lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "_active", works)
    assert kernel_fault(gpu) is None
    assert kernel_fault(torch.device("cpu")) == "it needs a GPU"
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=no_compiler))
    assert "RuntimeError: Failed to find C compiler" in kernel_fault(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in kernel_fault(gpu)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvdistill.distill.losses.residual_kernel import residual_kernel as kernel

FLOATS = ("mean", "inverse_std", "weight", "figures", "alpha")
for codes, stored, predicted, options in {cases}:
    types = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(("step", "start"), "*" + stored)
    types |= dict.fromkeys(("prediction", "slope"), "*" + predicted)
    types |= {{"codes": "*" + codes, "first": "*i64", "fraction": "fp32"}}
    types |= dict.fromkeys(options, "constexpr")
    signature = {{name: types.get(name, "i32") for name in kernel.arg_names}}
    constants = {{(kernel.arg_names.index(name),): value for name, value in options.items()}}
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
        assert compiled.metadata.shared <= 100 << 10, (options, compiled.metadata.shared)
        assert len(compiled.asm["cubin"]) > 0
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here():
    """To machine code, by the assembler that Triton brings, within the memory of a multiprocessor.

    In a process of its own: what is imported for the interpreter cannot be compiled.
    """
    base = {
        "HEADS": 4, "DIM": 128, "FORMAT": 0, "HAS_STEP": True, "HAS_START": False,
        "BLOCK_TOKENS": 64, "ROTATED": 0, "SIDES": 2, "SMOOTH_L1": False, "MEASURES": False,
        "BLOCK_T": 16, "BLOCK_D": 128,
    }  # fmt: skip
    per_token = {"BLOCK_TOKENS": 0, "SIDES": 1, "SMOOTH_L1": True, "MEASURES": True}
    int4 = {"FORMAT": 2, "HAS_START": True}
    wide = {"ROTATED": 8, "DIM": 256, "BLOCK_D": 256}
    cases = [
        ("i8", "fp16", "bf16", base),
        ("i8", "fp16", "fp32", base | per_token),
        ("u8", "fp16", "fp16", base | {"FORMAT": 1, "DIM": 96}),
        ("u8", "fp16", "bf16", base | int4),
        ("u8", "fp32", "bf16", base | per_token | int4 | {"ROTATED": 7}),
        ("u8", "fp32", "bf16", base | per_token | int4 | wide),
        ("bf16", "bf16", "bf16", base | {"HAS_STEP": False, "BLOCK_TOKENS": 0}),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE.format(cases=cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
