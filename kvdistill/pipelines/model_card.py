"""The model card of a student: what it learned from, how well it does, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from kvdistill.config.experiment import Experiment
from kvdistill.store.manifest import TeacherManifest


def model_card(
    experiment: Experiment,
    teachers: Mapping[str, TeacherManifest],
    corpus_fingerprint: str,
    record: Mapping[str, Any],
) -> str:
    """README.md of a student's folder, for people and for the hub.

    Args:
        experiment: what was asked.
        teachers: what the store says of the teachers whose keys and values were used.
        corpus_fingerprint: of the training texts.
        record: ``run.json`` of the finished run.
    """
    student = experiment.student
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kvdistill", "knowledge-distillation", "kv-cache"],
    }
    if student.model is not None:
        head["base_model"] = student.model
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {experiment.name}",
        _what(experiment, teachers),
        _how_to_load(experiment),
        _teacher_section(teachers),
        _training_section(experiment, record),
        _evaluation(record),
        _provenance(corpus_fingerprint, record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(experiment: Experiment, teachers: Mapping[str, TeacherManifest]) -> str:
    student = experiment.student
    start = "from scratch" if student.model is None else f"from `{student.model}`"
    if student.lora is not None:
        start += f", by LoRA updates of rank {student.lora.rank} that are merged into its weights"
    source = "on text alone, without teachers"
    if teachers:
        source = f"through the key/value caches of {', '.join(teachers)}"
    return f"A language model that was trained {start}, {source}, with kvdistill."


def _how_to_load(experiment: Experiment) -> str:
    lines = [
        "## How to load it",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'student = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
    ]
    if experiment.latent is not None:
        lines.append("\nIts latent reasoning needs `kvdistill.distill.latent.student`.")
    return "\n".join(lines)


def _teacher_section(teachers: Mapping[str, TeacherManifest]) -> str:
    if not teachers:
        return ""
    rows = [
        f"| {name} | `{t.model}` | {t.revision or '–'} | {len(t.layers)} | "
        f"{t.codec.key}/{t.codec.value} | `{t.weights_fingerprint[:12]}` |"
        for name, t in teachers.items()
    ]
    columns = ("name", "model", "revision", "layers", "codec (keys/values)", "weights")
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    return "\n".join(["## Teachers", "", head, *rows])


def _training_section(experiment: Experiment, record: Mapping[str, Any]) -> str:
    training = experiment.training
    weights = {name: weight for name, weight in experiment.losses.weights().items() if weight}
    rows = {
        "losses": ", ".join(f"{weight:g} · {name}" for name, weight in weights.items()),
        "projection": experiment.projection.mode,
        "fusion": experiment.fusion.method,
        "steps": record["steps"],
        "batch": f"{training.batch_size} × {training.gradient_accumulation_steps}",
        "learning rate": f"{training.learning_rate:g}, {training.schedule}",
        "precision": training.precision,
        "seed": experiment.seed,
        "seconds": f"{record['seconds']:.0f}",
    }
    if record.get("best"):
        rows["best step"] = record["best"]["step"]
    return _markdown_table("Training", rows)


def _evaluation(record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    if not metrics:
        return ""
    rows = {name.removeprefix("eval_").replace("_", " "): f"{v:.6g}" for name, v in metrics.items()}
    return _markdown_table("Held-out samples", rows)


def _provenance(corpus_fingerprint: str, record: Mapping[str, Any]) -> str:
    last = record["attempts"][-1]
    rows = {
        "corpus": f"`{corpus_fingerprint[:12]}` (SHA-256 of its samples)",
        "commit": last["git_commit"] or "–",
        "started": last["started"],
        **last["versions"],
    }
    return _markdown_table("Provenance", rows)


def _markdown_table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])
