"""What a store saves where teachers are much larger than their student, measured and predicted.

A student of 14 M parameters is trained from scratch on the keys and values of Gemma 3 270M and of
Qwen2.5-Coder-0.5B: from a store, and with the teachers in memory. Every round has a process each
for stage 1 (a fresh store), a cached run and a live run, so that all of them meet the same machine.

    make models && python examples/get_models.py models qwen2.5-coder
    OMP_NUM_THREADS=1 python benchmarks/economics.py --results DIR/results.json --rounds 5
    python benchmarks/economics.py --results DIR/results.json --rounds 0   # the tables again
    python benchmarks/economics.py --rounds 0                              # predictions alone

``--results`` keeps the rounds between calls; more are appended. Figures are medians over rounds of
CPU seconds (``--clock wall`` for the others), loading of Python, models and data included, and
without it (``steady``). k ablations cost ``extract + k · cached`` or ``k · live``.

Predictions are ``kvdistill.pipelines.outlook.Savings``: a forward pass of a teacher takes 2 P
operations per token, a training step 6 P, with the student's language head and without embeddings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train import CORPUS, child
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.pipelines.outlook import Savings, savings

KS: Final = (1, 2, 4, 8, 16)
ARCHITECTURE: Final = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LARGE: Final = {
    "Qwen2.5 7B → 0.5B": (6.53e9, 0.494e9),
    "Llama 2 70B → 7B": (68.5e9, 6.61e9),
}
"""Parameters of one teacher without embeddings, and of a student with its language head."""


def experiment(
    options: argparse.Namespace, work: Path, round_idx: int, epochs: int
) -> dict[str, Any]:
    """The body of an experiment, with a store of its own in every round."""
    return {
        "name": "stage-1",
        "store": str(work / f"store-{round_idx}"),
        "output_dir": str(work / "runs"),
        "corpus": {
            "path": str(options.corpus),
            "max_samples": options.samples,
            "shard_chars": 5000,
        },
        "teachers": {name: {"model": f"{options.models}/{name}"} for name in options.teachers},
        "extraction": {"device": "cpu", "batch_tokens": 1024},
        "student": {"tokenizer": str(work / "tokenizer"), "architecture": ARCHITECTURE},
        "training": {
            "batch_size": 4,
            "max_length": 512,
            "epochs": epochs,
            "log_steps": 1,
            "device": "cpu",
            "window_shards": 2,
            "diagnostic_steps": 1000,
        },
    }


def measure(options: argparse.Namespace, work: Path, first: int) -> list[dict[str, Any]]:
    """Rounds of stage 1, a cached and a live run; the number of epochs alternates."""
    if options.rounds and not (work / "tokenizer").exists():
        texts = [sample.text for sample in read_files(options.corpus)]
        train_tokenizer(texts, 4096).save_pretrained(str(work / "tokenizer"))
    rows = []
    for number in range(first, first + options.rounds):
        epochs = options.epochs[number % len(options.epochs)]
        body = experiment(options, work, number, epochs)
        row: dict[str, Any] = {"epochs": epochs, "extract": child(what="extract", experiment=body)}
        kinds = ["cached", "live"]
        for kind in kinds if number // len(options.epochs) % 2 else reversed(kinds):
            named = body | {"name": f"{kind}-{number}"}
            row[kind] = child(what="train", live=kind == "live", experiment=named)
        rows.append(row)
    return rows


def measured(rows: list[dict[str, Any]], clock: str, *, steady: bool) -> Savings:
    """Medians of rounds of one number of epochs, in seconds, in the formula's terms."""

    def median(kind: str) -> float:
        loading = [row[kind][f"setup_{clock}_s"] if steady else 0.0 for row in rows]
        return statistics.median(
            row[kind][f"{clock}_s"] - loaded for row, loaded in zip(rows, loading, strict=True)
        )

    epochs, cached = rows[0]["epochs"], median("cached")
    read = (median("live") - cached) / epochs
    return Savings(read, cached, epochs, median("extract") / read - 1)


def line(name: str, found: Savings) -> str:
    """A row of the table."""
    ratios = " | ".join(f"{found.ratio(k):.2f}" for k in KS)
    return (
        f"| {name} | {found.epochs:g} | {found.read / found.trained * found.epochs:.1f} | "
        f"{found.overhead:.0%} | {found.crossover:.2f} | {ratios} |"
    )


def tables(rows: list[dict[str, Any]], clock: str) -> None:
    """Measured rounds beside predictions for the same models, then predictions for larger ones."""
    print("| | epochs | reading / training | overhead | k* |" + "".join(f" k={k} |" for k in KS))
    print("|---" * (5 + len(KS)) + "|")
    for epochs in sorted({row["epochs"] for row in rows}):
        some = [row for row in rows if row["epochs"] == epochs]
        steady = measured(some, clock, steady=True)
        print(line(f"measured, {len(some)} rounds", measured(some, clock, steady=False)))
        print(line("measured, steady", steady))
        print(line("predicted", Savings(**some[0]["predicted"], overhead=steady.overhead)))
    for name, (teacher, student) in LARGE.items():
        for epochs in (1, 3):
            print(line(f"predicted, {name}", Savings(2 * teacher, 6 * student * epochs, epochs)))


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="models", help="folder of the models")
    parser.add_argument("--teachers", nargs="+", default=["gemma3", "qwen2.5-coder"])
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--samples", type=int, default=16, help="texts, four per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2], help="of rounds, in turn")
    parser.add_argument("--results", type=Path, help="JSON file that keeps rounds between calls")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.results is not None and options.results.is_file():
        rows = json.loads(options.results.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="kvdistill-bench-") as folder:
        for row in measure(options, Path(folder), len(rows)):
            body = experiment(options, Path(folder), len(rows), row["epochs"])
            found = savings(parse_experiment(body))
            predicted = {name: getattr(found, name) for name in ("read", "trained", "epochs")}
            rows.append(row | {"predicted": predicted})
    if options.results is not None:
        options.results.write_text(json.dumps(rows), encoding="utf-8")
    tables(rows, options.clock)


if __name__ == "__main__":
    main()
