"""``kvdistill data``: corpora and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvdistill.errors import CorpusError

if TYPE_CHECKING:
    from kvdistill.corpus.recipes import ChainForm, RationaleForm
    from kvdistill.corpus.samples import Sample


drop_last_option = click.option(
    "--drop-last-step",
    "drop_last",
    is_flag=True,
    help="Leave out the rationale's last step, which states the answer.",
)


@click.group()
def data() -> None:
    """Make corpora and tokenizers."""


@data.command("gsm8k")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="A local copy of GSM8K's train.jsonl or test.jsonl; the hub is asked if not given.",
)
@click.option("--split", default="train", show_default=True, help="Split, when read from the hub.")
@click.option("--max-samples", type=click.IntRange(min=1), help="Only the first samples.")
@click.option(
    "--rationale",
    type=click.Choice(["annotated", "words", "equations"]),
    default="annotated",
    show_default=True,
    help="As GSM8K writes it, without its <<48/2=24>>, or nothing but these.",
)
@drop_last_option
def gsm8k_command(
    *,
    output: Path,
    source: Path | None,
    split: str,
    max_samples: int | None,
    rationale: RationaleForm,
    drop_last: bool,
) -> None:
    """Export GSM8K to OUTPUT as JSONL of prompt, rationale and answer."""
    from kvdistill.corpus.readers import read_dataset, read_jsonl
    from kvdistill.corpus.recipes import with_rationale

    if source is not None:
        samples = read_jsonl(source, "gsm8k", max_samples)
    else:
        samples = read_dataset("openai/gsm8k", "main", split, "gsm8k", max_samples)
    _write_jsonl([with_rationale(s, rationale, drop_last=drop_last) for s in samples], output)


@data.command("arithmetic")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--samples", default=10_000, show_default=True, type=click.IntRange(min=1))
@click.option("--steps", default=4, show_default=True, help="Operations per chain.")
@click.option("--modulus", default=10, show_default=True, help="Values are taken modulo this.")
@click.option("--seed", default=0, show_default=True, help="Which list of chains.")
@click.option("--skip", default=0, show_default=True, help="Begin so far into that list.")
@click.option(
    "--rationale",
    "form",
    type=click.Choice(["equations", "results"]),
    default="equations",
    show_default=True,
    help="7+3=0 0*4=0, or nothing but 0 0.",
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
    form: ChainForm,
    drop_last: bool,
) -> None:
    """Write chains such as 7+3*4-6, read from left to right modulo 10, to OUTPUT as JSONL.

    One seed is one endless list without repetition: hold out what --skip leaves behind.
    """
    from kvdistill.corpus import recipes

    chains = recipes.arithmetic_samples(
        samples,
        steps=steps,
        modulus=modulus,
        seed=seed,
        skip=skip,
        form=form,
        drop_last=drop_last,
    )
    _write_jsonl(chains, output)


@data.command("tokenizer")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--vocab-size", default=4096, show_default=True, type=click.IntRange(min=300))
@click.option("--characters", is_flag=True, help="One token per character of CORPUS instead.")
def tokenizer_command(corpus: Path, output: Path, vocab_size: int, characters: bool) -> None:
    """Train a byte-level BPE tokenizer on CORPUS (JSONL) and save it to the folder OUTPUT."""
    from kvdistill.corpus.readers import read_jsonl
    from kvdistill.distill.student.build import character_tokenizer, train_tokenizer

    if output.exists():
        raise CorpusError(f"{output} is already there; give another name, or remove it first")
    texts = (sample.text for sample in read_jsonl(corpus))
    trained = character_tokenizer(texts) if characters else train_tokenizer(texts, vocab_size)
    trained.save_pretrained(str(output))
    click.echo(f"wrote a tokenizer of {len(trained)} tokens to {output}")


def _write_jsonl(samples: Sequence[Sample], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as lines:
        for sample in samples:
            row: dict[str, str] = {"sample_id": sample.sample_id}
            row.update(sample.segments)
            if sample.task is not None:
                row["task"] = sample.task
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    click.echo(f"wrote {len(samples)} samples to {output}")
