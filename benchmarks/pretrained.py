"""Do the defaults for a pretrained student cost anything against cross-entropy alone?

SmolLM2-135M-Instruct is trained on short GSM8K texts, from the key/value caches of one teacher of
another family: Gemma 3 270M, or Qwen2.5-Coder-0.5B-Instruct. The learning rate of cross-entropy and
the settings of the defaults are chosen on validation texts (``search``); the chosen ones are then
run under three seeds and scored on test texts that no setting was chosen on (``final``).

    make models
    python examples/get_models.py models qwen2.5-coder
    python benchmarks/pretrained.py pretrained-output

Every run is a folder; finished runs are not repeated, and the same command resumes.
Results: ``docs/students.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import yaml

DATA: Final = Path(__file__).parents[1] / "examples/data"
MAX_CHARACTERS: Final = 450
NUM_TRAIN: Final = 160
NUM_VALIDATION: Final = 40
NUM_TEST: Final = 60
TEACHERS: Final = {"gemma3": "models/gemma3", "qwen-coder": "models/qwen2.5-coder"}
TRAINING: Final = {
    "batching": "bucketed",
    "tokens_per_batch": 576,
    "max_length": 224,
    "max_steps": 40,
    "warmup_steps": 4,
    "precision": "bfloat16",
    "log_steps": 10,
    "diagnostic_steps": 1000,
    "device": "cpu",
}
RATES: Final = (5e-5, 1e-4, 2e-4)
TUNED_RATE: Final = 5e-5
"""Of cross-entropy alone, as selected by the search."""
NO_TEACHER: Final = {"losses.key": 0, "losses.value": 0}
FORMER: Final = {
    "losses.key": 3,
    "losses.value": 3,
    "projection.init": "grouped_mean",
    "projection.learning_rate": 5e-5,
    "training.learning_rate": 5e-5,
}
"""The defaults of a student from scratch, at the rate of the others: random heads, weight 3."""
GOAL: Final = 1.01
"""Perplexity of the defaults over that of cross-entropy, at most."""


def rows(*names: str) -> list[str]:
    """Lines of the data files whose question and answer are short together."""
    lines = [line for name in names for line in (DATA / name).read_text("utf-8").splitlines()]
    found = [json.loads(line) for line in lines]
    lengths = (len(row["question"]) + 1 + len(row["answer"]) for row in found)
    return [line for line, n in zip(lines, lengths, strict=True) if n <= MAX_CHARACTERS]


def prepare(folder: Path) -> None:
    """Write training, validation and test texts, which share no text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = rows("gsm8k_train.jsonl", "gsm8k_train_more.jsonl")
    splits = {
        "train": lines[:NUM_TRAIN],
        "validation": lines[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION],
        "test": rows("gsm8k_test.jsonl", "gsm8k_test_more.jsonl")[:NUM_TEST],
    }
    for name, chosen in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def search_arms() -> dict[str, Any]:
    """Rates of cross-entropy; the defaults with one teacher, and with each of them changed."""
    arms: dict[str, Any] = {}
    for rate in RATES:
        settings = {**NO_TEACHER, "training.learning_rate": rate}
        arms[f"cross-entropy-{rate:g}"] = {"teachers": [], "settings": settings}
    return arms


def final_arms() -> dict[str, Any]:
    """Tuned cross-entropy, and per teacher the defaults."""
    tuned = {**NO_TEACHER, "training.learning_rate": TUNED_RATE}
    arms = {"cross-entropy": {"teachers": [], "settings": tuned}}
    return arms | {f"defaults-{teacher}": {"teachers": [teacher]} for teacher in TEACHERS}


def former_arms() -> dict[str, Any]:
    """For contrast: random heads and the weights of a student from scratch."""
    return {f"former-{name}": {"teachers": [name], "settings": FORMER} for name in TEACHERS}


def experiment(folder: Path, evaluation: str) -> dict[str, Any]:
    """The experiment that all arms share, with both teachers."""
    return {
        "store": str(folder / "store"),
        "output_dir": str(folder),
        "corpus": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / f"{evaluation}.jsonl"),
            "shard_chars": 8_000,
        },
        "teachers": {
            name: {"model": model, "dtype": "bfloat16"} for name, model in TEACHERS.items()
        },
        "extraction": {"importance": False},
        "student": {"model": "models/smollm2"},
        "training": TRAINING,
    }


def study(folder: Path, name: str, seeds: list[int], arms: dict[str, Any]) -> Path:
    """Write a study file and return its path."""
    body = {
        "name": name,
        "experiment": experiment(folder, "validation" if name == "search" else "test"),
        "seeds": seeds,
        "arms": arms,
        "may_differ": ["training.learning_rate"],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    return path


def kvdistill(*arguments: str) -> None:
    """Run a command of kvdistill."""
    subprocess.run([sys.executable, "-m", "kvdistill.cli", *arguments], check=True)


def perplexities(folder: Path) -> dict[str, list[float]]:
    """Perplexity of every finished run under ``folder``, by arm, in the order of the seeds."""
    found: dict[str, list[float]] = {}
    for record in sorted(folder.glob("*/run.json")):
        run = json.loads(record.read_text(encoding="utf-8"))
        if run.get("finished"):
            arm = record.parent.name.rpartition("-seed")[0] or record.parent.name
            found.setdefault(arm, []).append(run["metrics"]["eval_perplexity"])
    return found


def summary(folder: Path) -> None:
    """Print the perplexity of every arm, and its ratio to cross-entropy of the same seeds."""
    for name in ("search", "final", "former"):
        found = perplexities(folder / name)
        base = perplexities(folder / "final").get("cross-entropy", [])
        for arm, values in found.items():
            line = f"{name} {arm}: " + " ".join(f"{value:.4f}" for value in values)
            if name != "search" and arm != "cross-entropy" and base:
                ratios = [x / y for x, y in zip(values, base, strict=False)]
                verdict = "within" if max(ratios) <= GOAL else "beyond"
                line += f"; over cross-entropy: mean {statistics.mean(ratios):.4f}, "
                line += f"largest {max(ratios):.4f} ({verdict} {GOAL})"
            print(line)


def main() -> None:
    """Search, final runs, contrast, summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--workers", type=int, default=1, help="parallel runs")
    parser.add_argument("--only", choices=("extract", "search", "final", "former", "summary"))
    asked = parser.parse_args()
    prepare(asked.folder)
    studies = {
        "search": study(asked.folder, "search", [0], search_arms()),
        "final": study(asked.folder, "final", [0, 1, 2], final_arms()),
        "former": study(asked.folder, "former", [0], former_arms()),
    }
    if asked.only in (None, "extract"):
        both = asked.folder / "extract.yaml"
        both.write_text(yaml.safe_dump(experiment(asked.folder, "test")), encoding="utf-8")
        kvdistill("extract", str(both))
    for name, path in studies.items():
        if asked.only in (None, name):
            kvdistill("ablate", str(path), "--workers", str(asked.workers))
    summary(asked.folder)


if __name__ == "__main__":
    main()
