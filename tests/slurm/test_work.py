"""Staging folders of crashed workers are removed without harm to a live one."""

from __future__ import annotations

import threading
from pathlib import Path

from kvdistill.store.commit import discard

FILES = 60
ROUNDS = 150


def test_clearing_up_never_touches_a_shard_that_was_published(tmp_path: Path) -> None:
    staging, final = tmp_path / "tmp", tmp_path / "shards"
    staging.mkdir()
    final.mkdir()
    over = threading.Event()

    def clear_up() -> None:
        while not over.is_set():
            for folder in staging.glob("00000.*"):
                discard(folder)

    thread = threading.Thread(target=clear_up)
    thread.start()
    published = 0
    for turn in range(ROUNDS):
        folder = staging / f"00000.{turn}"
        try:
            folder.mkdir()
            for index in range(FILES):
                (folder / str(index)).touch()
            folder.rename(final / str(turn))
            published += 1
        except FileNotFoundError:
            continue  # cleared up under our hands, as a writer that was given up must expect
    over.set()
    thread.join()
    assert {len(list(folder.iterdir())) for folder in final.iterdir()} <= {FILES}
    assert len(list(final.iterdir())) == published
    assert not list(staging.iterdir())


def test_nothing_to_discard_is_no_error(tmp_path: Path) -> None:
    discard(tmp_path / "gone")
