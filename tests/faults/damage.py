"""Ways in which a file is damaged, and rounds of them over every file of a folder."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.verdict import Commands, Outcome, faults_of, outcomes

Damage = Callable[[Path, random.Random, list[Path]], None]


def _flip(path: Path, rng: random.Random, files: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, rng: random.Random, files: list[Path]) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size or 1))


def _append(path: Path, rng: random.Random, files: list[Path]) -> None:
    with path.open("ab") as file:
        file.write(rng.choice([b"\0", b"\n", b"x" * 100, rng.randbytes(5000)]))


def _become_another(path: Path, rng: random.Random, files: list[Path]) -> None:
    path.write_bytes(rng.choice(files).read_bytes())


def _become_a_sibling(path: Path, rng: random.Random, files: list[Path]) -> None:
    """Of the same name elsewhere, which is the most plausible content that is wrong."""
    path.write_bytes(rng.choice([p for p in files if p.name == path.name]).read_bytes())


def _become_a_folder(path: Path, rng: random.Random, files: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def _zeros(path: Path, rng: random.Random, files: list[Path]) -> None:
    """A block that never reached the disk."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) or 1)
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "flip": _flip,
    "truncate": _truncate,
    "empty": lambda path, rng, files: path.write_bytes(b"") and None,
    "delete": lambda path, rng, files: path.unlink(),
    "append": _append,
    "another": _become_another,
    "sibling": _become_a_sibling,
    "folder": _become_a_folder,
    "zeros": _zeros,
}


def damaged(
    pristine: Path, work: Path, count: int, seed: int, only: Callable[[str], bool]
) -> Iterator[str]:
    """Copy a folder to ``work`` with one damaged file each: every file in turn, kinds at random."""
    rng = random.Random(seed)
    files = sorted(p.relative_to(pristine) for p in pristine.rglob("*") if p.is_file())
    files = [path for path in files if only(path.as_posix())]
    rng.shuffle(files)
    for i in range(count):
        name, how = files[i % len(files)], rng.choice([*DAMAGES, "flip"])
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(pristine, work)
        DAMAGES[how](work / name, rng, [pristine / each for each in files])
        yield f"{i}: {how} {name}"


def round_of_damages(
    pristine: Path,
    work: Path,
    commands: Commands,
    *,
    count: int,
    seed: int,
    only: Callable[[str], bool] = lambda name: True,
    also: Callable[[dict[str, Outcome]], str] = lambda found: "",
) -> list[str]:
    """Everything that went wrong. ``commands`` look at ``work``, a damaged copy of ``pristine``;
    ``also`` finds what a single command's outcome does not show.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work)
    wanted = outcomes(commands)
    assert {outcome.how for outcome in wanted.values()} == {"done"}, wanted
    faults, ends = [], Counter[str]()
    for where in damaged(pristine, work, count, seed, only):
        found = outcomes(commands)
        faults += faults_of(found, wanted, where, path_length=len(str(work)) * 2)
        if more := also(found):
            faults.append(f"{where}: {more}")
        ends["refused" if "refused" in {o.how for o in found.values()} else "no effect"] += 1
    print(
        f"\n{count} damages of {pristine.name}, seed {seed}: {dict(ends)}, {len(faults)} faults",
        *faults,
        sep="\n",
    )
    return faults
