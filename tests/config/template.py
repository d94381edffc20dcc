"""The experiment file of ``kvdistill init``, with changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import kvdistill.config

TEMPLATE = Path(kvdistill.config.__file__).with_name("experiment.yaml")


def template(**changes: Any) -> dict[str, Any]:
    """The template's content; ``losses__key=1`` sets ``losses.key``, unknown keys included."""
    body: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    for name, value in changes.items():
        *parents, last = name.split("__")
        section = body
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return body
