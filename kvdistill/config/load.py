"""Reading an experiment from YAML, with overrides, into one clear line when it is wrong."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from kvdistill.config.base import current_names
from kvdistill.config.experiment import Experiment
from kvdistill.errors import ConfigError

PRESETS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "phase-1": {"fusion": {"method": "fixed"}},
    "phase-2": {"fusion": {"method": "fixed"}, "losses": {"cosine": 0.1}},
    "phase-3": {"fusion": {"method": "similarity"}, "losses": {"cosine": 0.1}},
    "phase-4": {
        "projection": {"mode": "frozen"},
        "fusion": {
            "method": "mlp",
            "granularity": "layer",
            "entropy": "diverse",
            "warmup_steps": 100,
        },
        "losses": {"inject": 1.0, "entropy": 0.01},
    },
    "phase-5": {
        "projection": {"mode": "shared_space"},
        "losses": {"inject": 1.0, "round_trip": 1.0},
    },
    "kava": {
        "alignment": {"time": "latent"},
        "projection": {"mode": "identity"},
        "extraction": {"hidden_at_cue": True},
        "losses": {"key": 0.5, "value": 0.5, "layer_std": True, "codi": 10.0, "rationale": 1.0},
        "latent": {"method": "pccot"},
    },
}
"""Named starting points. A preset is plain settings under the file's own, which win:

1 two teachers, fixed weights · 2 several architectures, or samples of one teacher · 3 weights by
similarity · 4 a router that learns from an injected cache · 5 one space for every model · kava: a
student that reasons in latent positions (arXiv 2510.02312).
"""


def load_experiment(path: Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment from a YAML file.

    Args:
        path: The file. Relative paths inside it are taken from the current folder.
        overrides: ``a.b=value`` settings; the value is read as YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type, or parts that do not
            fit each other. The message is one line and names the key.
    """
    body = read_yaml(path)
    for given in overrides:
        override(body, given)
    return parse_experiment(body, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, as they are.

    Raises:
        ConfigError: no such file, or not YAML of keys and values.
    """
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; `kvdistill init {path}` writes one")
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(body).__name__}")
    return _with_current_names(body, str(path))


def parse_experiment(body: dict[str, Any], where: str = "config") -> Experiment:
    """Validate a plain dictionary; ``where`` names its origin in errors.

    Raises:
        ConfigError: as for ``load``.
    """
    try:
        body = _with_current_names(body, where)
        return Experiment.model_validate(_with_preset(body, where))
    except ValidationError as error:
        problems = error.errors()
        # An unknown key is usually the cause of a missing one, so it is reported first.
        problem = min(problems, key=lambda item: item["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {_validation_line(problem)}{more}") from None


def dump_experiment(experiment: Experiment) -> str:
    """The whole experiment as YAML, defaults included; ``load`` reads it back."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with_current_names(body: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return current_names(body)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _with_preset(body: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of ``preset``, under those that the file gives itself."""
    name = body.get("preset")
    if name is None:
        return body
    if name not in PRESETS:
        raise ConfigError(f"{where}: no preset {name!r}; there are: {', '.join(PRESETS)}")
    merged = dict(body)
    for section, settings in PRESETS[name].items():
        given = merged.get(section) or {}
        merged[section] = settings | given if isinstance(given, dict) else given
    return merged


def flatten(body: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as ``{"training.epochs": 2, …}``."""
    if not isinstance(body, dict):
        return {prefix: body}
    flat: dict[str, Any] = {}
    for key, value in body.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def override(body: dict[str, Any], given: str) -> None:
    """Apply one ``a.b=value``; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form.
    """
    dotted, sign, value = given.partition("=")
    if not sign or not dotted.strip():
        raise ConfigError(f"--set {given}: expected key=value, such as training.epochs=2")
    try:
        put(body, dotted.strip(), yaml.safe_load(value), f"--set {given}")
    except yaml.YAMLError:
        raise ConfigError(f"--set {given}: the value is not YAML") from None


def put(body: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set one setting, or a whole section, by its dotted name.

    Raises:
        ConfigError: a part of the name is a value, not a section; ``where`` begins the message.
    """
    ((dotted, value),) = current_names({dotted: value}).items()
    *parents, last = dotted.split(".")
    place = body
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: {parent} is a value, not a section")
    place[last] = value


def _validation_line(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location) or "experiment"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {dotted}; {hint}"
    if problem["type"] == "missing":
        return f"{dotted} is required"
    if problem["type"] == "value_error":
        return f"{dotted}: {problem['ctx']['error']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{dotted}: {message}, got {problem['input']!r}"


def _known_keys(location: list[str]) -> list[str]:
    model: type[BaseModel] = Experiment
    inside_mapping = False
    for part in location:
        if inside_mapping:
            inside_mapping = False
            continue
        annotation = model.model_fields[part].annotation
        section = _section(annotation)
        if section is None:
            return []
        model = section
        inside_mapping = typing.get_origin(annotation) is dict
    return sorted(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside ``X``, ``X | None`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (dict, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            found = _section(argument)
            if found is not None:
                return found
    return None
