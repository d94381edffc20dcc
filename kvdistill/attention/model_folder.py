"""Why a model or a tokenizer cannot be loaded as it is: one line, the remedy last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kvdistill.text import parse_json, shorten


def loading_fault(
    source: str,
    error: Exception,
    needed: Literal["config.json", "tokenizer.json"] = "config.json",
    remedy: str = "",
) -> str:
    """What is wrong with ``source``, a folder or a hub id; else the words of ``error``.

    The error is of transformers, the hub, a quantiser or remote code, and often names no file.
    """
    folder = Path(source)
    if folder.is_file():
        return "it is a file (give its folder; of a GGUF file, also its name as gguf_file)"
    if not folder.is_dir() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        return "there is no such folder (check the path)"
    if folder.is_dir() and not (folder / needed).is_file() and not any(folder.glob("*.gguf")):
        return f"it has no {needed} (give a folder that `save_pretrained` has written)"
    patterns = ["*.json", "*.safetensors"] if needed == "config.json" else ["*.json"]
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        if folder.is_dir() and (fault := _file_fault(path)):
            return f"{path.name} {fault}"
    cause = shorten(str(error), 250)
    if not isinstance(error, (OSError, ValueError, RuntimeError)):
        cause = f"{type(error).__name__}: {cause}"
    if folder.is_dir():
        return f"{cause} ({remedy or f'check its {needed}'})"
    hub = "no folder either: check the name and your access; offline, run `kvdistill fetch` before"
    return f"{cause} ({remedy or hub})"


def _file_fault(path: Path) -> str | None:
    """What is wrong with the outline of a JSON or a safetensors file."""
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer (fetch the file with `git lfs pull`)"
        try:
            size_bytes = path.stat().st_size
            if path.suffix == ".json":
                parse_json(start + file.read())
                return None
            file.seek(8)
            header = parse_json(file.read(min(int.from_bytes(start[:8], "little"), size_bytes)))
            ends = [header[name]["data_offsets"][1] for name in header if name != "__metadata__"]
            if size_bytes == (expected := file.tell() + max(ends, default=0)):
                return None
            fault = f"has {size_bytes:,} bytes, but its header describes {expected:,}"
        except (ValueError, LookupError, TypeError) as error:
            fault = f"is {shorten(str(error), 150)}" if start else "is empty"
    return f"{fault} (copy or download it again)"


def weights_fault(model: Any, info: Mapping[str, Any], *, with_heads: bool = True) -> str | None:
    """How the weights of a checkpoint differ from those of the model that its config describes.

    ``info`` is transformers' ``output_loading_info`` with ``ignore_mismatched_sizes``, without tied
    weights and those that are known to be left over. A base model is loaded without heads.
    """
    kind = type(model).__name__
    lacking = {key for key in info["missing_keys"] if "pooler" not in key}
    unused = {key for key in info["unexpected_keys"] if with_heads or _is_part(key, model)}
    shapes = {f"{k}: {[*has]}, not {[*wants]}" for k, has, wants in info["mismatched_keys"]}
    for keys, fault in (
        (shapes, f"parameters have other shapes than those of {kind} ({{}})"),
        (lacking, f"parameters of {kind} are missing ({{}}) and would be random"),
        (unused, f"parameters are not used by {kind} ({{}}) and would be dropped"),
    ):
        if keys:
            named = ", ".join(sorted(keys)[:3]) + (", …" if len(keys) > 3 else "")
            return f"{len(keys)} {fault.format(named)}; give a checkpoint that fits its config.json"
    return None


def _is_part(key: str, model: Any) -> bool:
    """Whether a weight that a model lacks is of a module that it has, or of one more layer."""
    module, names = model, key.removeprefix(f"{model.base_model_prefix}.").split(".")
    while (child := dict(module.named_children()).get(names[0])) is not None:
        module, names = child, names[1:]
    return module is not model and (isinstance(module, nn.ModuleList) or len(names) == 1)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' bar over the weights from overwriting bars that are already shown."""
    from transformers.utils import logging

    is_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            logging.enable_progress_bar()
