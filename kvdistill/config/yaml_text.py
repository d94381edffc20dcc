"""YAML that somebody else may have written: plain data, bounded, every key once.

PyYAML's safe loader executes nothing, but takes the last of two equal keys, shares aliases that
multiply to any size once they are walked, and ends in errors of many kinds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, Final

import yaml

from kvdistill.text import brief, shorten

MAX_VALUES: Final = 100_000
"""Values of a document, aliases expanded."""

MAX_DEPTH: Final = 100


class _Loader(yaml.SafeLoader):
    """The safe loader, without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"the key {brief(key)} is given twice (line {line})")
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The data in a YAML document.

    Raises:
        ValueError: not YAML, a key given twice, values nested too deeply or multiplied by aliases,
            or a value that no setting can have (NaN, infinity, a control character). One line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > MAX_VALUES:
            raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except (yaml.YAMLError, AttributeError, LookupError, TypeError) as error:
        # All but the first come from values that do not fit their tag, such as `!!timestamp x`.
        raise ValueError(shorten(str(error))) from None


def _num_values(node: yaml.Node, sizes: dict[int, int], depth: int = 0) -> int:
    """Values under a node, each alias counted wherever it stands; linear in the file's length."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("an alias contains itself")
        return sizes[id(node)]
    sizes[id(node)] = 0  # open
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    sizes[id(node)] = 1 + sum(_num_values(part, sizes, depth + 1) for part in parts)
    return sizes[id(node)]


def impossible_value(value: Any, dotted: str = "") -> str | None:
    """The first value, or key, that no setting can have, as ``name: what is wrong``; else None."""
    if isinstance(value, dict):
        for key, inner in value.items():
            name = f"{dotted}.{key}" if dotted else str(key)
            if not isinstance(key, str):
                return f"{shorten(name, 100)}: expected a name as key, got {brief(key)}"
            found = impossible_value(key, name) or impossible_value(inner, name)
            if found is not None:
                return found
    elif isinstance(value, (list, tuple)):
        return next(filter(None, (impossible_value(inner, dotted) for inner in value)), None)
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{shorten(dotted, 100)}: expected a finite number, got {value}"
    elif isinstance(value, str) and any(_is_control(char) for char in value):
        return f"{shorten(dotted, 100)!r}: control characters are not allowed, got {brief(value)}"
    return None


def _is_control(char: str) -> bool:
    return (char < " " and char not in "\t\n\r") or "\ud800" <= char <= "\udfff" or char == "\x7f"
