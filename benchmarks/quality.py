"""The reference experiment: do the key/value caches of one or several teachers improve a student?

A student of 4 layers is trained on GSM8K text from scratch, with equal steps in every arm:
cross-entropy alone, one teacher at a time, several teachers fused in four ways, and three placebos.
Settings are searched first, on validation texts under one seed (``search``, ``search-longer``); the
selected ones are then run under five seeds and scored on test texts unseen by the search, after 150
steps (``final``) and, with fewer arms and the settings selected for longer runs, after 600
(``longer``).

    make models
    python benchmarks/quality.py quality-output            # everything, and two reports
    python benchmarks/quality.py quality-output --only longer --workers 2

Every run is a folder; finished runs are not repeated, and the same command resumes.
Results, negative ones included: ``docs/quality.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.study_files import ablate, kvdistill, write_study
from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.build import train_tokenizer

DATA: Final = Path(__file__).parents[1] / "examples/data"
NUM_TRAIN: Final = 600
VOCABULARY: Final = 4096
LAYERS: Final = {
    "smollm2": [2, 5, 8, 11, 14, 17, 20, 23, 26, 29],
    "gemma3": [1, 3, 5, 7, 9, 11, 13, 15, 17],
}
TEACHERS: Final[dict[str, dict[str, Any]]] = {
    "smollm2": {"model": "models/smollm2", "layers": LAYERS["smollm2"]},
    "gemma3": {"model": "models/gemma3", "layers": LAYERS["gemma3"]},
    "minilm": {"model": "models/minilm"},
    "untrained": {"model": "models/smollm2", "weights": "random", "layers": LAYERS["smollm2"]},
}
STUDENT: Final = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
STEPS: Final = {
    "search": (150, 30),
    "search-longer": (600, 100),
    "final": (150, 30),
    "longer": (600, 100),
}
"""Per study: optimizer steps (1.2 or 4.8 passes over the texts), and steps between log entries."""
TRAINING: Final = {
    "batching": "bucketed",
    "tokens_per_batch": 768,
    "max_length": 192,
    "learning_rate": 4e-3,
    "warmup_steps": 15,
    "diagnostic_steps": 1000,
    "window_shards": 15,
    "device": "cpu",
}
WEIGHT: Final = {"smollm2": 5, "gemma3": 10, "minilm": 10}
"""Weight of the key and of the value loss with a single teacher, as selected by the search."""
MULTI: Final = 10
"""The same with several teachers, whose fusion weights sum to one."""
ANNEALED: Final = 15
"""The same at step 0 where the teacher losses are annealed."""
ANNEAL_BY: Final = 0.6
"""Fraction of the steps over which they are annealed to zero."""
SHARES: Final = {"smollm2": 0.5, "gemma3": 0.25, "minilm": 0.25}
RIDGE: Final = {"mode": "frozen", "method": "full", "init": "ridge"}


DESCRIPTIONS: Final = {
    "cross-entropy": "text only, at the learning rate of the other arms",
    "cross-entropy-slower": "text only, at half of that rate, its best",
    "single-smollm2": "SmolLM2 135M",
    "placebo-shuffled": "SmolLM2's keys and values of another text",
    "placebo-noise": "noise with the means and variances of SmolLM2's keys and values",
    "placebo-untrained": "SmolLM2's architecture with random weights",
    "single-gemma3": "Gemma 3 270M",
    "multi-fixed": "SmolLM2, Gemma and MiniLM: a half, a quarter, a quarter",
    "single-minilm": "MiniLM, an encoder",
    "multi-similarity": "all three, weighted by similarity",
    "multi-learnable": "all three, weighted by a router",
    "multi-decoders": "SmolLM2 and Gemma, a half each",
    "multi-inject": "all three, their fused KV also injected into the student",
    "fading-smollm2": "SmolLM2, at three times the weight, annealed to zero at 60 % of the run",
    "fading-gemma3": "Gemma 3 270M, annealed",
    "fading-decoders": "SmolLM2 and Gemma, a half each, annealed",
    "fading-three": "SmolLM2, Gemma and MiniLM: a half, a quarter, a quarter, annealed",
    "fading-shuffled": "SmolLM2's keys and values of another text, annealed",
    "fading-noise": "noise with the means and variances of SmolLM2's, annealed",
    "fading-untrained": "SmolLM2's architecture with random weights, annealed",
}
"""One line for the report per arm of the final studies."""


def experiment(folder: Path, name: str) -> dict[str, Any]:
    """The experiment that all arms of a study share."""
    evaluation = "validation" if name.startswith("search") else "test"
    steps = dict(zip(("max_steps", "log_steps"), STEPS[name], strict=True))
    return {
        "store": str(folder / "store"),
        "output_dir": str(folder),
        "corpus": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / f"{evaluation}.jsonl"),
            "shard_chars": 22_000,
        },
        "extraction": {"summaries": True, "importance": False},
        "student": {"tokenizer": str(folder / "tokenizer"), "architecture": STUDENT},
        "alignment": {
            "layers": "explicit",
            "explicit_layers": {
                "smollm2": [2, 11, 20, 29],
                "gemma3": [1, 7, 11, 17],
                "minilm": [0, 2, 3, 5],
                "untrained": [2, 11, 20, 29],
            },
        },
        "training": {**TRAINING, **steps},
    }


def arm(*teachers: str, weight: float, placebo: bool = False, **settings: Any) -> dict[str, Any]:
    """An arm with teachers; ``fusion__method`` stands for ``fusion.method``."""
    stated = {"losses.key": weight, "losses.value": weight}
    stated |= {name.replace("__", "."): value for name, value in settings.items()}
    return {"teachers": list(teachers), "settings": stated, "placebo": placebo}


def text_alone(rate: float | None = None) -> dict[str, Any]:
    """An arm without a teacher, optionally at another learning rate."""
    settings: dict[str, Any] = {"losses.key": 0, "losses.value": 0}
    if rate is not None:
        settings["training.learning_rate"] = rate
    return {"teachers": [], "settings": settings}


def annealed(
    *teachers: str, weight: float = ANNEALED, by: float = ANNEAL_BY, **settings: Any
) -> dict[str, Any]:
    """An arm whose teacher losses are annealed to zero."""
    return arm(*teachers, weight=weight, losses__anneal_by=by, **settings)


def search_arms() -> dict[str, Any]:
    """Search space: loss weights, projection modes, combinations of teachers."""
    one, two = ("smollm2",), ("smollm2", "gemma3")
    return {
        "cross-entropy": text_alone(),
        **{f"cross-entropy-{rate:g}": text_alone(rate) for rate in (1e-3, 2e-3, 6e-3)},
        **{f"smollm2-{weight}": arm(*one, weight=weight) for weight in (3, 10, 30)},
        **{f"gemma3-{weight}": arm("gemma3", weight=weight) for weight in (10, 30)},
        **{f"minilm-{weight}": arm("minilm", weight=weight) for weight in (10, 30)},
        **{f"smollm2-gemma3-{weight}": arm(*two, weight=weight) for weight in (10, 20, 60)},
        "smollm2-minilm-20": arm("smollm2", "minilm", weight=20),
        "joint": arm(*one, weight=10, projection__mode="joint"),
        "frozen": arm(*one, weight=10, projection__mode="frozen"),
        "ridge": arm(*one, weight=10, projection=RIDGE),
        "cosine": arm(*one, weight=10, losses__cosine=10),
    }


def longer_search_arms() -> dict[str, Any]:
    """A smaller search space for runs of four times the steps."""
    return {
        "cross-entropy": text_alone(),
        **{f"cross-entropy-{rate:g}": text_alone(rate) for rate in (1e-3, 2e-3)},
        "smollm2-5-slow": arm("smollm2", weight=5, training__learning_rate=2e-3),
        **{f"smollm2-{weight}": arm("smollm2", weight=weight) for weight in (5, 15)},
        **{f"gemma3-{weight}": arm("gemma3", weight=weight) for weight in (10, 25)},
        **{
            f"smollm2-gemma3-{weight}": arm("smollm2", "gemma3", weight=weight)
            for weight in (10, 25)
        },
        "joint": arm("smollm2", weight=10, projection__mode="joint"),
        **{
            f"frozen-{weight}": arm("smollm2", weight=weight, projection__mode="frozen")
            for weight in (10, 30)
        },
        **{
            f"smollm2-gemma3-frozen-{weight}": arm(
                "smollm2", "gemma3", weight=weight, projection__mode="frozen"
            )
            for weight in (10, 30)
        },
        **{
            f"fading-smollm2-{weight}-{by}": annealed("smollm2", weight=weight, by=by)
            for weight, by in ((5, 1.0), (15, 1.0), (30, 1.0), (15, 0.6), (30, 0.6), (15, 0.4))
        },
        "fading-gemma3-15-1.0": annealed("gemma3", weight=15, by=1.0),
        **{
            f"fading-smollm2-gemma3-{weight}-{by}": annealed(
                "smollm2", "gemma3", weight=weight, by=by
            )
            for weight, by in ((15, 1.0), (30, 1.0), (15, 0.6))
        },
    }


def final_arms() -> dict[str, Any]:
    """The settings selected by the search, and placebos of the best single teacher."""
    every, single = tuple(SHARES), WEIGHT["smollm2"]
    arms = {
        "cross-entropy": text_alone(),
        # The best learning rate without a teacher is lower than with one; each gets its own.
        "cross-entropy-slower": text_alone(2e-3),
        "single-smollm2": arm("smollm2", weight=single),
        "placebo-shuffled": arm("smollm2", weight=single, placebo=True, placebo__method="shuffled"),
        "placebo-noise": arm("smollm2", weight=single, placebo=True, placebo__method="noise"),
        "placebo-untrained": arm("untrained", weight=single, placebo=True),
        "single-gemma3": arm("gemma3", weight=WEIGHT["gemma3"]),
        "multi-fixed": arm(*every, weight=MULTI, fusion__weights=SHARES),
        "single-minilm": arm("minilm", weight=WEIGHT["minilm"]),
        "multi-similarity": arm(*every, weight=MULTI, fusion__method="similarity"),
        "multi-learnable": arm(*every, weight=MULTI, fusion__method="mlp"),
        # Without the weakest teacher: the best combination on validation texts.
        "multi-decoders": arm("smollm2", "gemma3", weight=MULTI),
        "multi-inject": arm(*every, weight=MULTI, fusion__weights=SHARES, losses__inject=1.0),
    }
    return described(arms)


def longer_arms() -> dict[str, Any]:
    """The settings selected by the longer search: annealed losses, placebos of the best teacher."""
    every = final_arms()
    kept = ("cross-entropy", "cross-entropy-slower", "single-smollm2")
    arms = {
        "fading-smollm2": annealed("smollm2"),
        "fading-gemma3": annealed("gemma3"),
        "fading-decoders": annealed("smollm2", "gemma3"),
        "fading-three": annealed(*SHARES, fusion__weights=SHARES),
        "fading-shuffled": annealed("smollm2", placebo=True, placebo__method="shuffled"),
        "fading-noise": annealed("smollm2", placebo=True, placebo__method="noise"),
        "fading-untrained": annealed("untrained", placebo=True),
    }
    return {name: every[name] for name in kept} | described(arms)


def described(arms: dict[str, Any]) -> dict[str, Any]:
    """The arms with their descriptions."""
    return {name: {**found, "description": DESCRIPTIONS[name]} for name, found in arms.items()}


def study(folder: Path, name: str, seeds: Sequence[int], arms: dict[str, Any]) -> Path:
    """Write a study file and return its path."""
    more = {"teachers": TEACHERS, "baseline": "cross-entropy"}
    return write_study(folder, name, experiment(folder, name), arms, seeds, **more)


def prepare(folder: Path) -> None:
    """Write the texts and the student's tokenizer, trained on the training texts only."""
    folder.mkdir(parents=True, exist_ok=True)
    train_lines, test_lines = (
        [line for file in files for line in (DATA / file).read_text("utf-8").splitlines()]
        for files in (
            ("gsm8k_train.jsonl", "gsm8k_train_more.jsonl"),
            ("gsm8k_test.jsonl", "gsm8k_test_more.jsonl"),
        )
    )
    splits = {
        "train": train_lines[:NUM_TRAIN],
        "validation": train_lines[NUM_TRAIN:],
        "test": test_lines,
    }
    for name, lines in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not (folder / "tokenizer").exists():
        texts = [sample.text for sample in read_files(folder / "train.jsonl")]
        train_tokenizer(texts, VOCABULARY).save_pretrained(str(folder / "tokenizer"))


def report(runs: Path) -> None:
    """Write the report; the baseline is the better of the two arms without a teacher."""
    options = ["--output", f"{runs}.html", "--baseline", "cross-entropy-slower"]
    title = f"The reference experiment: {STEPS[runs.name][0]} steps"
    kvdistill("report", runs, *options, "--title", title)


def main() -> None:
    """Search, final runs, reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--only", choices=("files", *STEPS, "report"))
    parser.add_argument("--workers", type=int, default=1, help="parallel runs")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the final runs")
    asked = parser.parse_args()
    prepare(asked.folder)
    studies = {
        "search": study(asked.folder, "search", [0], search_arms()),
        "search-longer": study(asked.folder, "search-longer", [0], longer_search_arms()),
        "final": study(asked.folder, "final", range(asked.seeds), final_arms()),
        "longer": study(asked.folder, "longer", range(asked.seeds), longer_arms()),
    }
    for name, path in studies.items():
        if asked.only in (None, name):
            ablate(path, asked.workers, "--extract")
    for name in ("final", "longer"):
        if asked.only in (None, "report"):
            report(asked.folder / name)


if __name__ == "__main__":
    main()
