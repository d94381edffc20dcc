"""Options that several commands share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


config_argument: Decorator = click.argument("config", type=click.Path(path_type=Path))


overrides_option: Decorator = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting, such as training.epochs=2; repeat for more.",
)


json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for a script instead of text."
)


@contextmanager
def extraction_bars(quiet: bool = False) -> Iterator[Callable[[Any], None]]:
    """Yields what ``pipelines.extract.extract`` takes as ``progress``.

    On a terminal, bars; in a log file, one line per committed shard, which a log can keep.
    """
    if quiet:
        yield lambda word: None
    elif sys.stderr.isatty():
        with _bars() as tell:
            yield tell
    else:
        yield _Lines()


class _Lines:
    """For logs: a line whenever a shard is committed, with the teacher's rate so far."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._began: dict[str, float] = {}

    def __call__(self, word: Any) -> None:
        name = word.teacher
        began = self._began.setdefault(name, time.monotonic())
        self._tokens[name] = self._tokens.get(name, 0) + word.tokens
        if not word.committed:
            return
        # Over all shards: one is written while the next is read, so none has a time of its own.
        rate = self._tokens[name] / max(time.monotonic() - began, 1e-9)
        print(
            f"{name} {word.shards_done}/{word.shards_total} shard {word.shard_id} "
            f"committed, {rate:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _bars() -> Iterator[Callable[[Any], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards  {task.fields[rate]:>9,.0f} tokens/s"),
        Remaining(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        rows: dict[str, Any] = {}
        tokens: dict[str, int] = {}
        began: dict[str, float] = {}

        def tell(word: Any) -> None:
            name = word.teacher
            if name not in rows:
                rows[name] = bars.add_task(name, total=word.shards_total, rate=0.0)
                tokens[name], began[name] = 0, time.monotonic()
            tokens[name] += word.tokens
            rate = tokens[name] / max(time.monotonic() - began[name], 1e-9)
            bars.update(rows[name], completed=word.shards_done, rate=rate)

        yield tell


# MERGED-DOC commands.progress
# Progress bars of extraction: one per teacher, by shards, with tokens per second and ETA.
