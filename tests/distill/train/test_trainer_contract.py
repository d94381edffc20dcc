"""What the trainer relies on of transformers: fails loudly when a private method moves.

Public methods are stable within the bounds that ``pyproject.toml`` sets. The private ones that are
overridden, and the public one with a private parameter, are compared by signature.
"""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import transformers
from packaging.requirements import Requirement
from transformers import Trainer

from kvdistill.distill.train.trainer import KVDistillTrainer

SIGNATURES = {
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_load_from_checkpoint": (
        "(self, resume_from_checkpoint: str, model: torch.nn.modules.module.Module | None = None)"
        " -> None"
    ),
    "save_model": "(self, output_dir: str | None = None, _internal_call: bool = False) -> None",
}
PRIVATE = {name for name in SIGNATURES if name.startswith("_")}


def test_the_overridden_private_methods_are_these_and_have_these_signatures() -> None:
    own = {name for name in vars(KVDistillTrainer) if name.startswith("_")}
    inherited = {name for name in own & set(dir(Trainer)) if not name.startswith("__")}
    assert inherited == PRIVATE
    found = {name: str(inspect.signature(getattr(Trainer, name))) for name in SIGNATURES}
    assert found == SIGNATURES


def test_every_overridden_method_takes_what_the_trainer_passes() -> None:
    """Positional parameters of the Trainer's own keep their names and order."""
    for name in vars(KVDistillTrainer).keys() & set(dir(Trainer)):
        theirs, ours = getattr(Trainer, name), getattr(KVDistillTrainer, name)
        if name.startswith("__") or not inspect.isfunction(ours):
            continue
        parameters = inspect.signature(ours).parameters
        open_ended = {p.kind for p in parameters.values()} & {
            inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
        }  # fmt: skip
        if not open_ended:
            assert list(parameters) == list(inspect.signature(theirs).parameters), name


def test_the_private_methods_are_called_where_the_trainer_expects_it() -> None:
    """The norm before clipping is read before the optimizer steps; weights load before training."""
    epoch = inspect.getsource(Trainer._run_epoch)
    calls = ["_clip_grad_norm(", "_get_grad_norm(", "on_pre_optimizer_step(", "optimizer.step()"]
    assert [epoch.index(call) for call in calls] == sorted(epoch.index(call) for call in calls)
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(Trainer.train)


def test_transformers_is_bounded_above() -> None:
    project = Path(__file__).parents[3] / "pyproject.toml"
    dependencies = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = {Requirement(line).name: Requirement(line).specifier for line in dependencies}
    assert transformers.__version__ in bounds["transformers"]
    assert any(clause.operator == "<" for clause in bounds["transformers"])
