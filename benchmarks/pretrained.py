"""Do the defaults for a pretrained student cost anything against cross-entropy alone?

SmolLM2-135M-Instruct is trained on short GSM8K texts, from the key/value caches of one teacher of
another family: Gemma 3 270M, or Qwen2.5-Coder-0.5B-Instruct. Rates are compared on validation texts
with and without a teacher (``search``; ``second``: Gemma 3 as the student, SmolLM2 as its teacher).
Cross-entropy at its best rate and the defaults are then run under three seeds and scored on test
texts that no setting was chosen on (``final``), and once with random heads and the weights of a
student from scratch (``former``).

    make models
    python examples/get_models.py models qwen2.5-coder
    python benchmarks/pretrained.py pretrained-output

``elsewhere`` scores the students of ``final`` and the untouched model on text of another domain,
functions of Python's standard library: what training has cost there. ``answers`` lets them answer
the test questions, scored by exact match.

``scratch`` compares heads fitted by ridge with random ones for a small student from scratch: at its
random start, and after ``WARM_STEPS`` steps of cross-entropy.

Every run is a folder; finished runs are not repeated, and the same command resumes.
Results: ``docs/students.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality import STUDENT
from benchmarks.study_files import ablate, kvdistill, write_study, write_yaml
from benchmarks.teachers import texts
from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.build import train_tokenizer

DATA: Final = Path(__file__).parents[1] / "examples/data"
MAX_CHARACTERS: Final = 450
NUM_TRAIN: Final = 160
NUM_VALIDATION: Final = 40
NUM_TEST: Final = 60
TEACHERS: Final = {"gemma3": "models/gemma3", "qwen-coder": "models/qwen2.5-coder"}
STUDENT_MODEL: Final = "models/smollm2"
SECOND_EPOCHS: Final = 1
TRAINING: Final = {
    "batching": "bucketed",
    "tokens_per_batch": 576,
    "max_length": 224,
    "epochs": 2,
    "precision": "bfloat16",
    "log_steps": 10,
    "diagnostic_steps": 1000,
    "device": "cpu",
}
RATES: Final = (5e-5, 1e-4, 2e-4)
TUNED_RATE: Final = 1e-4
"""Of cross-entropy alone, as selected by the search."""
NO_TEACHER: Final = {"losses.key": 0, "losses.value": 0}
FORMER: Final = {
    "losses.key": 3,
    "losses.value": 3,
    "projection.init": "grouped_mean",
    "projection.learning_rate": 1e-4,
}
"""The defaults of a student from scratch, at the rate of the others: random heads, weight 3."""
NUM_ELSEWHERE: Final = 60
SCORES: Final = {
    "elsewhere": ["--max-length", "224"],
    "answers": ["--generate", "--max-new-tokens", "160", "--batch-size", "16"],
}
"""What students are scored on after training, and the options of ``kvdistill evaluate``."""
SCRATCH_RATE: Final = 4e-3
SCRATCH_STEPS: Final = 150
SCRATCH_SEEDS: Final = [0, 1]
WARM_STEPS: Final = 30
STAGES: Final = ("extract", "search", "second", "final", "former", "scratch", *SCORES)
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


def text_alone(rate: float) -> dict[str, Any]:
    """An arm without a teacher."""
    return {"teachers": [], "settings": {**NO_TEACHER, "training.learning_rate": rate}}


def search_arms(teacher: str) -> dict[str, Any]:
    """Rates of cross-entropy, and of the defaults with one teacher."""
    arms = {f"cross-entropy-{rate:g}": text_alone(rate) for rate in RATES}
    for rate in RATES:
        settings = {"training.learning_rate": rate}
        arms[f"defaults-{rate:g}"] = {"teachers": [teacher], "settings": settings}
    return arms


def final_arms() -> dict[str, Any]:
    """Cross-entropy and, per teacher, the defaults."""
    arms = {"cross-entropy": text_alone(TUNED_RATE)}
    return arms | {f"defaults-{teacher}": {"teachers": [teacher]} for teacher in TEACHERS}


def former_arms() -> dict[str, Any]:
    """For contrast: random heads and the weights of a student from scratch."""
    return {f"former-{name}": {"teachers": [name], "settings": FORMER} for name in TEACHERS}


def scratch_arms() -> dict[str, Any]:
    """Text alone, random heads, and heads fitted before step 1, with Gemma 3."""
    kv = {"losses.key": 5, "losses.value": 5, "projection.learning_rate": SCRATCH_RATE}
    arms: dict[str, Any] = {"cross-entropy": {"teachers": [], "settings": NO_TEACHER}}
    for init in ("grouped_mean", "ridge"):
        settings = {**kv, "projection.init": init}
        arms[init] = {"teachers": ["gemma3"], "settings": settings}
    return arms


def scratch_experiment(folder: Path, student: dict[str, Any], steps: int) -> dict[str, Any]:
    """A small student: the given section, and a schedule of its own."""
    training = {"batching": "bucketed", "tokens_per_batch": 768, "max_length": 224}
    training |= {"max_steps": steps, "warmup_steps": 10, "learning_rate": SCRATCH_RATE}
    training |= {"log_steps": 30, "diagnostic_steps": 1000, "device": "cpu"}
    body = experiment(folder, "test")
    return {**body, "student": student, "training": {**training, "epochs": 20}}


def warm_student(folder: Path, student: dict[str, Any], seed: int) -> str:
    """Train the small student by cross-entropy for a few steps, and return its folder."""
    name, steps = f"warm-{seed}", WARM_STEPS
    body = scratch_experiment(folder, student, steps)
    body |= {"name": name, "seed": seed, "teachers": {}, "losses": {"key": 0, "value": 0}}
    kvdistill("train", write_yaml(folder / f"{name}.yaml", body))
    return str(folder / name / "student")


def second_experiment(folder: Path) -> dict[str, Any]:
    """SmolLM2 teaches Gemma 3, in a store of its own; scored on validation texts."""
    body = experiment(folder, "validation")
    body |= {"store": str(folder / "second-store"), "student": {"model": TEACHERS["gemma3"]}}
    body["teachers"] = {"smollm2": {"model": STUDENT_MODEL, "dtype": "bfloat16"}}
    return {**body, "training": {**TRAINING, "epochs": SECOND_EPOCHS}}


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
        "student": {"model": STUDENT_MODEL},
        "training": TRAINING,
    }


def study(
    folder: Path,
    name: str,
    seeds: list[int],
    arms: dict[str, Any],
    shared: dict[str, Any] | None = None,
) -> Path:
    """Write a study file and return its path; ``shared`` is the experiment that arms share."""
    evaluation = "validation" if name == "search" else "test"
    return write_study(folder, name, shared or experiment(folder, evaluation), arms, seeds)


def scratch_studies(folder: Path) -> dict[str, Path]:
    """From random weights, and per seed from a student that has been warmed up."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        texts = [sample.text for sample in read_files(folder / "train.jsonl")]
        train_tokenizer(texts, 2048).save_pretrained(str(tokenizer))
    student = {"tokenizer": str(tokenizer), "architecture": STUDENT}
    shared = scratch_experiment(folder, student, SCRATCH_STEPS)
    found = {"scratch": study(folder, "scratch", SCRATCH_SEEDS, scratch_arms(), shared)}
    for seed in SCRATCH_SEEDS:
        warm = {"model": warm_student(folder, student, seed)}
        shared = scratch_experiment(folder, warm, SCRATCH_STEPS - WARM_STEPS)
        name = f"scratch-warmed-{seed}"
        found[name] = study(folder, name, [seed], scratch_arms(), shared)
    return found


def score(folder: Path, name: str) -> None:
    """Score the untouched model and the students of ``final``, once each, to ``folder/name``."""
    corpus, target = folder / "test.jsonl", folder / name
    if name == "elsewhere":
        corpus = folder / "elsewhere.jsonl"
        rows = [json.dumps({"text": text}) + "\n" for text in texts("code", None)]
        corpus.write_text("".join(rows[:NUM_ELSEWHERE]), encoding="utf-8")
    target.mkdir(exist_ok=True)
    students = {path.parent.name: path for path in sorted(folder.glob("final/*/student"))}
    for arm, student in {"untouched": Path(STUDENT_MODEL), **students}.items():
        if not (target / f"{arm}.json").exists():
            found = kvdistill("evaluate", student, corpus, *SCORES[name], "--json")
            (target / f"{arm}.json").write_text(found, encoding="utf-8")


def print_scores(folder: Path, name: str) -> None:
    """What ``score`` has found."""
    for path in sorted((folder / name).glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        figures = {key: found[key] for key in ("perplexity", "exact_match") if key in found}
        print(f"{name} {path.stem}: {figures}")


def perplexities(folder: Path) -> dict[str, dict[int, float]]:
    """Perplexity of every finished run under ``folder``, by arm and seed."""
    found: dict[str, dict[int, float]] = {}
    for record in sorted(folder.glob("*/run.json")):
        run = json.loads(record.read_text(encoding="utf-8"))
        if run.get("finished"):
            arm = record.parent.name.rpartition("-s")[0]
            found.setdefault(arm, {})[run["seed"]] = run["metrics"]["eval_perplexity"]
    return found


def summary(folder: Path) -> None:
    """Print the perplexity of every arm, and its ratio to cross-entropy of the same seeds."""
    names = ("search", "second", "final", "former", "scratch", "scratch-warmed-0")
    names += ("scratch-warmed-1",)
    for name in names:
        found = perplexities(folder / name)
        baseline = perplexities(folder / "final") if name == "former" else found
        for arm, values in found.items():
            line = f"{name} {arm}: " + " ".join(f"{value:.4f}" for value in values.values())
            base = baseline.get("cross-entropy", {})
            shared = base.keys() & values.keys()
            if arm != "cross-entropy" and shared:
                ratios = [values[seed] / base[seed] for seed in sorted(shared)]
                verdict = "within" if max(ratios) <= GOAL else "beyond"
                line += f"; over cross-entropy: mean {statistics.mean(ratios):.4f}, "
                line += f"largest {max(ratios):.4f} ({verdict} {GOAL})"
            print(line)


def main() -> None:
    """Search, final runs, contrast, summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--workers", type=int, default=1, help="parallel runs")
    parser.add_argument("--only", choices=(*STAGES, "summary"))
    asked = parser.parse_args()
    prepare(asked.folder)
    both, second = experiment(asked.folder, "test"), second_experiment(asked.folder)
    studies = {
        "search": study(asked.folder, "search", [0], search_arms("gemma3")),
        "second": study(asked.folder, "second", [0], search_arms("smollm2"), second),
        "final": study(asked.folder, "final", [0, 1, 2], final_arms()),
        "former": study(asked.folder, "former", [0], former_arms()),
    }
    if asked.only in (None, "extract"):
        for name, body in {"extract": both, "extract-second": second}.items():
            kvdistill("extract", write_yaml(asked.folder / f"{name}.yaml", body))
    if asked.only in (None, "scratch"):
        studies |= scratch_studies(asked.folder)
    for name, path in studies.items():
        if asked.only in (None, name, name.partition("-")[0]):
            ablate(path, asked.workers)
    for name in SCORES:
        if asked.only in (None, name):
            score(asked.folder, name)
        print_scores(asked.folder, name)
    summary(asked.folder)


if __name__ == "__main__":
    main()
