"""What precedes extraction: ``kvdistill config``, ``data``, ``fetch``, ``doctor`` and ``plan``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvdistill.commands.options import config_argument, ignore_option, json_option, overrides_option
from kvdistill.config.corpus import CorpusColumns, CorpusSource
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, load_experiment
from kvdistill.corpus import recipes
from kvdistill.corpus.readers import read_dataset, read_files
from kvdistill.corpus.samples import Sample
from kvdistill.errors import ConfigError, CorpusError
from kvdistill.store.commit import replace_file
from kvdistill.text import format_bytes, format_duration, parse_bytes

if TYPE_CHECKING:
    from kvdistill.pipelines.plan import TeacherEstimate


@click.group("config")
def config_command() -> None:
    """Show an experiment with its defaults, or the JSON schema."""


@config_command.command("show")
@config_argument
@overrides_option
def show_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Check CONFIG and print it with every default, and what is fitted before step 1."""
    experiment = load_experiment(config, overrides)
    click.echo(dump_experiment(experiment), nl=False)
    if autos := [name for name, teacher in experiment.teachers.items() if teacher.dtype == "auto"]:
        how = "as stored; else bfloat16 on a GPU that computes in it, else float32"
        click.echo(f"# dtype auto of {', '.join(autos)}: {how}")
    if experiment.training.precision == "auto":
        click.echo("# training.precision auto: bfloat16 on a GPU that computes in it, else float32")
    if experiment.losses.of_kv and experiment.training.fused_kernels:
        why = experiment.unfused
        how = "on a GPU with Triton" if why is None else f"without effect, since {why}"
        click.echo(f"# training.fused_kernels: {how}")
    if experiment.fitted is not None:
        click.echo(
            f"# fitted before step 1 on {experiment.projection.pilot_batches} batches of 8 texts: "
            f"the maps of {', '.join(experiment.teachers)} (projection.mode "
            f"{experiment.projection.mode}), in closed form by {experiment.fitted}"
        )


@config_command.command("schema")
def schema_command() -> None:
    """Print the JSON schema of an experiment file, for editors."""
    click.echo(json.dumps(Experiment.model_json_schema(), indent=2))


drop_last_option = click.option(
    "--drop-last-step",
    "drop_last",
    is_flag=True,
    help="Omit the rationale's last step, which states the answer.",
)


@click.group("data")
def data_command() -> None:
    """Make corpora and tokenizers."""


@data_command.command("gsm8k")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="A local copy of GSM8K's train.jsonl or test.jsonl; downloaded if not given.",
)
@click.option("--split", default="train", show_default=True, help="Split, if downloaded.")
@click.option("--max-samples", type=click.IntRange(min=1), help="Only the first samples.")
@click.option(
    "--rationale",
    type=click.Choice(["annotated", "words", "equations"]),
    default="annotated",
    show_default=True,
    help="GSM8K's text, the text without its <<48/2=24>>, or the equations alone.",
)
@drop_last_option
def gsm8k_command(
    *,
    output: Path,
    source: Path | None,
    split: str,
    max_samples: int | None,
    rationale: recipes.RationaleForm,
    drop_last: bool,
) -> None:
    """Export GSM8K to OUTPUT as JSONL of prompt, rationale and answer."""
    if source is not None:
        samples = read_files(source, "gsm8k", max_samples)
    else:
        gsm8k = {"dataset": "openai/gsm8k", "subset": "main", "format": "gsm8k"}
        samples = read_dataset(CorpusSource(**gsm8k, split=split, max_samples=max_samples))
    texts = [recipes.with_rationale(s, rationale, drop_last=drop_last) for s in samples]
    _write_jsonl(texts, output)


@data_command.command("arithmetic")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--samples", default=10_000, show_default=True, type=click.IntRange(min=1))
@click.option("--steps", default=4, show_default=True, help="Operations per chain.")
@click.option("--modulus", default=10, show_default=True, help="Modulus of all values.")
@click.option("--seed", default=0, show_default=True, help="Selects the sequence of chains.")
@click.option(
    "--skip", default=0, show_default=True, help="Skip the first chains of that sequence."
)
@click.option(
    "--rationale",
    "form",
    type=click.Choice(["equations", "results"]),
    default="equations",
    show_default=True,
    help="7+3=0 0*4=0, or the results alone: 0 0.",
)
@drop_last_option
def arithmetic_command(
    *,
    output: Path,
    samples: int,
    steps: int,
    modulus: int,
    seed: int,
    skip: int,
    form: recipes.ChainForm,
    drop_last: bool,
) -> None:
    """Write chains such as 7+3*4-6, evaluated from left to right modulo 10, to OUTPUT as JSONL.

    One seed is one endless sequence without repetition: --skip the training chains for others.
    """
    chains = recipes.arithmetic_samples(
        samples, steps=steps, modulus=modulus, seed=seed, skip=skip, form=form, drop_last=drop_last
    )
    _write_jsonl(chains, output)


@data_command.command("tokenizer")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--vocab-size", default=4096, show_default=True, type=click.IntRange(min=300))
@click.option(
    "--characters", is_flag=True, help="One token per character of CORPUS, instead of BPE."
)
@ignore_option
def tokenizer_command(
    *, corpus: Path, output: Path, vocab_size: int, characters: bool, ignore: tuple[str, ...]
) -> None:
    """Train a byte-level BPE tokenizer on CORPUS (a file) and save it to the folder OUTPUT."""
    from kvdistill.distill.student.build import character_tokenizer, train_tokenizer

    if output.exists():
        raise CorpusError(f"{output} already exists; choose another name, or remove it first")
    columns = CorpusColumns(ignore=ignore)
    texts = (sample.text for sample in read_files(corpus, columns=columns))
    trained = character_tokenizer(texts) if characters else train_tokenizer(texts, vocab_size)
    trained.save_pretrained(str(output))
    click.echo(f"wrote a tokenizer of {len(trained)} tokens to {output}")


def _write_jsonl(samples: Sequence[Sample], output: Path) -> None:
    lines = []
    for sample in samples:
        row: dict[str, str] = {"sample_id": sample.sample_id}
        row.update(sample.segments)
        row.update(sample.labels)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    replace_file(output, "".join(lines))
    click.echo(f"wrote {len(samples)} samples to {output}")


@click.command("fetch")
@config_argument
@overrides_option
def fetch_command(*, config: Path, overrides: tuple[str, ...]) -> None:
    """Download every model and data set of CONFIG, for compute nodes without a network."""
    from kvdistill.pipelines.fetch import fetch

    fetched = fetch(
        load_experiment(config, overrides),
        lambda need, state: click.echo(f"{need.kind} {need.source}: {state}", err=True),
    )
    click.echo(f"all {len(fetched)} are on this machine; next: kvdistill plan {config}")


@click.command("doctor")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@overrides_option
@json_option
@click.pass_context
def doctor_command(
    ctx: click.Context, *, config: Path | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Check this machine, and the models, losses and folders of CONFIG; exit code 1 if any fails.

    Models are loaded without their weights. A hub that cannot be reached is no failure.
    """
    from kvdistill.pipelines.doctor import examine

    checks = []
    for check in examine(config, overrides):
        checks.append(check)
        if not as_json:
            mark = click.style("✓", fg="green") if check.is_fine else click.style("✗", fg="red")
            click.echo(f"{mark} {check.name}: {check.text}")
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], ensure_ascii=False))
    ctx.exit(0 if all(check.is_fine for check in checks) else 1)


@click.command("plan")
@config_argument
@overrides_option
@json_option
@click.option("--parallel", default=1, show_default=True, help="Processes that run at once.")
@click.option("--samples", default=256, show_default=True, help="Samples to tokenise.")
@click.option("--sized", default=12, show_default=True, help="Samples to extract, at least.")
@click.option("--disk", metavar="SIZE", help="2TB: what fits, and the error that it costs.")
def plan_command(
    *,
    config: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    parallel: int,
    samples: int,
    sized: int,
    disk: str | None,
) -> None:
    """Estimate disk space, time and lengths per teacher before anything is extracted."""
    from kvdistill.pipelines.outlook import savings_line
    from kvdistill.pipelines.plan import estimate_extraction
    from kvdistill.pipelines.store_options import disk_lines

    try:
        limit = None if disk is None else parse_bytes(disk) / 1e9
    except ValueError as error:
        raise ConfigError(f"--disk: {error}") from None
    experiment = load_experiment(config, overrides)
    if not as_json:
        names = ", ".join(experiment.teachers)
        click.echo(
            f"measuring {names} on {sized} texts or a full batch; this takes a while", err=True
        )
    estimate = estimate_extraction(experiment, samples, sized, options=limit is not None)
    tasks = max(1, min(parallel, estimate.shards))
    needed, free = estimate.needed_gigabytes, estimate.free_gigabytes
    if as_json:
        totals = {"needed_gigabytes": needed, "fits": estimate.fits, "array_size": tasks}
        options = [asdict(row) for row in estimate.options()]
        click.echo(json.dumps(asdict(estimate) | totals | {"options": options}))
        return
    click.echo(
        f"{estimate.samples:,} samples, {estimate.characters:,} characters, "
        f"{estimate.shards:,} shards"
    )
    for teacher in estimate.teachers:
        click.echo("\n" + "\n".join(_estimate_lines(teacher, tasks)))
    remedy = "" if estimate.fits else "; does not fit: choose a smaller codec or fewer layers"
    click.echo(f"\nneeded: {format_bytes(needed * 1e9)}, free: {format_bytes(free * 1e9)}{remedy}")
    if (saved := savings_line(experiment)) is not None:
        click.echo(saved)
    if limit is not None:
        depths = {x.teacher: x.mapped_depths for x in estimate.teachers}
        length = min(x.tokens for x in estimate.teachers) / max(estimate.samples, 1)
        click.echo("\n".join(disk_lines(estimate.options(), limit, depths, length)))
    click.echo(f"next: kvdistill extract {config}")


def _estimate_lines(teacher: TeacherEstimate, tasks: int) -> Iterator[str]:
    seconds = teacher.hours * 3600
    yield (
        f"{teacher.teacher}: {teacher.tokens:,} tokens at {teacher.tokens_per_second:,.0f}/s: "
        f"{format_duration(seconds)} in one task, {format_duration(seconds / tasks)} in {tasks}"
    )
    sizes = sorted(teacher.gigabytes.items(), key=lambda item: -item[1])
    yield "  on disk: " + ", ".join(f"{name} {format_bytes(size * 1e9)}" for name, size in sizes)
    if 0 < teacher.kept < 1:
        yield (
            f"  selected heads and eviction keep {teacher.kept:.1%} of keys and values; keeping "
            f"all takes about {1 / teacher.kept:,.0f} times the disk space"
        )
    yield f"  tokens per sample: {_quantiles(teacher.lengths)}"
    if teacher.rationale_lengths:
        yield f"  tokens per rationale: {_quantiles(teacher.rationale_lengths)}"
    touched = ", ".join(f"{budget}: {share:.0%}" for budget, share in teacher.touched.items())
    yield f"  samples that exceed an eviction budget: {touched}"
    if teacher.too_long:
        yield f"  {teacher.too_long:.1%} of samples are too long: see extraction.long_text"
    if teacher.nats_per_character:
        rates = (f"{task} {rate:.3f}" for task, rate in teacher.nats_per_character.items())
        yield f"  nats per character, of the pilot: {', '.join(rates)}"
    if (found := teacher.alignment) is not None:
        yield (
            f"  student tokens covered {found.coverage:.1%}, one to one "
            f"{found.one_to_one_rate:.1%}, teacher tokens lost {found.orphan_rate:.1%}"
        )
    yield from _mapped_lines(teacher)


def _mapped_lines(teacher: TeacherEstimate) -> Iterator[str]:
    """What the student's layer map does not read, and how to leave it out of the store."""
    layers, name = teacher.mapped_layers, teacher.teacher
    if not layers or len(layers) == teacher.num_layers:
        return
    share = len(layers) / teacher.num_layers
    size = format_bytes(share * teacher.gigabytes[teacher.codec] * 1e9)
    line = f"  the student reads {len(layers)} of {teacher.num_layers} layers, about {size}: set "
    line += f"teachers.{name}.layers to {list(layers)} to store them alone"
    if any(depth % 1 for depth in teacher.mapped_depths or ()):
        depths = [round(depth, 3) for depth in teacher.mapped_depths or ()]
        line += f", and alignment.layers to explicit with explicit_layers.{name} {depths}"
    yield line


def _quantiles(values: dict[float, int]) -> str:
    return ", ".join(f"{q:.0%} {value:,}" for q, value in values.items())
