"""The arms of a study: known designs, grids, and what the file says itself.

A design is a plain function from the experiment's settings to arms, so that its arms can be
printed, read and changed like any others. The designs and what they control for are in
``docs/ablations.md``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvdistill.config.distill import OF_TEACHERS
from kvdistill.config.study import AblationConfig, AblationPreset, ArmConfig
from kvdistill.errors import ConfigError

BASELINE: Final = "cross-entropy"


UNTRAINED: Final = "-untrained"
"""Ends the name of a teacher's twin whose weights are random."""


Body = Mapping[str, Any]


Arms = dict[str, ArmConfig]


def cross_entropy_only(body: Body) -> ArmConfig:
    """No teacher at all: every loss that needs one is off."""
    off: dict[str, Any] = {f"losses.{name}": 0.0 for name in (*OF_TEACHERS, "entropy")}
    off |= {section: {} for section in ("projection", "fusion", "placebo") if body.get(section)}
    return ArmConfig(settings=off, teachers=(), description="the text alone, no teacher")


def eight_arms(body: Body) -> Arms:
    """Cross-entropy, each teacher alone, three ways to fuse all of them, and three placebos."""
    names = _teacher_names(body)
    arms = {BASELINE: cross_entropy_only(body)}
    plain: dict[str, Any] = {"fusion": {}}
    for name in names:
        arms[f"single-{name}"] = ArmConfig(
            settings=plain, teachers=(name,), description=f"{name} alone"
        )
    if len(names) > 1:
        arms |= _fused(body)
    untrained = tuple(f"{name}{UNTRAINED}" for name in names)
    several: dict[str, Any] = {}
    for section, setting in (("fusion", "weights"), ("alignment", "explicit_layers")):
        given = (body.get(section) or {}).get(setting)
        if given:
            twins = {f"{name}{UNTRAINED}": given[name] for name in names if name in given}
            several = several | {f"{section}.{setting}": twins}
    return arms | {
        "placebo-shuffled": ArmConfig(
            settings={"placebo.method": "shuffled"},
            description="another text's keys and values, of like length",
            placebo=True,
        ),
        "placebo-untrained": ArmConfig(
            settings=several,
            teachers=untrained,
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
    """Which tokens of a rationale teach a latent student, and whether it must be its own."""
    if not body.get("latent"):
        raise ConfigError(
            "preset E1-E5 compares which teacher tokens a latent student learns from, and the "
            "experiment has no `latent` section; start from `preset: kava` (docs/latent.md)"
        )

    def evict(method: str, description: str, **more: Any) -> ArmConfig:
        settings = {"latent.eviction.method": method, **more}
        placebo = bool(more)
        return ArmConfig(settings=settings, description=description, placebo=placebo)

    own = {f"losses.{name}": 0.0 for name in (*OF_TEACHERS, "entropy")}
    return {
        "E1-cross-entropy": ArmConfig(settings=own, description="latents without targets"),
        "E2-whole-text": evict("uniform", "tokens evenly spaced over the whole rationale"),
        "E3-right-crop": evict("right_crop", "the rationale's first tokens"),
        "E4-r-kv": evict("rkv", "tokens that are attended to and not redundant"),
        "E5-shuffled": evict(
            "rkv", "R-KV of another text's rationale", **{"placebo.method": "shuffled"}
        ),
    }


def leave_one_out(body: Body) -> Arms:
    """All teachers, and all but each."""
    names = _teacher_names(body)
    if len(names) < 2:
        raise ConfigError(
            f"preset leave-one-out leaves out each of several teachers; there are {list(names)}"
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


def arms_of(config: AblationConfig, body: Body) -> Arms:
    """All arms of a study by name, the baseline first.

    Args:
        config: the study.
        body: its experiment's settings, as the file has them.

    Raises:
        ConfigError: a preset does not fit the experiment, two arms have one name, or the
            baseline is not among them.
    """
    sources = [
        PRESETS[config.preset](body) if config.preset else {},
        config.arms,
        _grid_arms(config),
    ]
    arms: Arms = {}
    for found in sources:
        twice = sorted(set(arms) & set(found))
        if twice:
            raise ConfigError(f"study {config.name}: two arms have the name {twice[0]!r}")
        arms |= found
    baseline = config.baseline or next(iter(arms))
    if baseline not in arms:
        raise ConfigError(
            f"study {config.name}: no arm {baseline!r} to compare with; there are: "
            f"{', '.join(arms)}"
        )
    return {baseline: arms[baseline]} | arms


def extra_teachers(config: AblationConfig, body: Body) -> dict[str, Any]:
    """Teachers that some arms have and the experiment has not: the file's, and untrained twins."""
    twins = {}
    if config.preset == "eight-arms":
        for name in _teacher_names(body):
            own = {k: v for k, v in body["teachers"][name].items() if k != "gguf_file"}
            twins[f"{name}{UNTRAINED}"] = {**own, "weights": "random"}
    return twins | dict(config.teachers)


def _fused(body: Body) -> Arms:
    """Three ways to weigh all teachers."""
    weights = (body.get("fusion") or {}).get("weights")
    fixed = {"method": "fixed", **({"weights": weights} if weights else {})}
    return {
        "multi-fixed": ArmConfig(settings={"fusion": fixed}, description="all, fixed weights"),
        "multi-similarity": ArmConfig(
            settings={"fusion": {"method": "similarity"}},
            description="all, weighed by how typical a text is of each",
        ),
        "multi-learnable": ArmConfig(
            settings={"fusion": {"method": "mlp"}}, description="all, weighed by a router"
        ),
    }


def _grid_arms(config: AblationConfig) -> Arms:
    """Every combination of the grid's values."""
    if not config.grid:
        return {}
    arms = {}
    for values in itertools.product(*config.grid.values()):
        settings = dict(zip(config.grid, values, strict=True))
        arms[_name(settings)] = ArmConfig(settings=settings)
    if len(arms) < len(list(itertools.product(*config.grid.values()))):
        raise ConfigError(f"study {config.name}: two combinations of `grid` have one name")
    return arms


def _name(settings: Body) -> str:
    """``key-10_mode-frozen``: the last part of every setting and its value."""
    parts = [f"{setting.rpartition('.')[2]}-{value}" for setting, value in settings.items()]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts)).strip("-._")[:90]


def _teacher_names(body: Body) -> tuple[str, ...]:
    return tuple(body.get("teachers") or ())
