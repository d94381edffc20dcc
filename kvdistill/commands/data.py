"""``kvdistill data``: corpora and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvdistill.errors import CorpusError


@click.group()
def data() -> None:
    """Make corpora and tokenizers."""


@data.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="A local copy of GSM8K's train.jsonl or test.jsonl; the hub is asked if not given.",
)
@click.option("--split", default="train", show_default=True, help="Split, when read from the hub.")
@click.option("--max-samples", type=click.IntRange(min=1), help="Only the first samples.")
def gsm8k(output: Path, source: Path | None, split: str, max_samples: int | None) -> None:
    """Export GSM8K to OUTPUT as JSONL of prompt, rationale and answer."""
    from kvdistill.corpus import read_dataset, read_jsonl

    if source is not None:
        samples = read_jsonl(source, "gsm8k", max_samples)
    else:
        samples = read_dataset("openai/gsm8k", "main", split, "gsm8k", max_samples)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as lines:
        for sample in samples:
            row: dict[str, str] = {"sample_id": sample.sample_id}
            row.update(sample.segments)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    click.echo(f"wrote {len(samples)} samples to {output}")


@data.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--vocab-size", default=4096, show_default=True, type=click.IntRange(min=300))
def tokenizer(corpus: Path, output: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on CORPUS (JSONL) and save it to the folder OUTPUT."""
    from kvdistill.corpus import read_jsonl
    from kvdistill.distill.tokenizer import train_tokenizer

    if output.exists():
        raise CorpusError(f"{output} is already there; give another name, or remove it first")
    trained = train_tokenizer((sample.text for sample in read_jsonl(corpus)), vocab_size)
    trained.save_pretrained(str(output))
    click.echo(f"wrote a tokenizer of {len(trained)} tokens to {output}")
