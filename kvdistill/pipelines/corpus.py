"""The corpus that a config names, split into what is trained on and what is held out."""

from __future__ import annotations

from dataclasses import dataclass

from kvdistill.config import CorpusConfig
from kvdistill.corpus import Sample, read_dataset, read_jsonl
from kvdistill.errors import CorpusError


@dataclass(frozen=True)
class Splits:
    """Samples to extract and train on, and samples that only evaluation sees."""

    train: list[Sample]
    evaluation: list[Sample]


def load_corpus(config: CorpusConfig) -> Splits:
    """Read the corpus and hold out what the config says.

    Raises:
        CorpusError: missing, empty or malformed, or nothing is left to train on.
    """
    if config.path is not None:
        samples = read_jsonl(config.path, config.format, config.max_samples)
    else:
        assert config.dataset is not None  # the config has exactly one of the two
        samples = read_dataset(
            config.dataset, config.subset, config.split, config.format, config.max_samples
        )
    if config.eval_path is not None:
        return Splits(samples, read_jsonl(config.eval_path, config.format))
    if config.eval_samples >= len(samples):
        raise CorpusError(
            f"corpus.eval_samples is {config.eval_samples}, but the corpus has only "
            f"{len(samples)} samples; nothing is left to train on"
        )
    edge = len(samples) - config.eval_samples
    return Splits(samples[:edge], samples[edge:])
