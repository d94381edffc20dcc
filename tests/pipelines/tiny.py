"""An extracted store of two tiny teachers, made once per session, and configs that use it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment, parse_experiment
from kvdistill.pipelines.extract import extract
from tests.slurm.experiment import write_experiment, write_models


def make_extracted(folder: Path) -> Path:
    """Models, experiment file and complete store under ``folder``; returns the file."""
    write_models(folder / "models")
    path = write_experiment(folder, folder / "models")
    extract(load_experiment(path))
    shutil.rmtree(folder / "models" / "bert")  # stage 2 must not miss its teachers
    return path


def variant(path: Path, output: Path, **changes: Any) -> Experiment:
    """The experiment at ``path`` with ``section__key=value`` changes, its runs in ``output``."""
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    body["output_dir"] = str(output)
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = body
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return parse_experiment(body)


def small_extraction(path: Path, output: Path, store: Path) -> Experiment:
    """One teacher with summaries over twelve shards of a sample each; nothing is extracted yet."""
    changes: dict[str, Any] = {
        "store": str(store),
        "teachers": {"llama": {"model": str(path.parent / "models/llama")}},
        "extraction__summaries": True,
        "corpus__max_samples": 16,
        "corpus__shard_chars": 1,
    }
    return variant(path, output, **changes)
