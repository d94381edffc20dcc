"""The corpus that a config names, split into what is trained on and what is held out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvdistill.config_corpus import CorpusConfig, CorpusSource
from kvdistill.corpus import Sample, read_dataset, read_jsonl
from kvdistill.errors import CorpusError


@dataclass(frozen=True)
class Splits:
    """Samples to extract and train on, and samples that only evaluation sees."""

    train: list[Sample]
    evaluation: list[Sample]


def load_corpus(config: CorpusConfig) -> Splits:
    """Read the corpus, part by part, and hold out what the config says.

    Raises:
        CorpusError: missing, empty or malformed, or nothing is left to train on.
    """
    splits = Splits([], [])
    for name, source in config.sources.items():
        samples = [_of_part(name, sample) for sample in _read(source)]
        if config.eval_samples >= len(samples):
            where = f"its part {name!r}" if name else "the corpus"
            raise CorpusError(
                f"corpus.eval_samples is {config.eval_samples}, but {where} has only "
                f"{len(samples)} samples; nothing is left to train on"
            )
        edge = len(samples) - config.eval_samples
        splits.train.extend(samples[:edge])
        splits.evaluation.extend(samples[edge:])
    if config.eval_path is not None:
        splits.evaluation.extend(read_jsonl(config.eval_path, config.format))
    return splits


def _read(source: CorpusSource) -> list[Sample]:
    limit = source.max_samples
    if source.path is not None:
        return read_jsonl(source.path, source.format, limit)
    assert source.dataset is not None  # the config has exactly one of the two
    return read_dataset(source.dataset, source.subset, source.split, source.format, limit)


def _of_part(name: str, sample: Sample) -> Sample:
    """Ids are unique over all parts; a part's name is the task of samples that have none."""
    if not name:
        return sample
    return replace(sample, sample_id=f"{name}/{sample.sample_id}", task=sample.task or name)
