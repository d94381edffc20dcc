"""``kvdistill plan`` and ``kvdistill fetch``: before stage 1."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kvdistill.commands.options import config_argument, json_option, overrides_option
from kvdistill.text import format_bytes, format_duration


@click.command("plan")
@config_argument
@overrides_option
@json_option
@click.option("--parallel", default=1, show_default=True, help="Processes that run at once.")
@click.option("--samples", default=256, show_default=True, help="Samples to tokenise.")
@click.option("--sized", default=12, show_default=True, help="Samples to extract, per codec.")
def plan_command(
    *,
    config: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    parallel: int,
    samples: int,
    sized: int,
) -> None:
    """Pilot every teacher: disk, hours and lengths, before anything is extracted."""
    from kvdistill.config.load import load_experiment
    from kvdistill.pipelines.plan import array_size, estimate_extraction

    projected = estimate_extraction(load_experiment(config, overrides), samples, sized)
    if as_json:
        body = asdict(projected) | {
            "needed_gigabytes": projected.needed_gigabytes,
            "fits": projected.fits,
            "array_size": array_size(projected, parallel),
        }
        click.echo(json.dumps(body))
        return
    click.echo(
        f"{projected.samples:,} samples, {projected.characters:,} characters, "
        f"{projected.shards:,} shards"
    )
    for teacher in projected.teachers:
        _show(teacher, array_size(projected, parallel))
    click.echo(
        f"\nneeded: {format_bytes(projected.needed_gigabytes * 1e9)}, "
        f"free: {format_bytes(projected.free_gigabytes * 1e9)}"
        + (
            ""
            if projected.fits
            else "  -- this does not fit; choose a smaller codec or fewer layers"
        )
    )
    click.echo(f"next: kvdistill extract {config}")


@click.command("fetch")
@config_argument
@overrides_option
def fetch_command(*, config: Path, overrides: tuple[str, ...]) -> None:
    """Download every model and data set of CONFIG, for compute nodes without a network."""
    from kvdistill.config.load import load_experiment
    from kvdistill.pipelines.fetch import fetch as run

    fetched = run(
        load_experiment(config, overrides),
        lambda need, word: click.echo(f"{need.kind} {need.source}: {word}", err=True),
    )
    click.echo(f"all of {len(fetched)} are here; next: kvdistill plan {config}")


def _show(teacher: Any, tasks: int) -> None:
    seconds = teacher.hours * 3600
    click.echo(
        f"\n{teacher.teacher}: {teacher.tokens:,} tokens at {teacher.tokens_per_second:,.0f}/s: "
        f"{format_duration(seconds)} alone, {format_duration(seconds / tasks)} in {tasks} tasks"
    )
    sizes = sorted(teacher.gigabytes.items(), key=lambda item: -item[1])
    click.echo(
        "  on disk: " + ", ".join(f"{name} {format_bytes(size * 1e9)}" for name, size in sizes)
    )
    if 0 < teacher.kept < 1:
        click.echo(
            f"  its heads and eviction keep {teacher.kept:.1%} of keys and values; "
            f"with everything kept, about {1 / teacher.kept:,.0f} times as much disk"
        )
    click.echo(f"  tokens per sample: {_quantiles(teacher.lengths)}")
    if teacher.rationale_lengths:
        click.echo(f"  tokens per rationale: {_quantiles(teacher.rationale_lengths)}")
    touched = ", ".join(f"{b}: {share:.0%}" for b, share in teacher.touched.items())
    click.echo(f"  an eviction budget touches this share of samples: {touched}")
    if teacher.too_long:
        click.echo(f"  {teacher.too_long:.1%} of samples are too long: see extraction.long_text")
    if teacher.alignment is not None:
        found = teacher.alignment
        click.echo(
            f"  student tokens covered {found.coverage:.1%}, one to one "
            f"{found.one_to_one_rate:.1%}, teacher tokens lost {found.orphan_rate:.1%}"
        )


def _quantiles(values: dict[float, int]) -> str:
    return ", ".join(f"{q:.0%} {value:,}" for q, value in values.items())
