"""Section ``corpus``: training and held-out texts."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from kvdistill.config.base import NonNegative, Positive, Section
from kvdistill.types import CorpusFormat, Name


class CorpusColumns(Section):
    """Names of the columns with each text; of several in a row, the first is read."""

    text: tuple[str, ...] = ("text",)
    """Of a plain text."""
    prompt: tuple[str, ...] = ("prompt", "question", "instruction")
    """Of a prompt."""
    context: tuple[str, ...] = ("input", "context")
    """Of more text of the prompt, appended to it after a newline; the prompt itself where there is
    no other."""
    rationale: tuple[str, ...] = ("rationale",)
    """Of a rationale."""
    answer: tuple[str, ...] = ("answer", "completion", "response", "output")
    """Of an answer."""
    messages: tuple[str, ...] = ("messages", "conversations", "conversation")
    """Of a chat: a list of turns with `role` and `content`, or `from` and `value`."""
    ignore: tuple[str, ...] = ()
    """Columns not to read. Text in a column that is neither read nor listed here is an error."""

    @property
    def all_texts(self) -> tuple[str, ...]:
        """Every column that text may be read from."""
        return sum(
            (getattr(self, name) for name in type(self).model_fields if name != "ignore"), ()
        )


class CorpusSource(Section):
    """Files of one form, or one Hugging Face dataset."""

    path: Path | None = None
    """File of rows in UTF-8, or a glob of several: JSONL, JSON, CSV, parquet or plain text, also
    with gzip or zstd."""
    dataset: str | None = None
    """Hugging Face dataset name, instead of `path` (extra `datasets`)."""
    subset: str | None = None
    """Configuration of the dataset, such as `main`."""
    split: str = "train"
    """Split of the dataset."""
    format: CorpusFormat = "auto"
    """Row format; `auto` infers it from the keys of each row."""
    columns: CorpusColumns = CorpusColumns()
    """Columns to read and to ignore."""
    max_samples: Positive | None = None
    """Read only the first samples."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of `path` and `dataset`")
        return self


class CorpusConfig(CorpusSource):
    """The texts that all teachers read and the student is trained on."""

    parts: dict[Name, CorpusSource] = {}
    """Several sources by name, concatenated, instead of `path` or `dataset`. Rows without a `task`
    get the name of their part, for `training.task_weights`."""
    shard_chars: Positive = 100_000
    """Characters per shard, at most; a shard is the unit of extraction and of reading."""
    eval_path: Path | None = None
    """File of held-out samples, never extracted and never trained on."""
    eval_samples: NonNegative = 0
    """Without `eval_path`: hold out this many samples from the end of the corpus, or of each
    part."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.path is not None, self.dataset is not None, bool(self.parts)]
        if sum(given) != 1:
            raise ValueError("give exactly one of `path`, `dataset` and `parts`")
        if self.parts and (self.max_samples is not None or self.subset is not None):
            raise ValueError("with `parts`, give `max_samples` and `subset` inside each part")
        if self.eval_path is not None and self.eval_samples:
            raise ValueError("give `eval_path` or `eval_samples`, not both")
        return self

    @property
    def sources(self) -> dict[str, CorpusSource]:
        """Sources by part name; a corpus without parts is one source named ``""``."""
        return dict(self.parts) or {"": self}
