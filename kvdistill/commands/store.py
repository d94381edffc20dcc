"""Commands on a store: look into it, check it, convert, merge, remove a teacher."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from kvdistill.commands.options import json_option
from kvdistill.errors import ConfigError, ShardCorrupt, StoreMismatch
from kvdistill.store.reader import KVStore

if TYPE_CHECKING:
    from kvdistill.store.maintenance import Finding
    from kvdistill.store.summary import TeacherSummary


store_argument = click.argument("store", type=click.Path(path_type=Path))


@click.command("inspect")
@store_argument
@click.option("--teacher", "only", multiple=True, help="Only this teacher; repeat for more.")
@click.option("--plots", type=click.Path(path_type=Path), help="Write a PNG per teacher here.")
@click.option("--shards", default=4, show_default=True, help="Shards read for largest norms.")
@click.option("--scheduler", help="Address of a dask scheduler; threads of this process if none.")
@json_option
def inspect_command(
    store: Path,
    only: tuple[str, ...],
    plots: Path | None,
    shards: int,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Look into a STORE: teachers, sizes, norms, outlier channels, importance."""
    opened = KVStore.open(store)
    names = [name for name in opened.teachers() if not only or name in only]
    for name in set(only) - set(names):
        opened.teacher(name)
    with _dask(scheduler):
        reports = [_report(opened, name, shards, plots) for name in names if opened.committed(name)]
    empty = sorted(name for name in names if not opened.committed(name))
    if as_json:
        print(json.dumps({"store": str(store), "teachers": reports, "empty": empty}, indent=1))
        return
    from kvdistill.commands.store_tables import print_reports

    print_reports(opened, reports, empty)


@click.command("verify")
@store_argument
@click.option("--teacher", "only", multiple=True, help="Only this teacher; repeat for more.")
@click.option("--repair", "mend", is_flag=True, help="Move bad shards aside, to be made again.")
@click.option(
    "--against-teacher",
    "count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also read N samples through each teacher of --config again and compare.",
)
@click.option("--config", type=click.Path(path_type=Path), help="The experiment, to load teachers.")
@click.option("--scheduler", help="Address of a dask scheduler; this process if none.")
@json_option
def verify_command(
    store: Path,
    only: tuple[str, ...],
    mend: bool,
    count: int | None,
    config: Path | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Check every file of a STORE: presence, checksums, shapes, finiteness, offsets."""
    from kvdistill.store.maintenance import repair_store
    from kvdistill.store.maintenance import verify_store as check

    opened = KVStore.open(store)
    names = list(only) or opened.teachers()
    if scheduler is None:
        findings = check(opened, names, progress=_say("checked"))
    else:
        findings = _verify_on(scheduler, opened, names)
    moved = repair_store(opened, findings) if mend else []
    compared = [] if count is None or findings else _against_teachers(opened, names, count, config)
    if as_json:
        print(
            json.dumps(
                {
                    "findings": [asdict(finding) for finding in findings],
                    "moved": [str(path) for path in moved],
                    "against_teacher": compared,
                },
                indent=1,
            )
        )
    else:
        for finding in findings:
            print(f"{finding.teacher or 'corpus'} {finding.shard_id}: {finding.problem}")
        for path in moved:
            print(f"moved to {path}")
        for line in compared:
            print(
                f"{line['teacher']}: {line['samples']} samples read again, relative error of keys "
                f"{line['key_error']:.1e}, of values {line['value_error']:.1e}"
            )
    _conclude(opened, names, len(findings), bool(moved), compared)


@click.command("convert")
@store_argument
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", "backend", type=click.Choice(["zarr", "safetensors"]), required=True)
def convert_command(store: Path, target: Path, backend: Literal["zarr", "safetensors"]) -> None:
    """Copy a STORE to TARGET in the other backend; needs no teacher. Run again to continue."""
    from kvdistill.store.maintenance import convert_store as copy

    made = copy(KVStore.open(store), target, backend, progress=_say("converted"))
    print(f"{made.paths.root}: {len(made.teachers())} teachers in {backend}")
    print(f"next: kvdistill verify {made.paths.root}")


@click.command("merge")
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--prototypes",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="extraction.prototypes of the experiment, for teachers that only now are complete.",
)
def merge_command(target: Path, sources: tuple[Path, ...], prototypes: int) -> None:
    """Copy into TARGET the shards of other stores over the same corpus that it lacks."""
    from kvdistill.store.maintenance import merge_stores as bring
    from kvdistill.store.prototypes import lacks_prototypes, make_prototypes

    opened = KVStore.open(target)
    copied = bring(opened, [KVStore.open(source) for source in sources], progress=_say("copied"))
    print(f"{target}: {copied} shards copied")
    for name in opened.teachers():
        missing = opened.missing(name)
        state = f"{len(missing)} shards missing" if missing else "complete"
        if lacks_prototypes(opened, name):
            make_prototypes(opened, name, prototypes)
            state += ", prototypes made"
        elif missing and opened.teacher(name).has_summaries:
            state += "; its prototypes need all of them"
        print(f"  {name}: {state}")


@click.command("rm")
@store_argument
@click.option("--teacher", required=True, help="Which teacher to remove.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm_command(store: Path, teacher: str, yes: bool) -> None:
    """Remove one teacher and all its shards from a STORE."""
    from kvdistill.store.maintenance import remove_teacher

    opened = KVStore.open(store)
    opened.teacher(teacher)
    count = len(opened.committed(teacher))
    if not yes:
        click.confirm(f"Remove {teacher} with {count} shards from {store}?", abort=True)
    remove_teacher(opened, teacher)
    print(f"{store}: removed {teacher}, {count} shards; left: {opened.teachers() or 'no teacher'}")


def _report(store: KVStore, teacher: str, shards: int, plots: Path | None) -> dict[str, Any]:
    """Everything of one teacher as JSON-ready data; writes its plot where asked."""
    from kvdistill.store.lazy_arrays import committed_in_order
    from kvdistill.store.summary import importance_histogram, largest_norms, summarise_teacher
    from kvdistill.types import KINDS

    summary = summarise_teacher(store, teacher)
    read = committed_in_order(store, teacher)[:shards]
    histogram = importance_histogram(store, teacher, read)
    if plots is not None:
        _plot(summary, histogram, plots)
    return {
        **asdict(summary),
        "ratio": summary.ratio,
        "largest_norms": {kind: largest_norms(store, teacher, kind, read) for kind in KINDS},
        "shards_read": len(read),
        "importance": None
        if histogram is None
        else {"counts": histogram[0].tolist(), "edges": histogram[1].tolist()},
    }


def _plot(summary: TeacherSummary, histogram: Any, folder: Path) -> None:
    from kvdistill.store.summary import plot_teacher

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{summary.teacher}.png"
    plot_teacher(summary, histogram, path)
    print(f"wrote {path}", file=sys.stderr)


def _say(done: str) -> Any:
    def progress(teacher: str, shard_id: str) -> None:
        print(f"{done} {teacher} {shard_id}", file=sys.stderr)

    return progress


@contextmanager
def _dask(scheduler: str | None) -> Iterator[None]:
    """Compute on a distributed scheduler, or on threads of this process."""
    if scheduler is None:
        yield
        return
    from kvdistill.errors import MissingExtra

    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtra("--scheduler needs distributed: pip install distributed") from error
    with Client(scheduler):
        yield


def _verify_on(scheduler: str, store: KVStore, names: Sequence[str]) -> list[Finding]:
    """Check every committed shard as a task of its own, on a distributed scheduler."""
    with _dask(scheduler):
        from distributed import get_client

        client = get_client()
        root = str(store.paths.root.absolute())
        tasks = [
            client.submit(_verify_shard, root, name, shard_id, pure=False)
            for name in names
            for shard_id in sorted(store.committed(name))
        ]
        found = client.gather(tasks)
    # The corpus is checked with every teacher's shard; one finding of it is enough.
    return list(dict.fromkeys(finding for findings in found for finding in findings))


def _verify_shard(root: str, teacher: str, shard_id: str) -> list[Finding]:
    from kvdistill.store.maintenance import verify_store as check

    return check(KVStore.open(root), [teacher], [shard_id])


def _against_teachers(
    store: KVStore, names: Sequence[str], count: int, config: Path | None
) -> list[dict[str, Any]]:
    from kvdistill.config.load import load_experiment
    from kvdistill.pipelines.reextract import reextract

    if config is None:
        raise ConfigError("--against-teacher loads teachers: add --config EXPERIMENT.yaml")
    experiment = load_experiment(config)
    results = [reextract(store, experiment, name, count) for name in names]
    return [{**asdict(result), "agrees": result.agrees} for result in results]


def _conclude(
    store: KVStore, names: Sequence[str], findings: int, moved: bool, compared: list[dict[str, Any]]
) -> None:
    """Say what to do next; a store with findings ends with exit code 1."""
    differing = [line["teacher"] for line in compared if not line["agrees"]]
    if differing:
        raise StoreMismatch(f"{store.paths.root}: stored numbers differ from {differing}'s own")
    if findings:
        remedy = "extract again" if moved else "run it with --repair, then extract again"
        raise ShardCorrupt(f"{store.paths.root}: {findings} findings; {remedy}")
    shards = sum(len(store.committed(name)) for name in names)
    print(f"{store.paths.root}: {shards} shards, nothing wrong", file=sys.stderr)
