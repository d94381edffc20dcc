"""Checks that a device computes what the CPU does: ``tests/gpu`` and ``benchmarks/device.py``.

Every check takes a ``Setting`` and returns figures by name. An ``AssertionError`` says which figure
is out of bounds; ``Inapplicable`` that the device has nothing to check.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.device_models import TINY, write_corpus, write_model, write_store, write_tokenizer
from kvdistill.types import KINDS

Figures = dict[str, float]

TEACHERS: Final = {"seven": TINY["Qwen2.5-7B"], "one": TINY["Llama-3.2-1B"]}
MODES: Final[dict[str, dict[str, Any]]] = {
    "student_to_teacher": {"losses": {"cosine": 0.5, "relation": 0.5}},
    "frozen": {
        "projection": {"mode": "frozen"},
        "losses": {"inject": 1, "attention_kl": 1},
        "fusion": {"method": "mlp", "granularity": "layer"},
    },
    "joint": {"projection": {"mode": "joint"}},
    "shared_space": {
        "projection": {"mode": "shared_space"},
        "losses": {"inject": 1, "round_trip": 1},
    },
}


class Inapplicable(Exception):
    """Why a check has nothing to do on this device."""


@dataclass(frozen=True)
class Setting:
    """A device, and a folder with a corpus, a tokenizer, a teacher's weights and a store."""

    device: torch.device
    folder: Path

    @staticmethod
    def make(device: torch.device, folder: Path) -> Setting:
        """Write the files."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder / "tokenizer")
        write_corpus(folder / "corpus.jsonl", 16, 40)
        write_model(folder / "model", TINY["Qwen2.5-7B"], folder / "tokenizer", weights=True)
        write_store(folder / "store", folder / "corpus.jsonl", TEACHERS, 2000)
        return Setting(device, folder)

    def experiment(self, name: str, **sections: Any) -> Any:
        """A run of a tiny student with both teachers; what is given wins."""
        from kvdistill.config.load import parse_experiment

        base: dict[str, Any] = {
            "training": {
                "batch_size": 4, "max_length": 64, "max_steps": 6, "log_steps": 1,
                "learning_rate": 1e-2, "schedule": "constant",
                "device": "cpu" if self.device.type == "cpu" else "auto",
            },
            "extraction": {
                "device": "cpu" if self.device.type == "cpu" else "auto", "batch_tokens": 256,
            },
            "corpus": {"path": str(self.folder / "corpus.jsonl"), "shard_chars": 2000},
            "student": {
                "tokenizer": str(self.folder / "tokenizer"),
                "architecture": TINY["Qwen2.5-0.5B"].architecture,
            },
        }  # fmt: skip
        body: dict[str, Any] = {
            "name": name,
            "store": str(self.folder / "store"),
            "output_dir": str(self.folder / "runs"),
            "teachers": {teacher: {"model": teacher} for teacher in TEACHERS},
        }
        for section in base.keys() | sections.keys():
            given = sections.get(section, {})
            body[section] = {**base.get(section, {}), **given} if section != "teachers" else given
        return parse_experiment(body)


def relative(found: Tensor, expected: Tensor) -> float:
    """``|found − expected| / |expected|``, infinite where anything is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return float("inf") if math.isnan(error) else error


def require(name: str, value: float, bound: float) -> float:
    """``value``, which must not exceed ``bound``."""
    assert value <= bound, f"{name}: {value:.2e} exceeds {bound:.0e}"
    return value


def codecs(setting: Setting) -> Figures:
    """Codes within one step of the CPU's, and equal values of equal codes."""
    from kvdistill.store.codecs import CODECS

    generator, found = torch.Generator().manual_seed(0), Figures()
    x = torch.randn(4, 3, 200, 64, generator=generator) * (1 + torch.arange(64) % 7)
    for name, codec in (CODECS | {"klt": _fitted(x)}).items():
        for kind in KINDS:
            here = codec.encode(x, kind)
            there = codec.encode(x.to(setting.device), kind)
            plain: Any = codec.decode(here, kind)
            moved: Any = codec.decode({k: p.to(setting.device) for k, p in here.items()}, kind)
            require(f"{name} {kind}: decoded", float((moved.cpu() - plain).abs().max()), 0)
            decoded: Any = codec.decode({k: part.cpu() for k, part in there.items()}, kind)
            step = 2.01 * float((plain - x).abs().max())
            worst = float((decoded - plain).abs().max())
            require(f"{name} {kind}: codes, in steps", worst / max(step, 1e-30), 1)
            unequal = float((here[""].float() != there[""].cpu().float()).float().mean())
            found[f"{name} {kind}: unequal codes"] = unequal
    return found


def _fitted(x_LHTD: Tensor) -> Any:
    """The codec klt with one block of all layers, at two bits an element."""
    from kvdistill.store.codecs.klt import Transform, fit_basis, flatten_layers
    from kvdistill.types import LayerGroup

    num_layers, num_heads, _, dim = x_LHTD.shape
    layers, flat = tuple(range(num_layers)), flatten_layers(x_LHTD)
    num_bytes = flat.shape[-1] // 4
    basis = fit_basis(flat, torch.ones(flat.shape[-1]), num_bytes)
    group = LayerGroup(layers, num_heads, dim, dim)
    return Transform(group, num_bytes, ((layers, basis),), layers)


def captured(setting: Setting) -> Figures:
    """Keys and values of a teacher: float32 against the CPU's, others against float32."""
    cpu = _read(Setting(torch.device("cpu"), setting.folder), "float32")
    found = Figures()
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 2e-2), ("auto", 2e-2)):
        read = _read(setting, dtype)
        for kind, x in read.items():
            found[f"{dtype} {kind}"] = require(f"{dtype} {kind}", relative(x, cpu[kind]), bound)
    return found


def _teacher(setting: Setting, dtype: str, **extraction: Any) -> Any:
    from kvdistill.extract.teacher import load_teacher

    teachers = {"t": {"model": str(setting.folder / "model"), "dtype": dtype}}
    return load_teacher("t", setting.experiment("x", teachers=teachers, extraction=extraction))


def _read(setting: Setting, dtype: str) -> dict[str, Tensor]:
    from kvdistill.corpus.readers import load_corpus
    from kvdistill.extract.tokenise import collate_teacher_batch

    teacher = _teacher(setting, dtype)
    samples = load_corpus(setting.experiment("x").corpus).train[:4]
    tokenised = teacher.tokenise(samples)
    batch = collate_teacher_batch(tokenised, range(len(samples)), teacher.pad_id, teacher.device)
    rows: list[Any] = []
    teacher.run(batch, lambda _, qkv: rows.append((qkv.key.clone(), qkv.value.clone())))
    mask = batch.real_mask.to(setting.device)[:, None, :, None]
    parts = zip(KINDS, zip(*rows, strict=True), strict=True)
    return {kind: (torch.stack(xs).float() * mask).cpu() for kind, xs in parts}


def extraction(setting: Setting) -> Figures:
    """Stored shards of a device against the CPU's: decoded values, importance and statistics."""
    cpu = _stored(Setting(torch.device("cpu"), setting.folder), "cpu")
    there, found = _stored(setting, "there"), Figures()
    for name, x in cpu.items():
        found[name] = require(name, relative(there[name], x), 5e-3)
    return found


def _stored(setting: Setting, name: str) -> dict[str, Tensor]:
    from kvdistill.corpus.readers import load_corpus
    from kvdistill.extract.extract_shard import extract_samples
    from kvdistill.store.codecs import CODECS
    from kvdistill.store.codecs.parts import part_name
    from kvdistill.store.shard import BLOCK_TOKENS, EncodedShard, block_ptr

    teacher = _teacher(setting, "float32", confidence=True, logits=4, summaries=True)
    samples = load_corpus(setting.experiment(name).corpus).train
    done = extract_samples(teacher, samples, batch_tokens=256)
    shard: EncodedShard = done.shard
    ptr = shard.tokens.sample_ptr
    spans = zip(block_ptr(ptr).tolist(), (ptr[1:] - ptr[:-1]).tolist(), strict=False)
    block_idx = torch.cat([first + torch.arange(n) // BLOCK_TOKENS for first, n in spans])
    found: dict[str, Tensor] = {}
    for kind in KINDS:
        codec = CODECS["int8"]
        parts = {
            part.suffix: torch.from_numpy(shard.arrays[part_name(kind, part.suffix)])
            for part in codec.parts(kind)
        }
        decoded: Any = codec.decode(parts, kind, block_idx)
        found[kind] = decoded
        found[f"{kind} variance"] = torch.from_numpy(done.statistics[kind].variance)
    for other in ("importance", "nll", "hidden_summary"):
        x = torch.from_numpy(shard.arrays[other].astype("float32"))
        found[other] = x[x.isfinite()]  # a sample's first token has no likelihood
    return found


def losses(setting: Setting, mode: str) -> Figures:
    """Losses and gradients of a student in one projection mode, float32, against the CPU's."""
    found, run = Figures(), _assembled(setting, mode, **MODES[mode])
    batch = next(iter(run.stream))
    expected = _step(copy.deepcopy(run.distiller), batch, torch.device("cpu"))
    got = _step(run.distiller, batch, setting.device)
    for name, value in expected.items():
        bound = 1e-3 if name.startswith("gradient") else 1e-4
        found[name] = require(name, relative(got[name], value), bound)
    return found


def _assembled(setting: Setting, name: str, **sections: Any) -> Any:
    return assembled(setting.experiment(name, **sections), setting.device)


def assembled(experiment: Any, device: torch.device) -> Any:
    """Distiller, stream and tokenizer of a run."""
    from transformers import set_seed

    from kvdistill.corpus.readers import load_corpus
    from kvdistill.distill.data.stream import Rank
    from kvdistill.distill.train.set_up import assemble
    from kvdistill.store.reader import KVStore

    set_seed(0)
    store, samples = KVStore.open(experiment.store), load_corpus(experiment.corpus).train
    run = assemble(experiment, store, samples, Rank(), device=device)
    if experiment.training.gradient_checkpointing:
        run.distiller.capture.checkpoint_activations()
    if experiment.training.compile:
        run.distiller.capture.compile_layers()
    return run


def _step(distiller: Any, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    from kvdistill.distill.train.devices import Staging, to_device

    distiller = distiller.to(device).train()
    there = to_device(Staging(distiller.count, device)(dict(batch)), device)
    torch.manual_seed(0)
    result = distiller(there)
    result["loss"].backward()
    parts = {name: part.detach() for name, part in result["parts"].items()}
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in distiller.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(name.split(".")[0], []).append(parameter.grad.flatten().cpu())
    return parts | {f"gradient of {name}": torch.cat(xs) for name, xs in groups.items()}


def fused(setting: Setting) -> Figures:
    """Losses and gradients of the fused kernel against eager ones on the CPU, float32."""
    from benchmarks.device_fused import require_kernel
    from kvdistill.distill.targets import TeacherHead

    require_kernel(setting.device)
    found, run = Figures(), _assembled(setting, "fused")
    batch = next(iter(run.stream))
    expected, got = (
        _step(_with_kernel(copy.deepcopy(run.distiller), TeacherHead, used), batch, device)
        for used, device in ((False, torch.device("cpu")), (True, setting.device))
    )
    for name, value in expected.items():
        bound = 1e-3 if name.startswith("gradient") else 1e-4
        found[name] = require(name, relative(got[name], value), bound)
    return found


def _with_kernel(distiller: Any, kind: type, used: bool) -> Any:
    heads = [module for module in distiller.modules() if isinstance(module, kind)]
    for head in heads:
        head.is_fused = used
    return distiller


def transfer(setting: Setting) -> Figures:
    """A batch in page-locked memory arrives whole and, on a GPU, as one copy."""
    from kvdistill.distill.train.devices import OpaqueMapping, StagedBatch, Staging, to_device

    run = _assembled(setting, "transfer")
    batch = next(iter(run.stream))
    staged = Staging(run.distiller.count, setting.device)(batch)
    if isinstance(staged, StagedBatch):
        assert staged.buffer.is_pinned()
    arrived = to_device(staged, setting.device)
    compared: list[bool] = []

    def compare(here: Any, there: Any) -> None:
        if isinstance(here, Mapping):
            for name, x in here.items():
                compare(x, there[name])
        elif isinstance(here, Tensor):
            assert there.device.type == setting.device.type
            compared.append(torch.equal(here, there.cpu()))

    assert isinstance(arrived, OpaqueMapping)
    compare(batch, arrived)
    assert all(compared)
    return {"tensors": float(len(compared))}


VARIANTS: Final[dict[str, tuple[dict[str, Any], float]]] = {
    "auto": ({"precision": "auto"}, 5e-2),
    "bfloat16": ({"precision": "bfloat16"}, 5e-2),
    "float16": ({"precision": "float16"}, 0.9),
    "checkpointed": ({"gradient_checkpointing": True}, 1e-4),
    "accumulated": ({"batch_size": 2, "gradient_accumulation_steps": 2}, 1e-3),
    "compiled": ({"compile": True}, 1e-2),
}
"""Settings of training, and how far losses may be from those in float32, relative to how far these
move. The loss scaler of float16 may skip the first step or two."""


def training(setting: Setting, name: str) -> Figures:
    """Six steps of the trainer against six in float32, whose loss must fall."""
    if setting.device.type != "cuda" and name in ("float16", "compiled"):
        raise Inapplicable("needs CUDA: a CPU has no loss scaler, and takes a minute to compile")
    changes, bound = VARIANTS[name]
    plain = torch.tensor(_losses_of(setting, "float32", {"precision": "float32"}))
    assert len(plain) == 6
    assert plain[-1] < plain[0]
    found = torch.tensor(_losses_of(setting, name, {"precision": "float32", **changes}))
    assert found[-1] < found[0]
    return {name: require(name, relative(found - plain[0], plain - plain[0]), bound)}


def verified(setting: Setting) -> Figures:
    """A student that is verified on the device leaves the device's random state as it was."""
    from kvdistill.attention.kv_capture import verify_student

    student, drawn = _assembled(setting, "verified").distiller.student.to(setting.device), []

    def draw(*_: object) -> None:
        torch.rand(8, device=setting.device)

    student.get_input_embeddings().register_forward_hook(draw)
    for verify in (lambda _: None, verify_student):
        torch.manual_seed(0)
        verify(student)
        drawn.append(torch.rand(8, device=setting.device))
    return {"draws": require("draws", relative(*drawn), 0)}


def _losses_of(setting: Setting, name: str, training: dict[str, Any]) -> list[float]:
    trainer = trainer_of(setting.experiment(name, training=training), setting.device)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trainer_of(experiment: Any, device: torch.device) -> Any:
    """The trainer of a run, without callbacks and held-out samples."""
    from kvdistill.distill.train.set_up import training_arguments
    from kvdistill.distill.train.trainer import KVDistillTrainer

    run = assembled(experiment, device)
    return KVDistillTrainer(
        run.distiller,
        stream=run.stream,
        tokenizer=run.tokenizer,
        experiment=experiment,
        arguments=training_arguments(experiment, experiment.output_dir / experiment.name, False),
        evaluation=(),
        callbacks=[],
    )


def out_of_memory(setting: Setting) -> Figures:
    """A batch that exceeds the device's memory is halved, and its codes stay the same."""
    if setting.device.type != "cuda":
        raise Inapplicable("needs CUDA: memory is limited by its allocator")
    from kvdistill.corpus.readers import load_corpus
    from kvdistill.extract import extract_shard

    teacher = _teacher(setting, "float32")
    samples = load_corpus(setting.experiment("x").corpus).train * 64
    read = partial(extract_shard.extract_samples, teacher, samples, batch_tokens=1 << 30)
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(setting.device)
    expected = read()
    whole = torch.cuda.memory_reserved(setting.device)
    torch.cuda.empty_cache()
    limit = before + 0.6 * (whole - before)
    torch.cuda.set_per_process_memory_fraction(limit / total, setting.device)
    batches: list[int] = []
    run = type(teacher).run

    def counted(teacher: Any, batch: Any, on_layer: Any) -> Tensor:
        batches.append(len(batch.lengths))
        return run(teacher, batch, on_layer)

    try:
        with patch.object(type(teacher), "run", counted):
            found = read()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    assert len(batches) > 1, f"{whole - before} bytes fit into {limit - before:.0f}"
    for name, array in expected.shard.arrays.items():
        step = 1 if array.dtype.kind in "iu" else 1e-2
        worst = abs(array.astype("float32") - found.shard.arrays[name].astype("float32")).max()
        require(name, float(worst), step)
    return {"passes": float(len(batches)), "whole MiB": (whole - before) / 2**20}


CHECKS: Final[dict[str, Callable[[Setting], Figures]]] = {
    "codecs": codecs,
    "capture": captured,
    "extraction": extraction,
    **{f"losses, {mode}": partial(losses, mode=mode) for mode in MODES},
    "verified": verified,
    "fused": fused,
    "transfer": transfer,
    **{f"training, {name}": partial(training, name=name) for name in VARIANTS},
    "out of memory": out_of_memory,
}
