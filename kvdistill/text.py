"""Numbers and values as people read them, in messages, tables and reports; JSON of anybody."""

from __future__ import annotations

import difflib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def format_bytes(size_bytes: float) -> str:
    """A size in decimal units with up to three figures: ``512 B``, ``5.2 MB``, ``534 MB``."""
    unit = 0
    while size_bytes >= 999.5 and unit < len(_UNITS) - 1:
        size_bytes /= 1000
        unit += 1
    digits = 1 if unit and size_bytes < 99.95 else 0
    return f"{size_bytes:,.{digits}f} {_UNITS[unit]}"


def parse_bytes(text: str) -> float:
    """A size such as ``2TB``, ``500 GB`` or ``1.5TiB``, in bytes; ValueError if it is none."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKMGTP]?)(i?)B\s*", text)
    if found is None or not float(found[1]) > 0:
        raise ValueError(f"{shorten(text, 50)!r} is no size; write it as 2TB, 500GB or 1.5TiB")
    power = " KMGTP".index(found[2].upper() or " ")
    return float(float(found[1]) * (1024 if found[3] else 1000) ** power)


def format_duration(seconds: float) -> str:
    """A duration in its natural unit: ``0.4 s``, ``97 s``, ``35 min``, ``15.3 h``."""
    if seconds < 119.5:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7170 else f"{seconds / 3600:,.1f} h"


def brief(value: Any) -> str:
    """``repr`` for a message: at most about 100 characters, whatever the value holds."""
    if isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > 3:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 256:
        return "an integer of more than 77 digits"
    return shorten(repr(value), 100)


def markdown_text(value: object) -> str:
    """Text that Markdown shows as it is: one line, in which no HTML, link or column begins."""
    line = " ".join(html.escape(str(value), quote=False).split())
    return re.sub(r"([\\`|\[\]])", r"\\\1", line)


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean …?``, or nothing where no known name is like it."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shorten(text: str, limit: int = 300) -> str:
    """One line of at most ``limit`` characters: white space collapsed, the middle left out."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    tail = (limit - 3) // 3
    return f"{line[: limit - 3 - tail]} … {line[-tail:]}"


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON document.

    Raises:
        ValueError: not JSON, nested too deeply, or a key given twice, in a few words.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({shorten(str(error), 150)})") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {brief(twice)} is given twice")
    return found
