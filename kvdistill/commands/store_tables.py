"""``kvdistill inspect`` on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from kvdistill.store.reader import KVStore
from kvdistill.text import format_bytes, format_duration
from kvdistill.types import KINDS

SHOWN_OUTLIERS = 5


def print_reports(store: KVStore, reports: list[dict[str, Any]], empty: list[str]) -> None:
    """A table of teachers, then norms, outliers and importance of each."""
    console = Console()
    plan = store.manifest.shards
    console.print(
        f"[bold]{store.paths.root}[/]: corpus {store.manifest.corpus_fingerprint[:12]}, "
        f"{sum(shard.num_samples for shard in plan):,} samples in {len(plan):,} shards"
    )
    if reports:
        console.print(_teacher_table(reports))
    for report in reports:
        console.print(_norm_table(report))
        _print_outliers(console, report)
        _print_importance(console, report)
    if empty:
        console.print(f"nothing stored yet: {', '.join(empty)}")
    console.print("next: --plots FOLDER for pictures, --json for a script; or kvdistill verify")


def _teacher_table(reports: list[dict[str, Any]]) -> Table:
    """A column per teacher: it stays readable on a narrow terminal."""
    table = Table("", *(report["teacher"] for report in reports))
    columns = [_teacher_figures(report) for report in reports]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _teacher_figures(report: dict[str, Any]) -> dict[str, str]:
    heads = "/".join(str(n) for n in report["key_value_heads"])
    return {
        "model": report["model"],
        "backend": report["backend"],
        "codec of K / V": f"{report['codec']['key']} / {report['codec']['value']}",
        "layers × KV heads": f"{report['layers']} × {heads}",
        "shards": f"{report['shards']:,} of {report['planned_shards']:,}",
        "samples": f"{report['samples']:,}",
        "tokens": f"{report['tokens']:,}",
        "stored": format_bytes(report["stored_bytes"]),
        "bytes, of bf16 K and V": f"{report['ratio']:.3f}",
        "extraction": format_duration(report["extraction_seconds"]),
    }


def _norm_table(report: dict[str, Any]) -> Table:
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


def _print_outliers(console: Console, report: dict[str, Any]) -> None:
    outliers = report["outliers"]
    console.print(f"outlier channels, at least 5 × their head's median: {len(outliers)}")
    for outlier in outliers[:SHOWN_OUTLIERS]:
        console.print(
            f"  {outlier['kind']}: layer {outlier['layer']}, head {outlier['head']}, "
            f"channel {outlier['channel']}: {outlier['ratio']:.1f} ×"
        )


def _print_importance(console: Console, report: dict[str, Any]) -> None:
    histogram = report["importance"]
    if histogram is None:
        return
    counts, edges = histogram["counts"], histogram["edges"]
    largest = max(counts) or 1
    bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * count / largest)] for count in counts)
    console.print(f"importance, {edges[0]:.0e} to {edges[-1]:.0e}, logarithmic: |{bars}|")
