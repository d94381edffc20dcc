"""The config's training section as transformers' arguments."""

from __future__ import annotations

import importlib.machinery
import logging
import os
import re
import resource
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState
from transformers.training_args import ParallelMode

from kvdistill.config.load import parse_experiment
from kvdistill.config.training import TrainingConfig
from kvdistill.distill.train.callbacks import RunTensorBoard, RunWandb
from kvdistill.distill.train.devices import chosen_precision
from kvdistill.distill.train.set_up import log_callbacks, trackers, training_arguments
from kvdistill.errors import ConfigError, MissingExtra


def experiment_of(name: str = "x", report_to: list[str] | None = None, **training: Any) -> Any:
    body = {
        "name": name, "store": "s", "corpus": {"path": "c.jsonl"}, "report_to": report_to,
        "student": {"model": "m"}, "losses": {"key": 0, "value": 0},
        "training": {"device": "cpu", **training},
    }  # fmt: skip
    return parse_experiment(body)


def arguments(folder: Path, **settings: Any) -> Any:
    return training_arguments(experiment_of(**settings), folder, evaluates=True)


@pytest.mark.parametrize(
    ("variables", "installed", "wanted"),
    [
        ({}, True, [RunTensorBoard]),
        ({"WANDB_PROJECT": "p"}, True, [RunTensorBoard, RunWandb]),
        ({"WANDB_API_KEY": "k"}, True, [RunTensorBoard, RunWandb]),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, True, [RunTensorBoard]),
        ({"WANDB_PROJECT": "p"}, False, [RunTensorBoard]),
    ],
)
def test_weights_and_biases_is_used_where_it_is_asked_for_and_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    installed: bool,
    wanted: list[type],
) -> None:
    for name in ("WANDB_PROJECT", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if installed:
        fake_wandb(monkeypatch)
    assert [type(callback) for callback in log_callbacks(experiment_of(), tmp_path)] == wanted


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the ``wandb`` module that records which run every figure goes to."""
    wandb: Any = types.ModuleType("wandb")
    errors: Any = types.ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = type("ConfigError", (Exception,), {})
    wandb.run, wandb.logged, wandb.config = None, [], types.SimpleNamespace()
    wandb.config.update = lambda *_, **__: None

    def init(project: str, name: str | None = None) -> None:
        wandb.run = types.SimpleNamespace(name=name, summary={}, _label=lambda **_: None)

    wandb.init = init
    wandb.finish = lambda: setattr(wandb, "run", None)
    wandb.log = lambda row: wandb.logged.append((wandb.run.name, row))
    install(monkeypatch, wandb, errors)
    return wandb


def install(monkeypatch: pytest.MonkeyPatch, *modules: types.ModuleType) -> None:
    for module in modules:
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for ``mlflow``; as there, a figure without a run starts one of any name."""
    mlflow: Any = types.ModuleType("mlflow")
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=9999, MAX_PARAMS_TAGS_PER_BATCH=100)
    mlflow.utils = types.SimpleNamespace(validation=limits)
    mlflow.__version__, mlflow.logged, mlflow.open = "3.17", [], []
    mlflow.is_tracking_uri_set = lambda: True
    mlflow.get_tracking_uri = lambda: "file:mlruns"
    mlflow.active_run = lambda: mlflow.open[-1] if mlflow.open else None

    def start_run(run_name: str, nested: bool) -> None:
        mlflow.open.append(
            types.SimpleNamespace(name=run_name, info=types.SimpleNamespace(run_id=1))
        )

    def log_metrics(metrics: dict[str, float], step: int, synchronous: bool) -> None:
        mlflow.logged.append((mlflow.open[-1].name if mlflow.open else "any name", metrics))

    mlflow.start_run, mlflow.log_metrics = start_run, log_metrics
    mlflow.log_params = lambda *_, **__: None
    mlflow.end_run = mlflow.open.pop
    install(monkeypatch, mlflow)
    return mlflow


def fake_trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for ``trackio``: ``init`` opens a run of a project, ``finish`` closes it."""
    trackio: Any = types.ModuleType("trackio")
    trackio.logged, trackio.open = [], []
    current = types.SimpleNamespace(get=lambda: None)
    trackio.context_vars = types.SimpleNamespace(current_space_id=current)
    trackio.config = types.SimpleNamespace(update=lambda *_, **__: None)

    def init(project: str, name: str, **_: Any) -> None:
        trackio.open.append(f"{project}/{name}")

    trackio.init, trackio.finish = init, trackio.open.pop
    trackio.log = lambda row: trackio.logged.append((trackio.open[-1], row))
    install(monkeypatch, trackio)
    return trackio


def finished_run(folder: Path, **settings: Any) -> None:
    """What the trainer does with its logs in one run, the last evaluation included."""
    made, state, control = arguments(folder, **settings), TrainerState(), TrainerControl()
    state.is_world_process_zero = True
    callbacks = log_callbacks(experiment_of(**settings), folder)
    for callback in callbacks:
        callback.on_train_begin(made, state, control)
        callback.on_log(made, state, control, logs={"loss": 1.0})
        callback.on_train_end(made, state, control)
        callback.on_log(made, state, control, logs={"eval_perplexity": 2.0})
    for callback in callbacks:
        callback.close()


def test_every_run_of_a_process_has_its_own_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "p")
    wandb = fake_wandb(monkeypatch)
    before = dict(os.environ)
    for name in ("a-s0", "b-s0"):
        finished_run(tmp_path / name, name=name)
        assert [*(tmp_path / name / "tensorboard").iterdir()], name
    assert [name for name, _ in wandb.logged] == ["a-s0", "a-s0", "b-s0", "b-s0"]
    assert dict(os.environ) == before
    wandb.init("p", name="the user's")
    finished_run(tmp_path / "c", name="c")
    assert wandb.run.name == wandb.logged[-1][0] == "the user's"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "shared"))
    finished_run(tmp_path / "d", name="d")
    assert [*(tmp_path / "shared" / "d").iterdir()]


def test_mlflow_and_trackio_have_a_run_per_run_with_its_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, trackio = fake_mlflow(monkeypatch), fake_trackio(monkeypatch)
    for name in ("a-s0", "b-s0"):
        finished_run(tmp_path / name, name=name, report_to=["mlflow", "trackio"])
        assert not (tmp_path / name / "tensorboard").exists()
    assert [name for name, _ in mlflow.logged] == ["a-s0", "a-s0", "b-s0", "b-s0"]
    assert mlflow.logged[1][1] == {"eval_perplexity": 2.0}
    projects = ["kvdistill/a-s0", "kvdistill/a-s0", "kvdistill/b-s0", "kvdistill/b-s0"]
    assert [name for name, _ in trackio.logged] == projects
    assert trackio.logged[1][1]["eval/perplexity"] == 2.0
    assert mlflow.open == trackio.open == []
    mlflow.start_run("the user's", nested=False)
    finished_run(tmp_path / "c", name="c", report_to=["mlflow"])
    assert mlflow.open[-1].name == mlflow.logged[-1][0] == "the user's"


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy() -> None:
    with pytest.raises(MissingExtra, match="report_to: wandb is not installed; pip install wandb"):
        trackers(experiment_of(report_to=["tensorboard", "wandb"]))
    assert trackers(experiment_of(report_to=[])) == ()
    with pytest.raises(ConfigError, match=r"report_to.*'tensorboard', 'wandb', 'mlflow' or"):
        experiment_of(report_to=["tensorbored"])


def test_a_server_that_is_gone_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = fake_mlflow(monkeypatch)

    def refuse(**_: Any) -> None:
        raise RuntimeError("no answer from\n  http://nowhere")

    mlflow.start_run = refuse
    finished_run(tmp_path / "a", name="a", report_to=["mlflow", "tensorboard"])
    (record,) = caplog.records
    assert "mlflow gets no more curves (RuntimeError: no answer from http" in record.message
    assert [*(tmp_path / "a/tensorboard").iterdir()]


def test_curves_that_cannot_be_written_are_one_warning_and_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for a full disk: the writer's thread meets it."""
    hook, limit = threading.excepthook, resource.getrlimit(resource.RLIMIT_FSIZE)
    threading.excepthook = threading.__excepthook__  # prints, where pytest's would collect
    made, state, control = arguments(tmp_path), TrainerState(), TrainerControl()
    state.is_world_process_zero = True
    (callback,) = log_callbacks(experiment_of(), tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        callback.on_train_begin(made, state, control)
        for step in range(200):
            state.global_step = step
            callback.on_log(made, state, control, logs={"loss": 1.0})
        callback.on_train_end(made, state, control)
        callback.on_log(made, state, control, logs={"eval_perplexity": 2.0})
        callback.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        restored, threading.excepthook = threading.excepthook, hook
    (record,) = caplog.records
    assert re.search(r"tensorboard gets no more curves \(OSError.*File too large", record.message)
    assert "Traceback" not in capfd.readouterr().err
    assert restored is threading.__excepthook__


@pytest.mark.parametrize(
    ("precision", "flags"),
    [("float32", (False, False)), ("bfloat16", (True, False)), ("float16", (False, True))],
)
def test_precision_is_mixed_as_asked(
    tmp_path: Path, precision: str, flags: tuple[bool, bool]
) -> None:
    made = arguments(tmp_path, precision=precision)
    assert (made.bf16, made.fp16) == flags


@pytest.mark.parametrize(
    ("gpu", "native", "device", "deepspeed", "bf16"),
    [
        (True, True, "auto", "", True),
        (True, False, "auto", "", False),
        (False, True, "auto", "", False),
        (True, True, "cpu", "", False),
        (True, True, "auto", "true", False),
    ],
)
def test_precision_is_bfloat16_by_default_where_the_device_computes_in_it(  # noqa: PLR0917
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    gpu: bool, native: bool, device: str, deepspeed: str, bf16: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", deepspeed)
    training = TrainingConfig(device=device)
    assert chosen_precision(training) == ("bfloat16" if bf16 else "float32")
    for given in ("float32", "float16"):
        assert chosen_precision(training.model_copy(update={"precision": given})) == given


def test_the_optimizer_is_fused_and_matrix_products_are_not_tf32(tmp_path: Path) -> None:
    assert arguments(tmp_path).optim == "adamw_torch_fused"
    assert torch.get_float32_matmul_precision() == "highest"


def test_one_process_that_sees_two_gpus_trains_on_one_and_says_how_to_use_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level(logging.WARNING):
        made = arguments(tmp_path, device="auto", batch_size=3)
    assert (made.n_gpu, made.train_batch_size) == (1, 3)
    assert made.parallel_mode is ParallelMode.NOT_PARALLEL
    model = nn.Linear(2, 2)
    assert Trainer(model, made)._wrap_model(model) is model  # and not an nn.DataParallel
    (record,) = caplog.records
    assert "x: 2 GPUs are visible" in record.getMessage()
    assert "torchrun --nproc_per_node=2 -m kvdistill.cli train" in record.getMessage()


def test_one_device_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert arguments(tmp_path).n_gpu == 0
    assert not caplog.records


def test_processes_without_an_accelerator_train_together_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would give each of them a world of its own."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert arguments(tmp_path, device="auto").use_cpu
