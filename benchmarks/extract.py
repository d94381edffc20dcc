"""Cost of extraction relative to the teacher's bare forward pass, measured in one run.

    python benchmarks/extract.py MODEL CORPUS.jsonl [--samples 64] [--dtype bfloat16]

Extraction includes tokenising, capture, quantisation, statistics, importance, compression,
checksums, fsync and publication. The bare forward pass is the base model over the same padded
batches, without head or cache, measured before and after each extraction so that drift cancels. CPU
time is reported too, as it is more stable on a shared machine. Target: 1.15 wall (int8, zarr).
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import parse_experiment
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.extract.tokenise import TeacherBatch, batch_by_tokens, collate_teacher_batch
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.extract_tasks import prepare_store
from kvdistill.store.reader import KVStore


def main() -> None:
    options = arguments()
    ratios = []
    with tempfile.TemporaryDirectory(prefix="kvdistill-bench-", dir=options.tmp) as folder:
        for i in range(options.rounds):
            ratios.append(one_round(experiment_of(options, Path(folder) / str(i))))
    print(f"median of {len(ratios)}: wall {median(ratios, 0):.3f}, CPU {median(ratios, 1):.3f}")


def one_round(experiment: Experiment) -> tuple[float, float]:
    """Bare forward, extraction, bare forward: ratios of wall and of CPU time."""
    store = prepare_store(experiment)
    teacher, _ = loaded(experiment)
    first, peak_bare = bare(teacher, store, experiment), peak_gib()
    del teacher
    gc.collect()
    began = time.process_time()
    (report,) = extract(experiment).teachers
    cpu, peak = time.process_time() - began, peak_gib()
    teacher, load_cpu = loaded(experiment)
    second = bare(teacher, store, experiment)
    wall_bare, cpu_bare = ((a + b) / 2 for a, b in zip(first, second, strict=True))
    wall, cpu = report.seconds / wall_bare, (cpu - load_cpu) / cpu_bare
    size = sum(p.stat().st_size for p in experiment.store.rglob("*") if p.is_file())
    print(
        f"{len(store.shard_ids)} shards, {report.tokens} tokens, {size / 2**20:.0f} MiB: forward "
        f"{wall_bare:.2f} s ({report.tokens / wall_bare:,.0f}/s), extract {report.seconds:.2f} s "
        f"({report.tokens / report.seconds:,.0f}/s), wall {wall:.3f}, CPU {cpu:.3f}; "
        f"peak {peak_bare:.2f} -> {peak:.2f} GiB",
        flush=True,
    )
    return wall, cpu


def loaded(experiment: Experiment) -> tuple[Teacher, float]:
    """The teacher, and the CPU seconds of loading and verifying it, which ``extract`` includes."""
    began = time.process_time()
    teacher = load_teacher("teacher", experiment)
    return teacher, time.process_time() - began


def bare(teacher: Teacher, store: KVStore, experiment: Experiment) -> tuple[float, float]:
    """Wall and CPU seconds of the forward passes alone, over the batches of the extraction."""
    batches: list[TeacherBatch] = []
    for shard_id in store.shard_ids:
        encoded = teacher.tokenise(store.samples(shard_id))
        lengths = [sample.num_tokens for sample in encoded]
        for chosen in batch_by_tokens(lengths, experiment.extraction.batch_tokens):
            batches.append(collate_teacher_batch(encoded, chosen, 0, teacher.device))
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        teacher.forward(batch)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_gib() -> float:
    """Peak memory so far, GiB: of the device if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def median(ratios: list[tuple[float, float]], which: int) -> float:
    return statistics.median(ratio[which] for ratio in ratios)


def experiment_of(options: argparse.Namespace, store: Path) -> Experiment:
    teacher: dict[str, Any] = {"model": str(options.model), "dtype": options.dtype}
    return parse_experiment(
        {
            "store": str(store),
            "corpus": {
                "path": str(options.corpus),
                "max_samples": options.samples,
                "shard_chars": options.shard_chars,
            },
            "teachers": {"teacher": teacher},
            "extraction": {"batch_tokens": options.batch_tokens, "backend": options.backend},
            "student": {"model": "unused"},
        }
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--shard-chars", type=int, default=10_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="zarr")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tmp", help="folder for the stores")
    return parser.parse_args()


if __name__ == "__main__":
    main()
