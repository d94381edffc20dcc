"""The arms of a study: those of a preset, those the study file names, and those of its grid.

A preset is a plain function from the experiment's settings to arms, so that its arms are printed,
read and changed like any others. What each preset controls for is in ``docs/ablations.md``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvdistill.config.distill import OF_TEACHERS
from kvdistill.config.study import AblationConfig, AblationPreset, ArmConfig
from kvdistill.errors import ConfigError

Body = Mapping[str, Any]
"""An experiment's settings, as its file has them."""
Arms = dict[str, ArmConfig]

UNTRAINED: Final = "-untrained"
"""Suffix of the untrained twin of a teacher: the same architecture, random weights."""
NO_TEACHER_LOSSES: Final = {f"losses.{name}": 0.0 for name in (*OF_TEACHERS, "entropy")}
SETTINGS_BY_TEACHER: Final = (("fusion", "weights"), ("alignment", "explicit_layers"))


def arms_of(config: AblationConfig, body: Body) -> Arms:
    """All arms of a study by name, the baseline first.

    Raises:
        ConfigError: a preset does not fit the experiment, two arms have one name, or the
            baseline is not among them.
    """
    arms: Arms = {}
    preset = PRESETS[config.preset](body) if config.preset else {}
    for name, arm in (*preset.items(), *config.arms.items(), *_grid_arms(config)):
        if name in arms:
            raise ConfigError(f"study {config.name}: two arms are named {name!r}; rename one")
        arms[name] = arm
    baseline = config.baseline or next(iter(arms))
    if baseline not in arms:
        raise ConfigError(
            f"study {config.name}: no arm {baseline!r} to use as the baseline; the arms are: "
            f"{', '.join(arms)}"
        )
    return {baseline: arms[baseline]} | arms


def extra_teachers(config: AblationConfig, body: Body) -> dict[str, Any]:
    """Teachers of single arms: those that the study file adds, and untrained twins."""
    twins = {}
    if config.preset == "eight-arms":
        for name in _teacher_names(body):
            own = {k: v for k, v in body["teachers"][name].items() if k != "gguf_file"}
            twins[f"{name}{UNTRAINED}"] = {**own, "weights": "random"}
    return twins | dict(config.teachers)


def eight_arms(body: Body) -> Arms:
    """Cross-entropy, each teacher alone, three ways to fuse all of them, and three placebos."""
    names = _teacher_names(body)
    unset: dict[str, Any] = {
        section: {} for section in ("projection", "fusion", "placebo") if body.get(section)
    }
    arms = {
        "cross-entropy": ArmConfig(
            settings={**NO_TEACHER_LOSSES, **unset}, teachers=(), description="no teacher"
        )
    }
    for name in names:
        arms[f"single-{name}"] = ArmConfig(
            settings={"fusion": {}}, teachers=(name,), description=f"{name} alone"
        )
    if len(names) > 1:
        weights = (body.get("fusion") or {}).get("weights")
        fixed = {"method": "fixed", **({"weights": weights} if weights else {})}
        for name, fusion, how in (
            ("multi-fixed", fixed, "fixed weights"),
            ("multi-similarity", {"method": "similarity"}, "weights by similarity to the text"),
            ("multi-learnable", {"method": "mlp"}, "weights from a trained router"),
        ):
            arms[name] = ArmConfig(settings={"fusion": fusion}, description=f"all teachers, {how}")
    return arms | _placebos(body)


def _placebos(body: Body) -> Arms:
    names = _teacher_names(body)
    of_twins: dict[str, Any] = {}
    for section, setting in SETTINGS_BY_TEACHER:
        if given := (body.get(section) or {}).get(setting):
            of_twins[f"{section}.{setting}"] = {
                f"{name}{UNTRAINED}": given[name] for name in names if name in given
            }
    return {
        "placebo-shuffled": ArmConfig(
            settings={"placebo.method": "shuffled"},
            description="keys and values of another text of similar length",
            placebo=True,
        ),
        "placebo-untrained": ArmConfig(
            settings=of_twins,
            teachers=tuple(f"{name}{UNTRAINED}" for name in names),
            description="the teachers' architectures with random weights",
            placebo=True,
        ),
        "placebo-noise": ArmConfig(
            settings={"placebo.method": "noise"},
            description="noise with the teachers' means and variances",
            placebo=True,
        ),
    }


def e1_to_e5(body: Body) -> Arms:
    """Which tokens of a rationale a latent student learns from, and whether they must be its own.

    Raises:
        ConfigError: the experiment has no ``latent`` section.
    """
    if not body.get("latent"):
        raise ConfigError(
            "preset E1-E5 compares eviction methods for a latent student, and the experiment has "
            "no `latent` section; start from `preset: kava` (docs/latent.md)"
        )

    def evict(method: str, description: str) -> ArmConfig:
        return ArmConfig(settings={"latent.eviction.method": method}, description=description)

    return {
        "E1-cross-entropy": ArmConfig(
            settings=dict(NO_TEACHER_LOSSES), description="latents without KV targets"
        ),
        "E2-whole-text": evict("uniform", "tokens evenly spaced over the whole rationale"),
        "E3-right-crop": evict("right_crop", "the rationale's first tokens"),
        "E4-r-kv": evict("rkv", "tokens that are attended to and not redundant (R-KV)"),
        "E5-shuffled": ArmConfig(
            settings={"latent.eviction.method": "rkv", "placebo.method": "shuffled"},
            description="R-KV tokens of another text's rationale",
            placebo=True,
        ),
    }


def leave_one_out(body: Body) -> Arms:
    """All teachers, and all but each.

    Raises:
        ConfigError: fewer than two teachers.
    """
    names = _teacher_names(body)
    if len(names) < 2:
        raise ConfigError(
            f"preset leave-one-out needs at least 2 teachers, got {list(names)}; add a teacher"
        )
    weights = (body.get("fusion") or {}).get("weights") or {}
    arms = {"all": ArmConfig(description="all teachers")}
    for left_out in names:
        rest = tuple(name for name in names if name != left_out)
        settings = {"fusion.weights": {name: weights[name] for name in rest}} if weights else {}
        arms[f"without-{left_out}"] = ArmConfig(
            settings=settings, teachers=rest, description=f"all teachers but {left_out}"
        )
    return arms


PRESETS: Final[dict[AblationPreset, Callable[[Body], Arms]]] = {
    "eight-arms": eight_arms,
    "E1-E5": e1_to_e5,
    "leave-one-out": leave_one_out,
}


def _grid_arms(config: AblationConfig) -> list[tuple[str, ArmConfig]]:
    """Every combination of the grid's values, named like ``key-10_mode-frozen``."""
    arms = []
    for values in itertools.product(*config.grid.values()) if config.grid else ():
        settings = dict(zip(config.grid, values, strict=True))
        parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items())
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-._")[:90]
        arms.append((name, ArmConfig(settings=settings)))
    return arms


def _teacher_names(body: Body) -> tuple[str, ...]:
    return tuple(body.get("teachers") or ())
