"""The config's training section as transformers' arguments."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from kvdistill.config.load import parse_experiment
from kvdistill.distill.train.set_up import training_arguments


def arguments(folder: Path, **training: Any) -> Any:
    body = {
        "name": "x", "store": "s", "corpus": {"path": "c.jsonl"},
        "student": {"model": "m"}, "losses": {"key": 0, "value": 0},
        "training": {"device": "cpu", **training},
    }  # fmt: skip
    return training_arguments(parse_experiment(body), folder, evaluates=True)


@pytest.mark.parametrize(
    ("variables", "installed", "wanted"),
    [
        ({}, True, ["tensorboard"]),
        ({"WANDB_PROJECT": "p"}, True, ["tensorboard", "wandb"]),
        ({"WANDB_API_KEY": "k"}, True, ["tensorboard", "wandb"]),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, True, ["tensorboard"]),
        ({"WANDB_PROJECT": "p"}, False, ["tensorboard"]),
    ],
)
def test_weights_and_biases_is_used_where_it_is_asked_for_and_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    installed: bool,
    wanted: list[str],
) -> None:
    for name in ("WANDB_PROJECT", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: installed or None if name == "wandb" else find(name, *rest),
    )  # fmt: skip
    from kvdistill.distill.train import set_up as module

    assert module.log_destinations() == wanted


@pytest.mark.parametrize(
    ("precision", "flags"),
    [("float32", (False, False)), ("bfloat16", (True, False)), ("float16", (False, True))],
)
def test_precision_is_mixed_as_asked(
    tmp_path: Path, precision: str, flags: tuple[bool, bool]
) -> None:
    made = arguments(tmp_path, precision=precision)
    assert (made.bf16, made.fp16) == flags
