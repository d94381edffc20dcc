"""Speed and size of stores, as ratios measured in one run on one machine.

    python benchmarks/store.py --kv kv.pt            # real keys and values
    python benchmarks/store.py                       # synthetic ones of SmolLM2's shape
    python benchmarks/store.py --against ../before   # ratios to another checkout of kvdistill

``--kv`` is a file of ``torch.save({"key": [...], "value": [...]})``, one ``[L, H, T, D]`` per
sample. Speeds are elements of K and V per second, so that codecs are comparable; every figure is
the best of interleaved rounds, since other load can only slow a round down. ``--clock cpu`` counts
CPU seconds of all threads instead of wall time. Files are in the page cache. The file system
matters (``--folder``): a mapped file in tmpfs page-faults every few pages, one on ext4 hardly ever.
Each checkout reads stores that it has converted itself, in a process of its own
(``store_reads.py``).

    1 thread    shard after shard, checksums verified in every round. The targets apply to this row:
                torch.load and the copies run in one thread as well. zarr decodes on all cores
    2 threads   the same through ``prefetch``
    .pt         one file per sample, bf16, ``torch.load``; as many in memory as a shard has samples
    copy        ``array.copy()`` of the stored arrays: the minimum for a reader that owns its result
    into        the same bytes copied into memory that is already mapped
    zarr-python, zarrs   the same zarr files, read with these libraries; both use all cores
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from store_reads import CLOCKS, touch

from kvdistill.corpus.samples import Sample, Shard
from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.codecs import CODECS, codec_of
from kvdistill.store.codecs.klt import Basis, layer_blocks
from kvdistill.store.codecs.parts import part_name, parts_of
from kvdistill.store.derived import blocks_of, published_bases
from kvdistill.store.format import StorePaths
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard, TokenTable, block_idx
from kvdistill.store.writer import add_teacher, create, publish_shard
from kvdistill.types import KINDS, Kind, LayerGroup

Samples = dict[Kind, list[torch.Tensor]]
Tasks = dict[str, tuple[Callable[[], float], int]]

CODEC_NAMES = ("bf16", "int8", "int4", "klt")
PLAIN = "zarr.core.codec_pipeline.BatchedCodecPipeline"
ZARRS = "zarrs.ZarrsCodecPipeline"
NUM_SHARDS = 4


def synthetic(num_samples: int) -> Samples:
    """Random KV with SmolLM2's shape, GSM8K's lengths and channels of unequal scale."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(80, 320, (num_samples,), generator=rng).tolist()
    size = torch.rand(30, 3, 1, 64, generator=rng).exp() * 2
    return {
        kind: [torch.randn(30, 3, n, 64, generator=rng) * size for n in lengths] for kind in KINDS
    }


def make_store(root: Path, samples: Samples) -> tuple[KVStore, dict[str, float]]:
    """A store with one teacher per codec, and the seconds to publish all shards, by codec."""
    ids = [f"s{i}" for i in range(len(samples["key"]))]
    cuts = np.array_split(np.arange(len(ids)), NUM_SHARDS)
    text = {i: Sample(i, (("text", "x" * 4000),)) for i in ids}
    shards = [
        Shard(f"{n:05d}", int(cut[0]), tuple(text[ids[i]] for i in cut))
        for n, cut in enumerate(cuts)
    ]
    store = create(root, shards)
    seconds = {}
    for codec in CODEC_NAMES:
        manifest = teacher(codec, samples)
        if manifest.codec.transforms:
            checksum = published_bases(store.place, codec, "benchmark", partial(bases, manifest))
            manifest = manifest.model_copy(update={"transform": checksum})
        add_teacher(store, manifest)
        encoded = [encode(store, codec, samples, cut.tolist(), ids) for cut in cuts]
        started = time.perf_counter()
        for shard, (one, stats) in zip(shards, encoded, strict=True):
            publish_shard(store, codec, shard.shard_id, one, stats)
        seconds[codec] = time.perf_counter() - started
    return store, seconds


def teacher(codec: str, samples: Samples) -> TeacherManifest:
    num_layers, num_heads, _, dim = samples["key"][0].shape
    return TeacherManifest.model_validate(
        {
            "name": codec,
            "model": "benchmark",
            "revision": None,
            "model_type": "llama",
            "kind": "decoder",
            "weights_fingerprint": "0",
            "tokenizer_fingerprint": "0",
            "template": None,
            "extraction_fingerprint": "0",
            "versions": {},
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "backend": "zarr",
            "codec": {"key": codec, "value": codec},
            "groups": (LayerGroup(tuple(range(num_layers)), num_heads, dim, dim),),
            "position_encoding": "none",
            "hidden_size": 8,
            "adapter": "benchmark",
            "adapter_error": 0.0,
        }
    )


def bases(manifest: TeacherManifest) -> dict[str, Basis]:
    """Bases of codec klt with as many components as real ones, which speed depends on: random."""
    found, rng = {}, np.random.default_rng(0)
    for stem, layout in blocks_of(manifest).items():
        width = layout.group.num_key_value_heads * layout.group.head_dim(KINDS[stem == "value"])
        for i, layers in enumerate(layer_blocks(layout.layers, manifest.codec.block_layers)):
            bits = np.repeat(np.array([5, 4, 3, 2, 1], np.uint8), layout.num_bytes // 15 * 8)
            basis = rng.integers(-99, 99, (len(bits), len(layers) * width), np.int16)
            mean = np.zeros(basis.shape[1], np.float32)
            found[f"{stem}.{i}"] = Basis(mean, mean + 1, basis, mean[:1] + 1e-3, bits)
    return found


def encode(
    store: KVStore, name: str, samples: Samples, chosen: list[int], ids: list[str]
) -> tuple[EncodedShard, dict[str, ChannelStatistics]]:
    ptr = np.cumsum([0] + [samples["key"][i].shape[2] for i in chosen]).astype(np.int64)
    column = np.zeros(int(ptr[-1]), np.int32)
    tokens = TokenTable(
        tuple(ids[i] for i in chosen), ptr, column, column, column, column.astype(np.int8)
    )
    arrays, stats = {}, {}
    for kind in KINDS:
        codec = codec_of(store.teacher(name).codec, kind, store.transforms(name))
        encoded = [codec.encode(samples[kind][i], kind) for i in chosen]
        for part in codec.parts(kind):
            pieces = [parts[part.suffix].numpy() for parts in encoded]
            arrays[part_name(kind, part.suffix)] = np.concatenate(pieces, axis=2)
        num_layers, num_heads, _, dim = samples[kind][0].shape
        stats[kind] = ChannelStatistics(0, *np.zeros((2, num_layers, num_heads, dim)))
    return EncodedShard(tokens, arrays), stats


class Checkout:
    """A process that reads stores with the kvdistill of one checkout."""

    def __init__(self, path: Path, zarr_store: Path, stores: Path) -> None:
        self.environment = {**os.environ, "PYTHONPATH": str(path.resolve())}
        self.stores = {name: stores / name for name in ("safetensors", "zarr")}
        source = zarr_store
        for backend, target in self.stores.items():
            command = ["convert", str(source), str(target), "--to", backend]
            run = [sys.executable, "-P", "-m", "kvdistill.cli", *command]
            subprocess.run(run, env=self.environment, check=True, capture_output=True)
            source = target
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("store_reads.py"))],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def task(self, backend: str, **arguments: Any) -> Callable[[], float]:
        """A function that has the process read once and returns the seconds it took."""
        line = json.dumps({"store": str(self.stores[backend]), "clock": clock_name, **arguments})

        def work() -> float:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(line, file=self.process.stdin, flush=True)
            return float(self.process.stdout.readline())

        return work


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        clock = CLOCKS[clock_name]
        started = clock()
        work()
        return clock() - started

    return run


def through_zarr(store: KVStore, codec: str, pipeline: str) -> None:
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        for shard_id in store.shard_ids:
            group = zarr.open_group(store.paths.shard(codec, shard_id), mode="r")
            for kind in KINDS:
                for part in CODECS[codec].parts(kind):
                    touch(group[part_name(kind, part.suffix)][...])


def pt_files(folder: Path, chosen: list[int]) -> None:
    """Load one file after the other; as many in memory as a shard has samples."""
    for some in np.array_split(chosen, NUM_SHARDS):
        held = [torch.load(folder / f"{i}.pt") for i in some.tolist()]
        for tensors in held:
            for tensor in tensors.values():
                touch(tensor.view(torch.uint16).numpy())


clock_name = "wall"


def rates(tasks: Tasks, rounds: int) -> dict[str, float]:
    """Best elements per second of every task, over interleaved rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, (work, _) in tasks.items():
            seconds[name].append(work())
    return {name: tasks[name][1] / min(times) for name, times in seconds.items()}


def reading(root: Path, samples: Samples, rounds: int, against: Path | None) -> None:
    elements = sum(x.numel() for kind in KINDS for x in samples[kind])
    store, written = make_store(root / "written", samples)
    here = Checkout(Path(__file__).parents[1], store.paths.root, root / "here")
    there = against and Checkout(against, store.paths.root, root / "there")
    (root / "pt").mkdir()
    for i in range(len(samples["key"])):
        one = {kind: samples[kind][i].bfloat16().clone() for kind in KINDS}
        torch.save(one, root / "pt" / f"{i}.pt")
    every = list(range(len(samples["key"])))
    tasks = {".pt": (timed(lambda: pt_files(root / "pt", every)), elements)}
    tasks |= copy_tasks(store, elements)
    for codec, backend, threads in product(CODEC_NAMES, here.stores, (1, 2)):
        name = f"{codec} {backend} {threads}"
        tasks[name] = here.task(backend, codec=codec, threads=threads), elements
        if there:
            tasks[f"{name} there"] = there.task(backend, codec=codec, threads=threads), elements
    print_order(rates(tasks, rounds))
    random_access(here, there, samples, root, rounds)
    decoding(store, rounds)
    sizes(here, written, elements)


def copy_tasks(store: KVStore, elements: int) -> Tasks:
    """Copies of all stored arrays, and other readers of the same files."""
    tasks: Tasks = {}
    for codec in CODEC_NAMES:
        source = [
            array
            for shard_id in store.shard_ids
            for array in store.read_shard(codec, shard_id).arrays.values()
        ]
        target = [array.copy() for array in source]
        for name, work in {
            "copy": lambda s=source: [array.copy() for array in s],
            "into": lambda s=source, t=target: copy_into(s, t),
            "zarr-python": lambda c=codec: through_zarr(store, c, PLAIN),
            "zarrs": lambda c=codec: through_zarr(store, c, ZARRS),
        }.items():
            tasks[f"{codec} {name}"] = timed(work), elements
    return tasks


def print_order(speed: dict[str, float]) -> None:
    print("\nsequential reads, millions of elements of K and V per second, warm")
    print(f"  .pt per sample, bf16 {speed['.pt'] / 1e6:8,.0f}")
    for codec in CODEC_NAMES:
        own = {name: speed[f"{codec} {name}"] for name in ("zarr-python", "zarrs", "copy", "into")}
        print(f"  {codec}: " + ", ".join(f"{n} {rate / 1e6:,.0f}" for n, rate in own.items()))
        for backend, threads in product(("zarr", "safetensors"), (1, 2)):
            name = f"{codec} {backend} {threads}"
            rate = speed[name]
            others = ("zarr-python", "zarrs") if backend == "zarr" else ("copy", "into")
            ratios = [f"{rate / own[other]:5.2f} × {other}" for other in others]
            print(
                f"    {backend:11} {threads} thread(s) {rate / 1e6:8,.0f} = "
                + " = ".join([*ratios, f"{rate / speed['.pt']:4.2f} × .pt", *before(speed, name)])
            )


def before(speed: dict[str, float], name: str) -> list[str]:
    there = speed.get(f"{name} there")
    return [] if there is None else [f"{speed[name] / there:4.2f} × before"]


def copy_into(source: list[np.ndarray], target: list[np.ndarray]) -> None:
    for a, b in zip(source, target, strict=True):
        np.copyto(b, a)


def random_access(
    here: Checkout, there: Checkout | None, samples: Samples, root: Path, rounds: int
) -> None:
    """8 samples × 8 layers, all heads, decoded to float32."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(samples["key"]), 8, replace=False).tolist()
    num_layers, num_heads, _, dim = samples["key"][0].shape
    layers = sorted(rng.choice(num_layers, min(8, num_layers), replace=False).tolist())
    ids = [f"s{i}" for i in chosen]
    tokens = sum(samples["key"][i].shape[2] for i in chosen)
    useful = tokens * len(layers) * num_heads * dim * 2
    tasks: Tasks = {".pt": (timed(lambda: pt_files(root / "pt", chosen)), useful)}
    for codec, backend, each in product(CODEC_NAMES, ("zarr", "safetensors"), (False, True)):
        name = f"{codec} {backend}{', a call per head' if each else ''}"
        arguments = {"codec": codec, "sample_ids": ids, "layers": layers, "one_by_one": each}
        tasks[name] = here.task(backend, **arguments), useful
        if there:
            tasks[f"{name} there"] = there.task(backend, **arguments), useful
    speed = rates(tasks, rounds)
    print("\nrandom access: 8 samples × 8 layers, requested elements per second, warm")
    for name in (name for name in speed if not name.endswith("there")):
        ratios = [f"{speed[name] / speed['.pt']:4.2f} × .pt", *before(speed, name)]
        print(f"  {name:34} {speed[name] / 1e6:8,.0f} M/s = " + " = ".join(ratios))


def decoding(store: KVStore, rounds: int) -> None:
    """One shard from codes to float32, on one core of the CPU."""
    shard_id, tasks = store.shard_ids[0], dict[str, tuple[Callable[[], float], int]]()
    for name in CODEC_NAMES:
        spec, transforms = store.teacher(name).codec, store.transforms(name)
        shard = store.read_shard(name, shard_id)
        blocks = torch.from_numpy(block_idx(shard.tokens.sample_ptr))
        first = torch.from_numpy(shard.tokens.sample_ptr[:-1])
        arrays = {n: torch.from_numpy(x) for n, x in shard.arrays.items()}

        def work(
            spec=spec, transforms=transforms, arrays=arrays, blocks=blocks, first=first
        ) -> None:
            for kind in KINDS:
                parts = {**parts_of(arrays, kind), "first": first}
                codec_of(spec, kind, transforms).decode(parts, kind, blocks)

        (group,) = store.teacher(name).groups
        width = group.num_key_value_heads * (group.key_head_dim + group.value_head_dim)
        tasks[name] = timed(work), shard.tokens.num_tokens * len(group.layers) * width
    print("\ndecoding to float32 with torch, one thread, elements per second")
    for name, rate in rates(tasks, rounds).items():
        print(f"  {name:5} {rate / 1e6:8,.0f} M/s")


def sizes(here: Checkout, written: dict[str, float], elements: int) -> None:
    print("\nsize, and write speed (fsync included)")
    for codec in CODEC_NAMES:
        bits = {
            name: 8 * _key_value_bytes(StorePaths(path).shards(codec), name) / elements
            for name, path in here.stores.items()
        }
        print(
            f"  {codec:5} zarr {bits['zarr']:5.2f} bits = {bits['zarr'] / 16:.3f} of bf16; "
            f"safetensors {bits['safetensors']:5.2f} = {bits['safetensors'] / 16:.3f}; "
            f"zarr written at {elements / written[codec] / 1e6:,.0f} M elements/s"
        )


def _key_value_bytes(shards: Path, backend: str) -> int:
    if backend == "safetensors":
        return sum(path.stat().st_size for path in shards.glob("*/shard.safetensors"))
    files = [path for path in shards.rglob("*") if path.is_file() and path.name != "zarr.json"]
    return sum(
        path.stat().st_size
        for path in files
        if path.relative_to(shards).parts[1].startswith(("key", "value"))
    )


def opening(root: Path, num_shards: int = 10_000, num_teachers: int = 5) -> None:
    """Open a large store. Only folder names matter here, so the shards are empty folders."""
    shards = [Shard(f"{i:05d}", i, (Sample(f"s{i}", (("text", "x"),)),)) for i in range(num_shards)]
    store = create(root / "large", shards)
    one = teacher("int8", {"key": [torch.zeros(2, 1, 1, 4)], "value": [torch.zeros(2, 1, 1, 4)]})
    names = [f"t{i}" for i in range(num_teachers)]
    for name in names:
        add_teacher(store, one.model_copy(update={"name": name}))
        store.paths.shards(name).mkdir()
        for shard in shards[: num_shards - 7]:
            (store.paths.shards(name) / shard.shard_id).mkdir()
    started = time.perf_counter()
    again = KVStore.open(root / "large")
    missing = sum(len(again.missing(name)) for name in again.teachers())
    seconds = time.perf_counter() - started
    print(
        f"\nopening {num_shards:,} shards × {num_teachers} teachers and listing what is missing "
        f"({missing}): {seconds:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv", type=Path, help="file of real keys and values (torch.save)")
    parser.add_argument("--samples", type=int, default=128, help="number of synthetic samples")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="parent folder of the stores (disk or tmpfs)")
    parser.add_argument("--against", type=Path, help="another checkout, read in the same rounds")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu on a shared machine"
    )
    arguments = parser.parse_args()
    global clock_name  # noqa: PLW0603
    clock_name = arguments.clock
    torch.set_num_threads(1)
    if arguments.kv is None:
        samples = synthetic(arguments.samples)
    else:
        loaded = torch.load(arguments.kv)
        loaded = loaded.get("kv", loaded)
        samples = {kind: [x.float() for x in loaded[kind]] for kind in KINDS}
    tokens = sum(x.shape[2] for x in samples["key"])
    print(
        f"{len(samples['key'])} samples, {tokens:,} tokens, "
        f"{'real' if arguments.kv else 'synthetic'}; load {os.getloadavg()[0]:.1f}, "
        f"{os.cpu_count()} cores"
    )
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        reading(root, samples, arguments.rounds, arguments.against)
        opening(root)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
