"""Loading an experiment: YAML, presets and ``--set`` overrides in, one-line errors out."""

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
from kvdistill.config.yaml_text import impossible_value, parse_yaml
from kvdistill.errors import ConfigError
from kvdistill.text import brief, shorten

PRESETS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    # two teachers, fixed weights
    "phase-1": {"fusion": {"method": "fixed"}},
    # several architectures, or several samples of one teacher
    "phase-2": {"fusion": {"method": "fixed"}, "losses": {"cosine": 0.1}},
    # weights by similarity
    "phase-3": {"fusion": {"method": "similarity"}, "losses": {"cosine": 0.1}},
    # a router trained through an injected cache
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
    # one space shared by all models
    "phase-5": {
        "projection": {"mode": "shared_space"},
        "losses": {"inject": 1.0, "round_trip": 1.0},
    },
    # a student that reasons in latent positions (KaVa, arXiv 2510.02312)
    "kava": {
        "alignment": {"time": "latent"},
        "projection": {"mode": "identity"},
        "extraction": {"hidden_at_cue": True},
        "losses": {"key": 0.5, "value": 0.5, "layer_std": True, "codi": 10.0, "rationale": 1.0},
        "latent": {"method": "pccot"},
    },
}
"""Named defaults, section by section; the keys of the experiment file win over them."""


def load_experiment(path: Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment from a YAML file.

    Args:
        path: The file. Relative paths inside it are relative to the current folder.
        overrides: ``a.b=value`` settings; the value is parsed as YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type, or settings that exclude
            each other. The message is one line and names the key.
    """
    body = read_yaml(path)
    for assignment in overrides:
        override(body, assignment)
    return parse_experiment(body, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, former names of settings replaced.

    Raises:
        ConfigError: no such file, or not a YAML mapping.
    """
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; `kvdistill init {path}` writes one")
    try:
        body = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {shorten(str(error))}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(body).__name__}")
    return _renamed(body, str(path))


def parse_experiment(body: dict[str, Any], where: str = "config") -> Experiment:
    """Validate a plain dictionary; ``where`` is its origin in error messages.

    Raises:
        ConfigError: as for ``load_experiment``.
    """
    if impossible := impossible_value(body):
        raise ConfigError(f"{where}: {impossible}")
    try:
        return Experiment.model_validate(_with_preset(_renamed(body, where), where))
    except ValidationError as error:
        problems = error.errors()
        # An unknown key is usually the cause of a missing one, so it is reported first.
        problem = min(problems, key=lambda item: item["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {shorten(_validation_line(problem), 450)}{more}") from None


def dump_experiment(experiment: Experiment) -> str:
    """The whole experiment as YAML, defaults included; ``load_experiment`` reads it back."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(body: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as ``{"training.epochs": 2, …}``."""
    if not isinstance(body, dict):
        return {prefix: body}
    flat: dict[str, Any] = {}
    for key, value in body.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def override(body: dict[str, Any], assignment: str) -> None:
    """Apply one ``a.b=value`` in place; the value is parsed as YAML.

    Raises:
        ConfigError: the assignment is malformed.
    """
    where = f"--set {shorten(assignment, 100)}"
    dotted, sign, value = assignment.partition("=")
    if not sign or not dotted.strip():
        raise ConfigError(f"{where}: expected key=value, such as training.epochs=2")
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"{where}: the value is not valid YAML: {error}") from None
    put(body, dotted.strip(), parsed, where)


def put(body: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set one setting, or a whole section, in place by its dotted name.

    Raises:
        ConfigError: a prefix of the name is a value, not a section; ``where`` starts the message.
    """
    ((dotted, value),) = _renamed({dotted: value}, where).items()
    *parents, last = dotted.split(".")
    section = body
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: {parent} is a value, not a section")
    section[last] = value


def _renamed(body: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return current_names(body)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _with_preset(body: dict[str, Any], where: str) -> dict[str, Any]:
    name = body.get("preset")
    if name is None:
        return body
    if not isinstance(name, str) or name not in PRESETS:
        available = ", ".join(PRESETS)
        raise ConfigError(f"{where}: no preset {brief(name)}; available presets: {available}")
    merged = dict(body)
    for section, settings in PRESETS[name].items():
        given = merged.get(section) or {}
        merged[section] = settings | given if isinstance(given, dict) else given
    return merged


def _validation_line(problem: Any) -> str:
    """A pydantic error as one line: dotted key, what is wrong, and the nearest valid key."""
    location = [str(part) for part in problem["loc"]]
    dotted = shorten(".".join(location), 100) or "experiment"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {dotted}; {hint}"
    if problem["type"] == "missing":
        return f"{dotted} is required"
    if problem["type"] == "value_error":
        return f"{dotted}: {shorten(str(problem['ctx']['error']))}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{dotted}: {shorten(message)}, got {brief(problem['input'])}"


def _known_keys(location: list[str]) -> list[str]:
    """Keys of the section at a location; inside a mapping, the next part is a name, not a key."""
    model: type[BaseModel] = Experiment
    parts = iter(location)
    for part in parts:
        annotation = model.model_fields[part].annotation
        section = _section(annotation)
        if section is None:
            return []
        model = section
        if typing.get_origin(annotation) is dict:
            next(parts, None)
    return sorted(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside ``X``, ``X | None`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (dict, typing.Union, types.UnionType):
        return next(filter(None, map(_section, typing.get_args(annotation))), None)
    return None
