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
NO_TEACHER_LOSSES: Final[dict[str, Any]] = {
    f"losses.{name}": 0.0 for name in (*OF_TEACHERS, "entropy")
}
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
    arms = {"cross-entropy": _arm("no teacher", {**NO_TEACHER_LOSSES, **unset}, ())}
    arms |= {f"single-{name}": _arm(f"{name} alone", {"fusion": {}}, (name,)) for name in names}
    if len(names) > 1:
        weights = (body.get("fusion") or {}).get("weights")
        fixed = {"method": "fixed", **({"weights": weights} if weights else {})}
        similarity, router = {"method": "similarity"}, {"method": "mlp"}
        arms |= {
            "multi-fixed": _arm("all teachers, fixed weights", {"fusion": fixed}),
            "multi-similarity": _arm(
                "all teachers, weights by similarity to the text", {"fusion": similarity}
            ),
            "multi-learnable": _arm(
                "all teachers, weights from a trained router", {"fusion": router}
            ),
        }
    twins = {name: f"{name}{UNTRAINED}" for name in names}
    of_twins = {}
    for section, setting in SETTINGS_BY_TEACHER:
        if given := (body.get(section) or {}).get(setting):
            values = {twin: given[name] for name, twin in twins.items() if name in given}
            of_twins[f"{section}.{setting}"] = values
    return arms | {
        "placebo-shuffled": _arm(
            "keys and values of another text of similar length",
            {"placebo.method": "shuffled"},
            placebo=True,
        ),
        "placebo-untrained": _arm(
            "the teachers' architectures with random weights",
            of_twins,
            tuple(twins.values()),
            placebo=True,
        ),
        "placebo-noise": _arm(
            "noise with the teachers' means and variances",
            {"placebo.method": "noise"},
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
    eviction = "latent.eviction.method"
    return {
        "E1-cross-entropy": _arm("latents without KV targets", NO_TEACHER_LOSSES),
        "E2-whole-text": _arm(
            "tokens evenly spaced over the whole rationale", {eviction: "uniform"}
        ),
        "E3-right-crop": _arm("the rationale's first tokens", {eviction: "right_crop"}),
        "E4-r-kv": _arm("attended and non-redundant tokens (R-KV)", {eviction: "rkv"}),
        "E5-shuffled": _arm(
            "R-KV tokens of another text's rationale",
            {eviction: "rkv", "placebo.method": "shuffled"},
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
    arms = {"all": _arm("all teachers")}
    for left_out in names:
        rest = tuple(name for name in names if name != left_out)
        settings = {"fusion.weights": {name: weights[name] for name in rest}} if weights else {}
        arms[f"without-{left_out}"] = _arm(f"all teachers but {left_out}", settings, rest)
    return arms


def _arm(
    description: str,
    settings: Mapping[str, Any] | None = None,
    teachers: tuple[str, ...] | None = None,
    *,
    placebo: bool = False,
) -> ArmConfig:
    changed = dict(settings or {})
    return ArmConfig(description=description, settings=changed, teachers=teachers, placebo=placebo)


def _teacher_names(body: Body) -> tuple[str, ...]:
    return tuple(body.get("teachers") or ())


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
