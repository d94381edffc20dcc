"""Why a model or a tokenizer cannot be loaded: one line, the remedy last."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from kvdistill.text import parse_json, shorten

HUB_REMEDY: Final = (
    "check the name and your access to it; without a network, run `kvdistill fetch` ahead of time"
)
AGAIN: Final = "copy or download it again"


def loading_fault(
    source: str,
    error: Exception,
    needed: Literal["config.json", "tokenizer.json"] = "config.json",
    remedy: str | None = None,
) -> str:
    """What is wrong with ``source``, a folder or a hub id; else the words of ``error``.

    The error is of transformers, the hub, a quantiser or remote code, and often names none of it.
    """
    if fault := _folder_fault(source, needed):
        return fault
    cause = shorten(str(error), 250)
    if not isinstance(error, (OSError, ValueError, RuntimeError)):
        cause = f"{type(error).__name__}: {cause}"
    if "ignore_mismatched_sizes" in cause:
        cause = "its weights have other shapes than its config.json states"
        remedy = "use the config.json that they were saved with"
    local = f"check its {needed}" if Path(source).is_dir() else HUB_REMEDY
    return f"{cause} ({remedy or local})"


def _folder_fault(source: str, needed: str) -> str | None:
    folder = Path(source)
    if folder.is_file():
        return "it is a file (give its folder; of a GGUF file, also its name as gguf_file)"
    if not folder.is_dir():
        is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1
        return "there is no such folder (check the path)" if is_path else None
    if not (folder / needed).is_file() and not any(folder.glob("*.gguf")):
        return f"it has no {needed} (give a folder that `save_pretrained` has written)"
    weights = folder.glob("*.safetensors") if needed == "config.json" else ()
    for path in sorted([*folder.glob("*.json"), *weights]):
        if fault := _file_fault(path):
            return f"{path.name} {fault}"
    return None


def _file_fault(path: Path) -> str | None:
    """What is wrong with a JSON or a safetensors file; None if its outline is right."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer (fetch the file with `git lfs pull`)"
        if not start:
            return f"is empty ({AGAIN})"
        try:
            if path.suffix == ".json":
                parse_json(start + file.read())
                return None
            file.seek(8)
            header = parse_json(file.read(min(int.from_bytes(start[:8], "little"), size_bytes)))
            ends = [header[name]["data_offsets"][1] for name in header if name != "__metadata__"]
            expected = file.tell() + max(ends, default=0)
        except (ValueError, LookupError, TypeError) as error:
            return f"is {shorten(str(error), 150)} ({AGAIN})"
    return (
        None
        if size_bytes == expected
        else (f"has {size_bytes:,} bytes, but its header describes {expected:,} ({AGAIN})")
    )
