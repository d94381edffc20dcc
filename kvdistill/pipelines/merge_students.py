"""The average of students' weights, as a student folder of its own.

Students that one checkpoint became on different branches, one teacher each say, can be averaged
(Merge-of-Thought, arXiv 2509.08814; *Model soups*, 2203.05482). Of LoRA students, whose folders
hold updates merged into the weights, that is the average of the updates.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvdistill import provenance
from kvdistill.config.load import flatten
from kvdistill.distill.student.latent.model import SETTINGS_FILE
from kvdistill.distill.train.checkpoint import GUARD, PROJECTORS_FILE, STREAM
from kvdistill.errors import ConfigError, StudentError
from kvdistill.pipelines.evaluate import require_student_folder
from kvdistill.pipelines.run_folder import RunFolder, card_head, markdown_table
from kvdistill.store.commit import commit_folder, publish_folder, staging_folder
from kvdistill.store.format import COMMIT
from kvdistill.text import brief, markdown_text, parse_json

log = logging.getLogger(__name__)

OF_ONE_RUN: Final = (COMMIT, GUARD, PROJECTORS_FILE, STREAM, "README.md")
"""Files that an average does not take over from a student."""

INITIAL: Final = "initial weights"
MAY_DIFFER: Final = ("transformers_version", "_name_or_path")
"""Settings of a model that no weight depends on."""


def merge_students(students: Sequence[Path], weights: Sequence[float], output: Path) -> Path:
    """Write the weighted average of students, in their dtypes, to the new folder ``output``.

    Reads one tensor of every student at a time, and holds one file of the average.

    Args:
        students: runs, or folders of their students; tokenizer and settings are the first one's.
        weights: one per student, scaled to sum to one; equal if empty.
        output: does not exist yet.

    Raises:
        ConfigError: fewer than two students, or weights that do not fit them.
        StudentError: a folder is no student, ``output`` exists, or the students differ in
            architecture, vocabulary, tensors or initial weights.
        StoreError: the disk is full, or the folder cannot be written.
    """
    weights = weights or [1.0] * len(students)
    valid = all(0 <= weight < math.inf for weight in weights) and any(weights)
    if not valid or not 2 <= len(students) == len(weights):
        raise ConfigError(
            "merge-students: expected two or more students and a weight ≥ 0 for each, not all 0; "
            f"got {len(students)} students and weights {brief(list(weights))}"
        )
    if output.exists():
        raise StudentError(f"{output} already exists; choose another name, or remove it first")
    folders = [path / "student" if (path / "student").is_dir() else path for path in students]
    _require_alike(folders)
    shares = [weight / math.fsum(weights) for weight in weights]
    with staging_folder(output.parent, output.name) as staged:
        for path in sorted(folders[0].iterdir()):
            if path.suffix == ".safetensors" and path.name != PROJECTORS_FILE:
                _average_file(folders, path.name, shares, staged)
            elif path.is_file() and path.name not in OF_ONE_RUN:
                shutil.copy(path, staged)
        (staged / "README.md").write_text(_card(output.name, folders, shares), encoding="utf-8")
        commit_folder(staged)
        if not publish_folder(staged, output):
            raise StudentError(f"{output} was made meanwhile; choose another name")
    return output


def _require_alike(folders: Sequence[Path]) -> None:
    ours, *others = [_traits(folder) for folder in folders]
    for folder, theirs in zip(folders[1:], others, strict=True):
        for name in [*ours, *theirs]:
            mine, other = ours.get(name), theirs.get(name)
            if mine != other and (name != INITIAL or (mine and other)):
                raise StudentError(
                    f"{folder}: {name} is {brief(other)}, but {brief(mine)} in {folders[0]}; merge "
                    "students that one checkpoint became"
                )


def _traits(folder: Path) -> dict[str, Any]:
    """Everything in which students must agree, by name.

    Raises:
        StudentError: the folder is no student, or a file of it is damaged.
    """
    require_student_folder(folder)
    try:
        present = [folder / n for n in ("config.json", SETTINGS_FILE) if (folder / n).is_file()]
        found = {k: v for p in present for k, v in flatten(parse_json(p.read_bytes())).items()}
        tokenizer = parse_json((folder / "tokenizer.json").read_bytes())
        tokens = json.dumps([tokenizer["model"], tokenizer["added_tokens"]]).encode()
        size, digest = len(tokenizer["model"]["vocab"]), xxhash.xxh3_64_hexdigest(tokens)
        found["vocabulary"] = f"{size} tokens ({digest[:8]})"
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys() if path.name != PROJECTORS_FILE else ():
                    part = file.get_slice(name)
                    found[f"{path.name}/{name}"] = f"{part.get_dtype()} {part.get_shape()}"
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise StudentError(f"{folder}: {brief(str(error))}; restore it from a copy") from error
    record = RunFolder(folder.parent).read_record() if folder.name == "student" else {}
    found[INITIAL] = record.get("controls", {}).get("initial_student")
    if found[INITIAL] is None:
        log.warning("%s: its initial weights are not known, so they are not compared", folder)
    return {name: trait for name, trait in found.items() if name not in MAY_DIFFER}


def _average_file(
    folders: Sequence[Path], file_name: str, shares: Sequence[float], into: Path
) -> None:
    """Average one file of weights, in float64; integers must be equal."""
    average = {}
    with ExitStack() as stack:
        paths = [folder / file_name for folder in folders]
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for name in files[0].keys():  # noqa: SIM118
            first, *others = (file.get_tensor(name) for file in files)
            total = first.double() * shares[0]
            for share, other in zip(shares[1:], others, strict=True):
                if not first.is_floating_point() and not torch.equal(first, other):
                    raise StudentError(f"{paths[0]}: the integers of {name} differ from another's")
                total.add_(other, alpha=share)
            average[name] = total.to(first.dtype) if first.is_floating_point() else first
        save_file(average, into / file_name, metadata=files[0].metadata())


def _card(name: str, folders: Sequence[Path], shares: Sequence[float]) -> str:
    """README.md of the average."""
    names = [markdown_text(str(folder)) for folder in folders]
    students = {n: f"{share:.6g}" for n, share in zip(names, shares, strict=True)}
    parts = [
        card_head(name, {}),
        "The average of the weights of students that kvdistill trained from one checkpoint.",
        markdown_table("Students and their weights", students),
        markdown_table("Provenance", provenance.versions()),
    ]
    return "\n\n".join(parts) + "\n"
