"""What a GPU computes and how fast: one command, a table, and a JSON with ``--out``.

    python benchmarks/device.py --out device.json          # one GPU, under 8 minutes, no network
    python benchmarks/device.py --tiny --device cpu        # every path in a minute, on a CPU

``checks``   the device against the CPU (``device_checks.py``; the same as ``pytest -m gpu``)
``extract``  stage 1 of a 7B teacher in bf16 against its bare forward pass over the same batches:
             tokens per second, share of the device's peak (MFU), where the rest goes
``train``    stage 2 of a 0.5B student with two and with three teachers, from a store of random
             codes, against the same student on cross-entropy alone
``fused``    the kernel that compares a student with stored codes against eager: time and memory

A part that fails is reported and does not end the others; the exit code is 1 then. Models have
random weights at real sizes. Needs torch, transformers, accelerate, safetensors, zarr, zarrs and
small pure packages; no matplotlib, scipy or tensorboard.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16, of the data sheets."""


@dataclass
class Kit:
    """Options, and what was found so far."""

    device: torch.device
    tiny: bool
    folder: Path
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def report(self, part: str, name: str, **figures: float | str) -> None:
        """Print a row of the table, and keep it."""
        self.rows.append({"part": part, "name": name, **figures})
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        print(f"{part:<8} {name:<34} {shown}", flush=True)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_left(self) -> float:
        """Seconds in which new runs may begin."""
        return self.deadline - time.monotonic()


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Stopwatch:
    """Device time inside a region, by events on its stream; wall time on a CPU."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._spans: list[tuple[Any, Any]] = []
        self.calls = 0
        self.wall = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Time what is inside."""
        began, start = time.perf_counter(), self._mark()
        try:
            yield
        finally:
            self._spans.append((start, self._mark()))
            self.calls += 1
            self.wall += time.perf_counter() - began

    def _mark(self) -> Any:
        if self._kit.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """Total over all calls."""
        self._kit.sync()
        if self._kit.device.type != "cuda":
            return sum(end - start for start, end in self._spans)
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3

    def wrapping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self():
                return function(*args, **kwargs)

        return timed


def machine(kit: Kit) -> None:
    """The ceilings: a large matrix product, copies on the device and from the host."""
    size, dtype = (8192, torch.bfloat16) if kit.device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(size, size, device=kit.device, dtype=dtype) for _ in range(2))
    product = 2 * size**3 / _median_seconds(kit, lambda: a @ b)
    big = torch.randn((1 << 28) if kit.device.type == "cuda" else 1 << 16, device=kit.device)
    other = torch.empty_like(big)
    copied = 2 * big.nbytes / _median_seconds(kit, lambda: other.copy_(big))
    pins = kit.device.type == "cuda"
    host = torch.empty(big.numel() // 4, pin_memory=pins)
    target = torch.empty_like(host, device=kit.device)
    to = host.nbytes / _median_seconds(kit, lambda: target.copy_(host, non_blocking=True))
    back = host.nbytes / _median_seconds(kit, lambda: host.copy_(target, non_blocking=True))
    name = torch.cuda.get_device_name(kit.device) if pins else platform.processor() or "CPU"
    kit.report(
        "machine", name, torch=torch.__version__, transformers=version("transformers"),
        python=platform.python_version(),
        matmul_tflops=product / 1e12, copy_gb_s=copied / 1e9, host_to_device_gb_s=to / 1e9,
        device_to_host_gb_s=back / 1e9, matmul_precision=torch.get_float32_matmul_precision(),
    )  # fmt: skip


def _median_seconds(kit: Kit, work: Callable[[], object], repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats + 2):
        watch = Stopwatch(kit)
        with watch():
            work()
        seconds.append(watch.seconds)
    return statistics.median(seconds[2:])


def checks(kit: Kit) -> None:
    """Correctness: the device against the CPU."""
    from benchmarks.device_checks import CHECKS, Inapplicable, Setting

    setting = Setting.make(kit.device, kit.folder / "checks")
    for name, check in CHECKS.items():
        began = time.monotonic()
        with _guarded(kit, "checks", name):
            try:
                found = check(setting)
            except Inapplicable as reason:
                kit.report("checks", name, result=f"not applicable: {reason}")
                continue
            worst = max(found, key=lambda key: found[key])
            seconds = time.monotonic() - began
            kit.report("checks", name, result="ok", largest=found[worst], of=worst, s=seconds)


@contextmanager
def _guarded(kit: Kit, part: str, name: str) -> Iterator[None]:
    """Report what a part or a row raises, and go on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        kit.report(part, name, result=f"FAILED: {type(error).__name__}: {str(error)[:300]}")
        if kit.device.type == "cuda":
            torch.cuda.empty_cache()


def extract(kit: Kit) -> None:
    """Stage 1: the bare forward pass, then extraction by codec, with and without importance."""
    from benchmarks.device_models import SHAPES, TINY, write_corpus, write_model, write_tokenizer
    from kvdistill.types import CodecName

    name = "Qwen2.5-7B"
    shape, work = (TINY if kit.tiny else SHAPES)[name], kit.folder / "extract"
    work.mkdir()
    write_tokenizer(work / "tokenizer")
    write_model(work / "model", shape, work / "tokenizer", weights=False)
    write_corpus(work / "corpus.jsonl", 24 if kit.tiny else 256, 60 if kit.tiny else 768)
    with _ready_teacher(kit, work / "model", shape) as load_seconds:
        bench = _Extraction(kit, work, shape)
        first = bench.bare()
        kit.report("extract", f"{name} set-up", **load_seconds)
        codecs = [c for c in ("int8", "bf16", "klt") if c in get_args(CodecName)]
        bench.run("int8, without importance", first, importance=False)
        for codec in codecs:
            if kit.time_left() > 0:
                with _guarded(kit, "extract", codec):
                    bench.run(codec, first, codec={"key": codec, "value": codec})
        bench.bare()


@contextmanager
def _ready_teacher(kit: Kit, folder: Path, shape: Any) -> Iterator[dict[str, float]]:
    """While inside, a teacher with random weights is loaded at once: made on the device, once."""
    from transformers import AutoConfig, AutoModel

    from kvdistill.extract import teacher as module

    dtype = torch.float32 if kit.device.type == "cpu" else torch.bfloat16
    began = time.monotonic()
    with kit.device:
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model = model.eval().requires_grad_(False)
    kit.sync()
    seconds = {"build_s": time.monotonic() - began}
    began = time.monotonic()
    fingerprint = module.weights_fingerprint(model)
    seconds["fingerprint_s"] = time.monotonic() - began
    seconds["parameters_b"] = sum(p.numel() for p in model.parameters()) / 1e9
    with (
        patch.object(module, "load_teacher_model", lambda *_, **__: (model, set())),
        patch.object(module, "weights_fingerprint", lambda *_, **__: fingerprint),
    ):
        yield seconds


class _Extraction:
    """Extractions of one teacher from one corpus."""

    def __init__(self, kit: Kit, work: Path, shape: Any) -> None:
        self.kit, self.work, self.shape = kit, work, shape
        self.flops = 0.0
        self.peak = next(
            (
                peak
                for name, peak in PEAK_FLOPS.items()
                if kit.device.type == "cuda" and name in torch.cuda.get_device_name(kit.device)
            ),
            None,
        )

    def experiment(self, name: str, **extraction: Any) -> Any:
        from kvdistill.config.load import parse_experiment

        tiny, cpu = self.kit.tiny, self.kit.device.type == "cpu"
        settings = {"batch_tokens": 512 if tiny else 16_384, "writers": 1 if tiny else 4}
        return parse_experiment(
            {
                "store": str(self.work / name),
                "corpus": {
                    "path": str(self.work / "corpus.jsonl"),
                    "shard_chars": 2000 if tiny else 180_000,
                },
                "teachers": {
                    "t": {
                        "model": str(self.work / "model"),
                        "dtype": "float32" if cpu else "bfloat16",
                    }
                },
                "extraction": {"device": str(self.kit.device), **settings, **extraction},
                "student": {"model": "unused"},
            }
        )

    def bare(self) -> float:
        """Seconds of the forward passes alone."""
        from kvdistill.extract.teacher import load_teacher
        from kvdistill.extract.tokenise import collate_teacher_batch
        from kvdistill.pipelines.extract_tasks import prepare_store

        experiment = self.experiment("bare")
        store, teacher = prepare_store(experiment), load_teacher("t", experiment)
        batches, lengths = [], []
        for shard_id in store.shard_ids:
            encoded = teacher.tokenise(store.samples(shard_id))
            counts = [sample.num_tokens for sample in encoded]
            lengths += counts
            for rows in teacher.batches(counts, experiment.extraction.batch_tokens):
                batches.append(collate_teacher_batch(encoded, rows, 0, teacher.device))
        teacher.forward(batches[0])
        self._reset_peak()
        self.kit.sync()
        began = time.perf_counter()
        for batch in batches:
            teacher.forward(batch)
        self.kit.sync()
        seconds = time.perf_counter() - began
        self.flops = self.shape.forward_flops(lengths, head=False)
        self.kit.report(
            "extract", "bare forward", tokens=sum(lengths), **self._rates(sum(lengths), seconds),
            **self._peak_memory(),
        )  # fmt: skip
        return seconds

    def run(self, name: str, bare: float, **extraction: Any) -> None:
        """One extraction through the pipeline: rate, and where time goes."""
        import shutil

        from kvdistill.extract.encode import BatchPacker
        from kvdistill.pipelines import extract as pipeline

        experiment = self.experiment(name.partition(",")[0] + f"-{len(extraction)}", **extraction)
        encode, place, write, read = (Stopwatch(self.kit) for _ in range(4))
        self._reset_peak()
        with ExitStack() as timed:
            for owner, function, watch in (
                (BatchPacker, "add", encode),
                (BatchPacker, "finish", place),
                (pipeline, "publish", write),
                (pipeline, "read_shard", read),
            ):
                original = getattr(owner, function)
                timed.enter_context(patch.object(owner, function, watch.wrapping(original)))
            (report,) = pipeline.extract(experiment).teachers
        size = sum(p.stat().st_size for p in experiment.store.rglob("*") if p.is_file())
        self.kit.report(
            "extract", name, **self._rates(report.tokens, report.seconds),
            of_bare=bare / report.seconds, reading_s=read.wall, encode_device_s=encode.seconds,
            place_s=place.wall, write_s=write.wall, gib=size / 2**30,
            bits_per_element=size * 8 / (report.tokens * self.shape.kv_elements()),
            **self._peak_memory(),
        )  # fmt: skip
        shutil.rmtree(experiment.store)

    def _rates(self, tokens: int, seconds: float) -> dict[str, float]:
        found = {"s": seconds, "tokens_per_s": tokens / seconds}
        found["tflops"] = self.flops / seconds / 1e12
        return found if self.peak is None else found | {"mfu": self.flops / seconds / self.peak}

    def _reset_peak(self) -> None:
        if self.kit.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.kit.device)

    def _peak_memory(self) -> dict[str, float]:
        if self.kit.device.type != "cuda":
            return {}
        return {"peak_gib": torch.cuda.max_memory_allocated(self.kit.device) / 2**30}


def train(kit: Kit) -> None:
    """Stage 2: cross-entropy alone, then two and three teachers, and the fixed projector."""
    from benchmarks.device_models import SHAPES, TINY, write_corpus, write_store, write_tokenizer

    shapes, work = TINY if kit.tiny else SHAPES, kit.folder / "train"
    names = ["Qwen2.5-7B", "Llama-3.2-1B", "SmolLM2-135M"]
    work.mkdir()
    write_tokenizer(work / "tokenizer")
    write_corpus(work / "corpus.jsonl", 24 if kit.tiny else 96, 40 if kit.tiny else 900)
    chars = 2000 if kit.tiny else 50_000
    began = time.monotonic()
    stored = {name: shapes[name] for name in names}
    write_store(work / "store", work / "corpus.jsonl", stored, chars)
    size = sum(p.stat().st_size for p in (work / "store").rglob("*") if p.is_file())
    kit.report("train", "store written", gib=size / 2**30, s=time.monotonic() - began)
    bench = _Training(kit, work, shapes["Qwen2.5-0.5B"].architecture, chars)
    alone = bench.run("cross-entropy alone", [], losses={"key": 0, "value": 0})
    bench.run("two teachers", names[:2], alone)
    bench.run("two teachers, unfused", names[:2], alone, training={"fused_kernels": False})
    bench.run("three teachers", names, alone)
    bench.run("two teachers, frozen", names[:2], alone, projection={"mode": "frozen"})
    bench.run("two teachers, joint", names[:2], alone, projection={"mode": "joint"})
    bench.run("cross-entropy alone", [], losses={"key": 0, "value": 0})


def fused(kit: Kit) -> None:
    """Error and gradients of one teacher and kind, fused and eager, by codec."""
    from benchmarks.device_checks import Inapplicable
    from benchmarks.device_fused import CODECS, FusedCase, peak_bytes, require_kernel
    from benchmarks.device_models import SHAPES, TINY

    try:
        require_kernel(kit.device)
    except Inapplicable as reason:
        kit.report("fused", "kernel", result=f"not applicable: {reason}")
        return
    name, shapes, on_gpu = "Qwen2.5-7B", TINY if kit.tiny else SHAPES, kit.device.type == "cuda"
    for how in CODECS:
        with _guarded(kit, "fused", f"{name}, {' '.join(how)}"):
            pair = shapes["Qwen2.5-0.5B"], shapes[name]
            case = FusedCase(kit.device, pair, (2, 24) if kit.tiny else (8, 1024), *how)
            found: dict[str, float | str] = {"difference": case.difference()}
            seconds, size = dict[str, float](), dict[str, int]()
            for way in ("eager", "fused"):
                work = partial(case.step, fused=way == "fused")
                seconds[way] = _median_seconds(kit, work, 9 if on_gpu else 1)
                found[f"{way}_ms"] = 1e3 * seconds[way]
                if on_gpu:
                    size[way] = peak_bytes(work)
                    found[f"{way}_mib"] = size[way] / 2**20
            found["times_faster"] = seconds["eager"] / seconds["fused"]
            found |= (
                {"of_memory": size["fused"] / size["eager"]} if on_gpu else {"by": "interpreter"}
            )
            kit.report("fused", f"{name}, {' '.join(how)}", **found)


class _Training:
    """Runs of one student from one store."""

    def __init__(self, kit: Kit, work: Path, architecture: dict[str, Any], chars: int) -> None:
        self.kit, self.work, self.architecture, self.chars = kit, work, architecture, chars

    def run(
        self, name: str, teachers: list[str], alone: float | None = None, **sections: Any
    ) -> float:
        """Seconds per step; 0 where it failed or no time is left."""
        if self.kit.time_left() <= 0:
            self.kit.report("train", name, result="not run: no time left")
            return 0.0
        seconds = 0.0
        with _guarded(self.kit, "train", name):
            figures = self._measured(name, teachers, **sections)
            seconds = figures["step_s"]
            if alone:
                figures["over_alone"] = seconds / alone - 1
            self.kit.report("train", name, **figures)
        return seconds

    def _measured(self, name: str, teachers: list[str], **sections: Any) -> dict[str, float]:
        from transformers import TrainerCallback

        from kvdistill.distill.distiller import Distiller
        from kvdistill.distill.train import trainer as module
        from kvdistill.pipelines.train import reset_peak_memory, resource_usage

        kit, warm = self.kit, 2 if self.kit.tiny else 5
        gc.collect()
        reset_peak_memory()
        waits, marks = list[float](), dict[int, float]()
        student, kv, moved = (Stopwatch(kit) for _ in range(3))

        class Marks(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step in (warm, state.max_steps):
                    kit.sync()
                    marks[state.global_step] = time.perf_counter()
                    marks[-state.global_step] = sum(waits)

        with ExitStack() as timed:
            for owner, function, watch in (
                (Distiller, "run_student", student),
                (Distiller, "_teacher_losses", kv),
                (module, "to_device", moved),
            ):
                original = getattr(owner, function)
                timed.enter_context(patch.object(owner, function, watch.wrapping(original)))
            trainer = self._trainer(name, teachers, **sections)
            trainer.add_callback(Marks())
            get = trainer.get_batch_samples
            trainer.get_batch_samples = lambda it, n, d: get(_timed(it, waits), n, d)
            trainer.train()
        steps = trainer.state.max_steps
        total = marks[steps] - marks[warm]
        found = {
            "step_s": total / (steps - warm),
            "waiting_share": (marks[-steps] - marks[-warm]) / total,
            "student_forward_s": student.seconds / steps,
            "teachers_forward_s": kv.seconds / max(kv.calls, 1),
            "to_device_s": moved.seconds / steps,
            "loss": trainer.state.log_history[0].get("loss", float("nan")),
            **{
                key.replace("bytes", "gib"): value / 2**30
                for key, value in resource_usage().items()
            },
        }
        trainer.close()
        return found

    def _trainer(self, name: str, teachers: list[str], **sections: Any) -> Any:
        from benchmarks.device_checks import trainer_of
        from kvdistill.config.load import parse_experiment

        tiny, cpu = self.kit.tiny, self.kit.device.type == "cpu"
        experiment = parse_experiment(
            {
                "name": name.replace(" ", "-").replace(",", ""),
                "store": str(self.work / "store"),
                "output_dir": str(self.work / "runs"),
                "corpus": {
                    "path": str(self.work / "corpus.jsonl"), "shard_chars": self.chars,
                },
                "teachers": {teacher: {"model": teacher} for teacher in teachers},
                "student": {
                    "tokenizer": str(self.work / "tokenizer"), "architecture": self.architecture,
                },
                "training": {
                    "batch_size": 4 if tiny else 8, "max_length": 64 if tiny else 1024,
                    "max_steps": 5 if tiny else 25, "learning_rate": 1e-4, "log_steps": 5,
                    "precision": "float32" if cpu else "bfloat16", "diagnostic_steps": 1000,
                    "prefetch_threads": 2 if tiny else 6, "prefetch_steps": 2 if tiny else 4,
                    "device": "cpu" if cpu else "auto", **sections.pop("training", {}),
                },
                **sections,
            }
        )  # fmt: skip
        return trainer_of(experiment, self.kit.device)


def _timed(iterator: Any, seconds: list[float]) -> Iterator[Any]:
    """The iterator; appends how long each item was waited for."""
    while True:
        began = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            seconds.append(time.perf_counter() - began)
        yield item


PARTS = {"machine": machine, "checks": checks, "extract": extract, "train": train, "fused": fused}


def main() -> int:
    options = _arguments()
    device = torch.device(options.device)
    if device.type == "cpu":  # before Triton is imported, which compiles for GPUs alone
        os.environ["TRITON_INTERPRET"] = "1"
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvdistill-device-", dir=options.folder) as folder:
        kit = Kit(device, options.tiny, Path(folder), began + options.seconds)
        for part in options.parts:
            with _guarded(kit, part, "whole part"):
                PARTS[part](kit)
                kit.sync()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if options.out is not None:  # after every part: a later one may be cut off
                options.out.write_text(json.dumps(kit.rows, indent=1), encoding="utf-8")
    failed = [row for row in kit.rows if str(row.get("result", "")).startswith("FAILED")]
    print(f"{time.monotonic() - began:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="all paths at toy sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--folder", help="parent of the scratch folder: 30 GB, fast")
    parser.add_argument("--seconds", type=float, default=420, help="begin no new run after these")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
