"""Generate docs/config.md from the schema: ``python docs/make_config_reference.py``."""

from __future__ import annotations

import inspect
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kvdistill.config.experiment import Experiment

HEAD = """# Every setting

An experiment is one YAML file. `kvdistill init` writes a commented one, `kvdistill config show
FILE` prints a file with all defaults filled in, and `--set section.key=value` overrides one setting
for one run. Unknown keys are rejected; former names of renamed keys still work, with a warning.

This page is generated from the schema, which `kvdistill config schema` prints as JSON.
"""


def reference() -> str:
    """The whole page as Markdown."""
    lines = [HEAD]
    _section(Experiment, "", lines)
    return "\n".join(lines)


def _section(model: type[BaseModel], prefix: str, lines: list[str]) -> None:
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    lines += [f"\n## {title}\n", f"{_summary(model)}\n", "| key | type | default | |"]
    lines += ["|---|---|---|---|"]
    inner = []
    for name, field in model.model_fields.items():
        section = _model(field.annotation)
        if section is not None:
            mapping = typing.get_origin(field.annotation) is dict
            inner.append((section, f"{prefix}{name}." + ("NAME." if mapping else "")))
        default = "required" if field.is_required() else f"`{_shown(field.default)}`"
        text = " ".join((field.description or (_summary(section) if section else "")).split())
        lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {text} |")
    for section, path in inner:
        _section(section, path, lines)


def _summary(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n")[0].replace("``", "`")


def _shown(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "see below"
    if default is None or isinstance(default, bool):
        return {None: "none", True: "true", False: "false"}[default]
    return str(default) or '""'


def _type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return " / ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in typing.get_args(annotation) if a is not type(None))
    if origin is dict:
        return "mapping"
    if origin in (tuple, list):
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true / false"}.get(
        getattr(annotation, "__name__", ""), str(getattr(annotation, "__name__", "any")).lower()
    )


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (dict, typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            found = _model(argument)
            if found is not None:
                return found
    return None


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(reference(), encoding="utf-8")
