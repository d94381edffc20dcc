"""Cost and benefit of stored teachers in training: data stalls, memory, time over ablations.

    python benchmarks/train.py --models models             # all, about 7 minutes on 2 cores
    python benchmarks/train.py --plot docs/images/train.png
    python benchmarks/train.py --work DIR --results DIR/results.json --parts extract  # … cached …

``extract``  stage 1 of two teachers, once
``cached``   two ablations with SmolLM2 as the student, from the store (int8, zarr)
``live``     the same two with the teachers in memory
``scale``    a tiny student over a synthetic store, and over one ten times larger
``words``    cross-entropy of 2,048 tokens over 150,000 words: all logits at once, and in chunks

Each run has a process of its own. Reported: the share of step time spent waiting for batches (after
the first, which cannot be prefetched); peak memory, live over cached; total time of k ablations,
cached over live; peak memory over a store ten times larger. ``--clock cpu`` counts CPU seconds,
which are comparable on a shared machine.

Stage 1 and the first two ablations of either kind are measured, loading included; further ones are
extrapolated at the mean of the two. ``--results`` keeps measurements between calls, so that parts
can be run one at a time and the plot drawn at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN = Path(__file__).with_name("train_run.py")
CORPUS = Path(__file__).parents[1] / "examples/data/gsm8k_train.jsonl"
ABLATIONS = ({"key": 3, "value": 3}, {"key": 1, "value": 1, "cosine": 1})
KS = range(1, 9)
SMALL, LARGE = 6, 60


def child(**spec: Any) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, str(RUN), json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{spec['what']} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(spec["what"], {k: v for k, v in found.items() if k != "waits_s"}, file=sys.stderr)
    return found


def experiment(
    options: argparse.Namespace, work: Path, kind: str = "cached", number: int = 0
) -> dict[str, Any]:
    """SmolLM2 as the student of both teachers; ablations differ in their losses."""
    return {
        "name": f"{kind}-{number}",
        "store": str(work / "store"),
        "output_dir": str(work / "runs"),
        "corpus": {"path": str(CORPUS), "max_samples": options.samples, "shard_chars": 5000},
        "teachers": {name: {"model": f"{options.models}/{name}"} for name in options.teachers},
        "extraction": {"device": "cpu", "batch_tokens": 1024},
        "student": {"model": f"{options.models}/smollm2"},
        "losses": ABLATIONS[number],
        "training": {
            "batch_size": 4,
            "max_length": 512,
            "log_steps": 1,
            "device": "cpu",
            "window_shards": 2,
            "learning_rate": 1e-4,
        },
    }


def extract(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    return {"extract": child(what="extract", experiment=experiment(options, work))}


def cached(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    return {"cached": ablations(options, work, "cached")}


def live(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    return {"live": ablations(options, work, "live")}


def ablations(options: argparse.Namespace, work: Path, kind: str) -> list[dict[str, Any]]:
    return [
        child(what="train", live=kind == "live", experiment=experiment(options, work, kind, number))
        for number in range(len(ABLATIONS))
    ]


def scale(_: argparse.Namespace, work: Path) -> dict[str, Any]:
    found = {}
    for name, num_shards in (("small", SMALL), ("large", LARGE)):
        place = {
            "store": str(work / name),
            "corpus": str(work / f"{name}.jsonl"),
            "tokenizer": str(work / "tokenizer"),
        }
        made = child(what="synthesise", num_shards=num_shards, manifest=MANIFEST, **place)
        architecture = {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
        }  # fmt: skip
        experiment = {
            "name": name,
            "store": place["store"],
            "output_dir": str(work / "runs"),
            "corpus": {"path": place["corpus"]},
            "teachers": {"synthetic": {"model": "synthetic"}},
            "student": {
                "tokenizer": place["tokenizer"], "architecture": architecture},
            "training": {
                "batch_size": 16, "max_length": 256, "device": "cpu",
                "epochs": LARGE / num_shards,
            },
        }  # fmt: skip
        run = child(what="train", experiment=experiment, live=False)
        found[name] = {**run, "store_mib": made["store_mib"]}
    return found


def words(_: argparse.Namespace, __: Path) -> dict[str, Any]:
    return {
        name: child(what="words", vocabulary=150_000, tokens=2048, chunked=name == "chunked")
        for name in ("whole", "chunked")
    }


MANIFEST = {
    "name": "synthetic", "model": "synthetic", "revision": None, "model_type": "llama",
    "kind": "decoder", "weights_fingerprint": "0", "tokenizer_fingerprint": "0",
    "template": None, "extraction_fingerprint": "0", "versions": {}, "dtype": "float32",
    "attn_implementation": "sdpa", "backend": "zarr",
    "codec": {"key": "int8", "value": "int8"},
    "groups": [
        {"layers": list(range(8)), "num_key_value_heads": 4, "key_head_dim": 64,
         "value_head_dim": 64}
    ],
    "position_encoding": "none", "hidden_size": 8, "adapter": "benchmark", "adapter_error": 0.0,
}  # fmt: skip


PARTS = {"extract": extract, "cached": cached, "live": live, "scale": scale, "words": words}


def ratios(results: dict[str, Any], clock: str) -> dict[str, float]:
    """All reported figures, from the measurements."""
    figures: dict[str, float] = {}
    if {"extract", "cached", "live"} <= results.keys():
        stored, online = results["cached"], results["live"]
        waits = [sum(run["waits_s"][1:]) / run["train_s"] for run in stored]
        figures["waiting_share"] = max(waits)
        figures["waiting_share_with_first_batch"] = max(
            sum(run["waits_s"]) / run["train_s"] for run in stored
        )
        figures["live_memory_over_cached"] = mean(online, "peak_mib") / mean(stored, "peak_mib")
        figures["live_run_over_cached"] = mean(online, clock) / mean(stored, clock)
        for k in KS:
            once, again = totals(results, k, clock)
            figures[f"cached_over_live_k{k}"] = once / again
        saved = mean(online, clock) - mean(stored, clock)
        figures["crossover_k"] = results["extract"][clock] / saved
    if "small" in results:
        small, large = results["small"], results["large"]
        figures["store_size_ratio"] = large["store_mib"] / small["store_mib"]
        figures["memory_large_over_small"] = large["peak_mib"] / small["peak_mib"]
    if "whole" in results:
        whole, chunked = results["whole"], results["chunked"]
        for name in ("step_mib", "step_s"):
            figures[f"words_whole_over_chunked_{name}"] = whole[name] / chunked[name]
        figures["words_loss_difference"] = abs(whole["loss"] - chunked["loss"])
    return figures


def totals(results: dict[str, Any], k: int, clock: str) -> tuple[float, float]:
    """Seconds of k ablations: stage 1 plus k cached runs, and k live runs."""
    out = []
    for kind, before in (("cached", results["extract"][clock]), ("live", 0.0)):
        measured = [run[clock] for run in results[kind]]
        further = max(0, k - len(measured)) * mean(results[kind], clock)
        out.append(before + sum(measured[:k]) + further)
    return out[0], out[1]


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))


def plot(results: dict[str, Any], clock: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    unit = mean(results["live"], clock)
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[2, 1])
    for column, label in enumerate(("stored once", "teachers in memory")):
        lines = time.plot(KS, [totals(results, k, clock)[column] / unit for k in KS], "--", lw=1)
        color = lines[0].get_color()
        measured = [k for k in KS if k <= len(ABLATIONS)]
        rows = [totals(results, k, clock)[column] / unit for k in measured]
        time.plot(measured, rows, "o", color=color, label=label)
    time.set(xlabel="ablations (points are measured)", ylabel="time / one run with live teachers")
    time.legend(frameon=False)
    labels = ["stored", "live"]
    peaks = [mean(results[kind], "peak_mib") for kind in ("cached", "live")]
    memory.bar(labels, [peak / peaks[0] for peak in peaks], color=["C0", "C1"])
    memory.set(ylabel="peak memory / stored")
    for axis in (time, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    options = arguments()
    clock = f"{options.clock}_s"
    results: dict[str, Any] = {}
    if options.results is not None and options.results.is_file():
        results = json.loads(options.results.read_text())
    with tempfile.TemporaryDirectory(prefix="kvdistill-bench-", dir=options.tmp) as folder:
        work = options.work or Path(folder)
        for part in options.parts:
            results |= PARTS[part](options, work)
    if options.results is not None:
        options.results.write_text(json.dumps(results))
    print(
        json.dumps(
            {name: float(f"{x:.3g}") for name, x in ratios(results, clock).items()}, indent=1
        )
    )
    if options.plot is not None:
        plot(results, clock, options.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="models", help="folder of the models")
    parser.add_argument("--teachers", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[*PARTS])
    parser.add_argument("--samples", type=int, default=32, help="texts, four per step")
    parser.add_argument(
        "--results", type=Path, help="JSON file that keeps measurements between calls"
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument(
        "--work", type=Path, help="persistent work folder, to run parts one at a time"
    )
    parser.add_argument("--tmp", help="folder for the stores")
    return parser.parse_args()


if __name__ == "__main__":
    main()
