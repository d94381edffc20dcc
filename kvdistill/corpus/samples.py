"""Samples and their segments, and the partition of a corpus into shards.

A sample is text in named segments. Separators belong to the segments, so the text of a sample is
their plain concatenation, and character offsets are comparable across tokenizers. A corpus is
partitioned once, into shards of consecutive samples; shard ``i`` holds the same samples for every
teacher, so that the shards of different teachers align.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvdistill.types import SEGMENT_IDS, SegmentName


@dataclass(frozen=True)
class Sample:
    """One text: ``(name, text)`` segments in reading order, and optional labels."""

    sample_id: str
    segments: tuple[tuple[SegmentName, str], ...]
    task: str | None = None
    teacher: str | None = None
    """The one teacher that teaches this text; all that cover it if None."""
    chat: bool = False
    """A conversation: segments repeat, and cross-entropy counts the assistant's turns alone."""

    @property
    def text(self) -> str:
        """The concatenation of all segments."""
        return "".join(text for _, text in self.segments)

    def is_of(self, parts: Collection[str] | None) -> bool:
        """Whether the text is of one of these parts of the corpus; None are all."""
        return parts is None or self.task in parts

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """``(start, end, segment id)`` of every segment, as character offsets into ``text``."""
        ends = list(accumulate(len(text) for _, text in self.segments))
        starts = [0, *ends[:-1]]
        ids = (SEGMENT_IDS[name] for name, _ in self.segments)
        return list(zip(starts, ends, ids, strict=True))

    def segments_at(self, chars: NDArray[Any]) -> NDArray[Any]:
        """Segment ids of characters ``[T]`` of the text; 0 where it is empty."""
        spans = [span for span in self.spans if span[0] < span[1]] or [(0, 0, 0)]
        starts, _, segments = np.array(spans).T
        return np.take(segments, np.searchsorted(starts[1:], chars, side="right"))

    @property
    def question(self) -> str:
        """The text up to the end of the last prompt: what an answer is generated from."""
        ends = [end for _, end, name in self.spans if name == SEGMENT_IDS["prompt"]]
        return self.text[: max(ends, default=0)]

    @property
    def turns(self) -> list[tuple[str, list[int]]]:
        """Role and segment indices of a conversation's turns.

        The first of two prompts is the system's.
        """
        found: list[tuple[str, list[int]]] = []
        for number, (name, _) in enumerate(self.segments):
            role = "user" if name == "prompt" else "assistant"
            if role == "user" and found and found[-1][0] == "user":
                found[-1] = ("system", found[-1][1])
            if role == "assistant" and found and found[-1][0] == "assistant":
                found[-1][1].append(number)
            else:
                found.append((role, [number]))
        return found

    @property
    def labels(self) -> dict[str, str]:
        """The labels that are given, by name."""
        found = {"task": self.task, "teacher": self.teacher}
        return {name: label for name, label in found.items() if label is not None}

    def to_json(self) -> str:
        """One JSON line, without the newline; ``from_json`` reads it back."""
        body: dict[str, Any] = {"sample_id": self.sample_id, "segments": self.segments}
        body |= self.labels | ({"chat": True} if self.chat else {})
        return json.dumps(body, ensure_ascii=False)

    @staticmethod
    def from_json(line: str) -> Sample:
        """Parse a line written by ``to_json``."""
        body = json.loads(line)
        segments = tuple((name, text) for name, text in body["segments"])
        labels = body.get("task"), body.get("teacher"), body.get("chat", False)
        return Sample(body["sample_id"], segments, *labels)


@dataclass(frozen=True)
class Shard:
    """Consecutive samples of a corpus: the unit of extraction, of commit and of reading."""

    shard_id: str
    first_sample: int
    samples: tuple[Sample, ...]

    def to_jsonl(self) -> str:
        """The content of ``corpus/<shard_id>.jsonl``."""
        return "".join(sample.to_json() + "\n" for sample in self.samples)

    @property
    def num_chars(self) -> int:
        """Characters of all samples."""
        return sum(len(sample.text) for sample in self.samples)


def corpus_fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over every sample's id, segments and labels, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.to_json().encode() + b"\n")
    return digest.hexdigest()


def cut_into_shards(samples: Sequence[Sample], shard_chars: int) -> Iterator[Shard]:
    """Partition a corpus into shards of consecutive samples of at most ``shard_chars`` characters.

    A sample longer than the budget is a shard of its own. The budget is in characters because the
    partition must not depend on the tokenizer of any teacher.
    """
    number, first, size, pending = 0, 0, 0, list[Sample]()
    for position, sample in enumerate(samples):
        length = len(sample.text)
        if pending and size + length > shard_chars:
            yield Shard(f"{number:05d}", first, tuple(pending))
            number, first, size, pending = number + 1, position, 0, []
        pending.append(sample)
        size += length
    if pending:
        yield Shard(f"{number:05d}", first, tuple(pending))
