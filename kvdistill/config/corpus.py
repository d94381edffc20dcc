"""The texts of an experiment as settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from kvdistill.config.base import Positive, Section
from kvdistill.types import CorpusFormat, Name


class CorpusSource(Section):
    """Where texts come from: one file, or one dataset."""

    path: Path | None = None
    """JSONL file of `text`, of `prompt`/`rationale`/`answer`, or of GSM8K's `question`/`answer`."""
    dataset: str | None = None
    """Hugging Face dataset name, instead of `path` (extra `datasets`)."""
    subset: str | None = None
    """Configuration of the dataset, such as `main`."""
    split: str = "train"
    """Split of the dataset."""
    format: CorpusFormat = "auto"
    """How to read a row; `auto` decides by its keys."""
    max_samples: Positive | None = None
    """Read only the first samples."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of `path` and `dataset`")
        return self


class CorpusConfig(CorpusSource):
    """The texts that every teacher reads and the student learns from."""

    parts: dict[Name, CorpusSource] = {}
    """Instead of `path` or `dataset`: several of them, by name, one after the other. Rows without
    a `task` get the part's name as theirs, which `training.task_weights` can weigh."""
    shard_chars: Positive = 100_000
    """Cut the corpus into shards of about this many characters (one shard is one unit of work)."""
    eval_path: Path | None = None
    """JSONL file of held-out samples, never extracted and never trained on."""
    eval_samples: Annotated[int, Field(ge=0)] = 0
    """Without `eval_path`: hold out this many samples from the end of the corpus, or of each
    part."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.path is not None, self.dataset is not None, bool(self.parts)]
        if sum(given) != 1:
            raise ValueError("give exactly one of `path`, `dataset` and `parts`")
        if self.parts and (self.max_samples is not None or self.subset is not None):
            raise ValueError("with `parts`, give `max_samples` and `subset` inside each part")
        return self

    @model_validator(mode="after")
    def _one_held_out(self) -> Self:
        if self.eval_path is not None and self.eval_samples:
            raise ValueError("give `eval_path` or `eval_samples`, not both")
        return self

    @property
    def sources(self) -> dict[str, CorpusSource]:
        """The parts by name; a corpus without parts is one without a name."""
        return dict(self.parts) or {"": self}
