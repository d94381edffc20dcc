"""``kvdistill inspect``, ``verify``, ``convert``, ``merge``, ``push``, ``pull`` and ``rm``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from kvdistill.commands.options import Location, json_option, store_argument, teachers_option
from kvdistill.config.load import load_experiment
from kvdistill.errors import ConfigError, ShardCorrupt, StoreMismatch
from kvdistill.pipelines.inspect import check_store, dask_scheduler, inspect_teacher
from kvdistill.store.maintenance import (
    convert_store,
    copy_store,
    merge_stores,
    remove_teacher,
    repair_store,
)
from kvdistill.store.prototypes import teacher_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.text import format_bytes, format_duration
from kvdistill.types import KINDS

if TYPE_CHECKING:
    from rich.table import Table


def _progress(done: str) -> Callable[[str, str], None]:
    return lambda teacher, shard_id: click.echo(f"{done} {teacher} {shard_id}", err=True)


@click.command("inspect")
@store_argument
@teachers_option
@click.option("--plots", type=click.Path(path_type=Path), help="Write one PNG per teacher here.")
@click.option("--shards", default=4, show_default=True, help="Shards read for largest norms.")
@click.option("--scheduler", help="Address of a Dask scheduler; by default, this process.")
@json_option
def inspect_command(
    store: Path | str,
    teachers: tuple[str, ...],
    plots: Path | None,
    shards: int,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Summarise a STORE: teachers, sizes, norms, outlier channels, importance."""
    opened = KVStore.open(store)
    names = [name for name in opened.teachers() if not teachers or name in teachers]
    for name in set(teachers) - set(names):
        opened.teacher(name)  # raises for an unknown teacher
    stored = [name for name in names if opened.committed(name)]
    with dask_scheduler(scheduler):
        reports = [inspect_teacher(opened, name, shards, plots) for name in stored]
    for name in stored if plots is not None else ():
        click.echo(f"wrote {plots}/{name}.png", err=True)
    empty = sorted(set(names) - set(stored))
    if as_json:
        click.echo(json.dumps({"store": str(store), "teachers": reports, "empty": empty}, indent=1))
    else:
        _print_reports(opened, reports, empty)


def _print_reports(store: KVStore, reports: Sequence[dict[str, Any]], empty: Sequence[str]) -> None:
    from rich.console import Console

    console = Console()
    plan = store.manifest.shards
    console.print(
        f"[bold]{store.where}[/]: corpus {store.manifest.corpus_fingerprint[:12]}, "
        f"{sum(shard.num_samples for shard in plan):,} samples in {len(plan):,} shards"
    )
    if reports:
        console.print(_teacher_table(reports))
    for report in reports:
        console.print(_norm_table(report))
        outliers = report["outliers"]
        console.print(f"outlier channels, at least 5 × their head's median: {len(outliers)}")
        for outlier in outliers[:5]:
            console.print(
                "  {kind}: layer {layer}, head {head}, channel {channel}: {ratio:.1f} ×".format(
                    **outlier
                )
            )
        if (histogram := report["importance"]) is not None:
            counts, edges = histogram["counts"], histogram["edges"]
            largest = max(counts) or 1
            bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * count / largest)] for count in counts)
            console.print(f"importance, {edges[0]:.0e} to {edges[-1]:.0e}, logarithmic: |{bars}|")
    if empty:
        console.print(f"no shard yet: {', '.join(empty)}")
    console.print("next: --plots FOLDER for plots, --json for a script; or kvdistill verify")


def _teacher_table(reports: Sequence[dict[str, Any]]) -> Table:
    """One column per teacher, which stays readable on a narrow terminal."""
    from rich.table import Table

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda r: r["model"],
        "backend": lambda r: r["backend"],
        "codec of K / V": lambda r: f"{r['codec']['key']} / {r['codec']['value']}",
        "layers × KV heads": lambda r: (
            f"{r['layers']} × {'/'.join(map(str, r['key_value_heads']))}"
        ),
        "shards": lambda r: f"{r['shards']:,} of {r['planned_shards']:,}",
        "samples": lambda r: f"{r['samples']:,}",
        "tokens": lambda r: f"{r['tokens']:,}",
        "stored": lambda r: format_bytes(r["stored_bytes"]),
        "bytes, of bf16 K and V": lambda r: f"{r['ratio']:.3f}",
        "extraction": lambda r: format_duration(r["extraction_seconds"]),
    }
    table = Table("", *(report["teacher"] for report in reports))
    for name, figure in rows.items():
        table.add_row(name, *(figure(report) for report in reports))
    found = [report["nats_per_character"] for report in reports]
    for task in dict.fromkeys(task for rates in found for task in rates):
        cells = (f"{rates[task]:.3f}" if task in rates else "" for rates in found)
        table.add_row(f"nats per character, {task}", *cells)
    return table


def _norm_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{report['teacher']}: token norms, RMS (largest) by head")
    table.add_column("layer", justify="right")
    for kind in KINDS:
        table.add_column(kind)
    for layer in report["rms"]["key"]:
        cells = []
        for kind in KINDS:
            largest = report["largest_norms"][kind][layer]
            pairs = zip(report["rms"][kind][layer], largest, strict=True)
            cells.append("  ".join(f"{rms:.1f} ({top:.0f})" for rms, top in pairs))
        table.add_row(str(layer), *cells)
    return table


@click.command("verify")
@store_argument
@teachers_option
@click.option("--repair", is_flag=True, help="Move bad shards aside, to be extracted again.")
@click.option(
    "--against-teacher",
    "count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also read N samples again with each teacher of --config, and compare.",
)
@click.option("--config", type=click.Path(path_type=Path), help="The experiment of the teachers.")
@click.option("--scheduler", help="Address of a Dask scheduler; by default, this process.")
@json_option
def verify_command(
    store: Path | str,
    teachers: tuple[str, ...],
    repair: bool,
    count: int | None,
    config: Path | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Check every file of a STORE: presence, checksums, shapes, finiteness, offsets."""
    opened = KVStore.open(store)
    names = list(teachers) or opened.teachers()
    findings = check_store(opened, names, scheduler, _progress("checked"))
    moved = repair_store(opened, findings) if repair else []
    compared = [] if count is None or findings else _against_teachers(opened, names, count, config)
    if as_json:
        body = {
            "findings": [asdict(finding) for finding in findings],
            "moved": [str(path) for path in moved],
            "against_teacher": compared,
        }
        click.echo(json.dumps(body, indent=1))
    else:
        for finding in findings:
            click.echo(f"{finding.teacher or 'corpus'} {finding.shard_id}: {finding.problem}")
        for path in moved:
            click.echo(f"moved to {path}")
        for line in compared:
            others = (("hidden states", "hidden_error"), ("predictions", "prediction_error"))
            shown = [(what, line[key]) for what, key in others if line[key] is not None]
            click.echo(
                f"{line['teacher']}: {line['samples']} samples read again, relative error of keys "
                f"{line['key_error']:.1e}, of values {line['value_error']:.1e}"
                + "".join(f", of {what} {error:.1e}" for what, error in shown)
            )
    differing = [line["teacher"] for line in compared if not line["agrees"]]
    if differing:
        raise StoreMismatch(f"{store}: what is stored differs from teachers {differing}")
    if findings:
        remedy = "extract again" if moved else "run with --repair, then extract again"
        raise ShardCorrupt(f"{store}: {len(findings)} findings; {remedy}")
    shards = sum(len(opened.committed(name)) for name in names)
    click.echo(f"{store}: {shards} shards, no errors found", err=True)


def _against_teachers(
    store: KVStore, names: Sequence[str], count: int, config: Path | None
) -> list[dict[str, Any]]:
    if config is None:
        raise ConfigError("--against-teacher needs the teachers: add --config EXPERIMENT.yaml")
    from kvdistill.pipelines.reextract import reextract

    experiment = load_experiment(config)
    results = [reextract(store, experiment, name, count) for name in names]
    return [{**asdict(result), "agrees": result.agrees} for result in results]


@click.command("convert")
@store_argument
@click.argument("target", type=Location())
@click.option("--to", "backend", type=click.Choice(["zarr", "safetensors"]), required=True)
def convert_command(
    store: Path | str, target: Path | str, backend: Literal["zarr", "safetensors"]
) -> None:
    """Copy a STORE to TARGET in the other backend. Needs no teacher; run again to continue."""
    made = convert_store(KVStore.open(store), target, backend, progress=_progress("converted"))
    click.echo(f"{made.where}: {len(made.teachers())} teachers in {backend}")
    click.echo(f"next: kvdistill verify {made.where}")


@click.command("merge")
@click.argument("target", type=Location())
@click.argument("sources", type=Location(), nargs=-1, required=True)
@click.option(
    "--prototypes",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="The experiment's extraction.prototypes, for teachers that the merge completes.",
)
def merge_command(target: Path | str, sources: tuple[Path | str, ...], prototypes: int) -> None:
    """Copy into TARGET the shards that it lacks from other stores over the same corpus."""
    opened = KVStore.open(target)
    others = [KVStore.open(source) for source in sources]
    copied = merge_stores(opened, others, progress=_progress("copied"))
    click.echo(f"{target}: {copied} shards copied")
    for name in opened.teachers():
        missing = opened.missing(name)
        state = f"{len(missing)} shards missing" if missing else "complete"
        if opened.teacher(name).has_summaries:
            if missing:
                state += "; its prototypes need all of them"
            else:
                teacher_prototypes(opened, name, prototypes)
        click.echo(f"  {name}: {state}")


def _copy_command(command: str, past: str, summary: str) -> click.Command:
    @click.command(command, help=summary)
    @store_argument
    @click.argument("target", type=Location())
    @teachers_option
    def copy(store: Path | str, target: Path | str, teachers: tuple[str, ...]) -> None:
        opened = KVStore.open(store)
        made, copied = copy_store(opened, target, _progress(past), teachers)
        click.echo(f"{made.where}: {copied} shards {past}")
        for name in teachers or opened.teachers():
            click.echo(f"  {name}: {len(made.committed(name))} of {len(made.shard_ids)} shards")

    return copy


push_command = _copy_command(
    "push",
    "pushed",
    "Copy a STORE to s3://BUCKET/PREFIX or hf://datasets/USER/NAME; continues a copy.",
)
pull_command = _copy_command(
    "pull", "pulled", "Copy a STORE in a bucket to the folder TARGET; continues a copy."
)


@click.command("rm")
@store_argument
@click.option("--teacher", required=True, help="The teacher to remove.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def rm_command(store: Path | str, teacher: str, yes: bool) -> None:
    """Remove one teacher and all its shards from a STORE."""
    opened = KVStore.open(store)
    opened.teacher(teacher)  # raises for an unknown teacher
    count = len(opened.committed(teacher))
    if not yes:
        click.confirm(f"Remove {teacher} with {count} shards from {store}?", abort=True)
    remove_teacher(opened, teacher)
    left = opened.teachers() or "no teacher"
    click.echo(f"{store}: removed {teacher}, {count} shards; left: {left}")
