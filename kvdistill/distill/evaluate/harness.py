"""Benchmarks of lm-evaluation-harness, for figures that are comparable with published ones.

Tasks are the harness's own, which fetch their data from the Hugging Face hub, or YAML files, which
may use local data. The harness is an extra because of its many dependencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvdistill.config.training import StudentConfig
from kvdistill.distill.student.build import build_student, load_student_tokenizer
from kvdistill.distill.student.latent.model import is_latent
from kvdistill.errors import ConfigError, MissingExtra, StudentError
from kvdistill.text import near, shorten


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    """None where the harness computes none."""


def run_harness(
    student: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[TaskFigure]:
    """Score a student's folder on tasks: names of the harness, or paths of task files (``.yaml``).

    ``limit`` is a number of problems per task; ``max_length`` is the model's own if not given.

    Raises:
        MissingExtra: lm-evaluation-harness is not installed.
        StudentError: no such folder, or a latent student.
        ConfigError: no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtra(
            "--harness needs lm-evaluation-harness: pip install 'kvdistill[harness]'"
        ) from None
    if not (student / "config.json").is_file():
        raise StudentError(f"{student} is not a model folder (it has no config.json)")
    if is_latent(student):
        raise StudentError(
            f"{student} holds a latent student, which the harness cannot run; use --generate"
        )
    # Indexing the harness's own tasks reads thousands of files; task files need no index.
    manager = TaskManager(include_defaults=any(not _is_task_file(task) for task in tasks))
    chosen = [_resolve_task(task, manager) for task in tasks]
    tokenizer = load_student_tokenizer(str(student))
    model = build_student(StudentConfig(model=str(student)), tokenizer, seed=0).eval()
    served = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    options = {"limit": limit, "log_samples": False, "bootstrap_iters": 1000}
    try:
        found = simple_evaluate(served, tasks=chosen, task_manager=manager, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a task is YAML, templates, code and data of somebody else
        cause = f"{type(error).__name__}: {shorten(str(error))}"
        raise ConfigError(
            f"the harness cannot run {', '.join(tasks)}: {cause}; check the task"
        ) from error
    return _task_figures(found["results"])


def _is_task_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _resolve_task(task: str, manager: Any) -> str:
    """A task's name, or the absolute path of its file."""
    if _is_task_file(task):
        if not Path(task).is_file():
            raise ConfigError(f"no task file at {task}; give a path, or a name of the harness")
        return str(Path(task).absolute())
    if task not in manager.all_tasks:
        hint = near(task, manager.all_tasks) or "; see `lm_eval ls tasks`"
        raise ConfigError(f"the harness has no task {task!r}{hint}")
    return task


def _task_figures(results: dict[str, dict[str, Any]]) -> list[TaskFigure]:
    """Rows of ``{"task": {"acc,none": 0.5, "acc_stderr,none": 0.1, …}}``."""
    found = []
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else f"{metric} ({variant})"
            found.append(
                TaskFigure(task, name, float(value), error if isinstance(error, float) else None)
            )
    return found
