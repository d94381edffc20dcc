"""Reading the corpus of a config, and splitting it into training and held-out samples.

A row is read whole or refused: text that no segment takes is an error unless its column is ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from kvdistill.config.corpus import CorpusColumns, CorpusConfig, CorpusSource
from kvdistill.corpus.files import ONE_OBJECT, corpus_files, require_unicode, rows_of_file
from kvdistill.corpus.samples import Sample
from kvdistill.errors import CorpusError, MissingExtra
from kvdistill.text import brief, shorten
from kvdistill.types import CorpusFormat, SegmentName

log = logging.getLogger(__name__)

GSM8K_ANSWER: Final = "\n#### "

LABELS: Final = ("sample_id", "id", "task", "teacher")
ROLES: Final = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
"""Roles of a conversation, also as other corpora call them."""
TURN_ROLE: Final = ("role", "from")
TURN_TEXT: Final = ("content", "value")
TURN_THOUGHT: Final = ("reasoning_content", "reasoning", "thinking")
Segments = tuple[tuple[SegmentName, str], ...]
NO_COLUMNS: Final = CorpusColumns()


@dataclass(frozen=True)
class Splits:
    """Samples for extraction and training, and held-out samples for evaluation."""

    train: list[Sample]
    evaluation: list[Sample]


def load_corpus(config: CorpusConfig) -> Splits:
    """Read every part of the corpus and hold out evaluation samples.

    With parts, sample ids are prefixed with the part's name, which is also the task of samples
    without one. Held-out texts that are also trained on are counted in a warning.

    Raises:
        CorpusError: missing, empty or malformed, or nothing is left to train on.
    """
    splits = Splits([], [])
    for name, source in config.sources.items():
        if source.path is None:
            samples = read_dataset(source)
        else:
            samples = read_files(source.path, source.format, source.max_samples, source.columns)
        if name:
            samples = [
                replace(s, sample_id=f"{name}/{s.sample_id}", task=s.task or name) for s in samples
            ]
        num_train = len(samples) - config.eval_samples
        if num_train <= 0:
            where = f"part {name!r}" if name else "the corpus"
            raise CorpusError(
                f"corpus.eval_samples is {config.eval_samples}, but {where} has only "
                f"{len(samples)} samples; nothing is left to train on"
            )
        splits.train.extend(samples[:num_train])
        splits.evaluation.extend(samples[num_train:])
    if config.eval_path is not None:
        held_out = read_files(config.eval_path, config.format, columns=config.columns)
        splits.evaluation.extend(held_out)
    texts = [sample.text for sample in splits.evaluation]
    trained = set(texts).intersection(sample.text for sample in splits.train)
    if trained:
        log.warning(
            "%d of %d held-out texts are also trained on, so held-out figures are too good; remove "
            "them from one of the two",
            *(sum(text in trained for text in texts), len(texts)),
        )
    return splits


def read_files(
    path: Path,
    form: CorpusFormat = "auto",
    limit: int | None = None,
    columns: CorpusColumns = NO_COLUMNS,
) -> list[Sample]:
    """Read one corpus file, or those that match a glob, in the order of their names.

    With a glob, sample ids are prefixed with the file's name, and ``limit`` counts over all files.

    Raises:
        CorpusError: a file is missing, empty or damaged, a row has no known format or text that no
            segment takes, or a sample id is duplicated. The message names file and line.
        MissingExtra: parquet or zstd without pyarrow.
    """
    texts = {*columns.all_texts, *LABELS}
    samples: list[Sample] = []
    for name, file in corpus_files(path).items():
        left = None if limit is None else limit - len(samples)
        if left == 0:
            break
        found = _samples(islice(rows_of_file(file, texts), left), form, str(file), columns)
        samples += [replace(s, sample_id=f"{name}/{s.sample_id}") for s in found] if name else found
    return samples


def read_dataset(source: CorpusSource) -> list[Sample]:
    """Read a Hugging Face dataset by name (extra ``datasets``).

    Raises:
        MissingExtra: ``datasets`` is not installed.
        CorpusError: the dataset cannot be loaded, or as for ``read_files``.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            "corpus.dataset needs the extra 'datasets': pip install 'kvdistill[datasets]'"
        ) from error
    where = f"{source.dataset}[{source.split}]"
    try:
        rows = datasets.load_dataset(source.dataset, source.subset, split=source.split)
    except Exception as error:  # no common base class of what the loaders raise
        cause = shorten(str(error))
        raise CorpusError(f"cannot load dataset {where} ({source.subset}): {cause}") from error
    if source.max_samples is not None:
        rows = rows.select(range(min(source.max_samples, len(rows))))
    located = ((f"{where}, row {i}", dict(row)) for i, row in enumerate(rows))
    return _samples(located, source.format, where, source.columns)


def _samples(
    rows: Iterable[tuple[str, Any]], form: CorpusFormat, source: str, columns: CorpusColumns
) -> list[Sample]:
    """Samples of ``(location, row)`` pairs; a missing id is the row's position."""
    samples: dict[str, Sample] = {}
    splits_answers: set[bool] = set()
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"got {type(row).__name__}; {ONE_OBJECT}")
            used, segments = _segments(row, form, columns)
            named = {name: value for name, value in row.items() if name not in columns.ignore}
            name = _first(named, LABELS[:2])
            sample_id = f"{len(samples):08d}" if name is None else str(row[name])
            task, teacher = (None if named.get(x) is None else str(named[x]) for x in LABELS[2:])
            is_chat = isinstance(row[used[0]], (list, tuple))
            sample = Sample(sample_id, segments, task, teacher, is_chat)
            if sample_id in samples:
                raise ValueError(
                    f"{name} {brief(sample_id)} occurs twice; rename one, or number the rows "
                    f"instead with corpus.columns.ignore: [{name}]"
                )
            if used == ["question", "answer"]:
                splits_answers.add(len(segments) > len(used))
            if len(splits_answers) > 1:
                raise ValueError(
                    "rows of question and answer, of which some are GSM8K's and some are not (no "
                    "'####'); complete them, or set corpus.format: segments to split none"
                )
            require_unicode(sample.to_json())
        except (ValueError, RecursionError) as error:
            cause = "nested too deeply" if isinstance(error, RecursionError) else error
            refused = CorpusError(f"{where}: {cause}")
            refused.columns = getattr(error, "columns", refused.columns)
            raise refused from None
        samples[sample_id] = sample
    if not samples:
        raise CorpusError(f"{source}: the corpus is empty; expected at least one sample")
    return list(samples.values())


def _first(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of several columns that is there and not null."""
    return next((name for name in names if row.get(name) is not None), None)


def _has_text(value: Any) -> bool:
    """Whether a value is or holds text that is not blank."""
    if isinstance(value, str):
        return bool(value.strip())
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list, tuple)) and any(map(_has_text, inner))


def _segments(
    row: dict[str, Any], form: CorpusFormat, columns: CorpusColumns
) -> tuple[list[str], Segments]:
    """The columns that are read, and the segments in them; raises ValueError for any other text."""
    readable = {name: value for name, value in row.items() if name not in columns.ignore}
    names: tuple[SegmentName, ...] = ("prompt", "rationale", "answer")
    names = ("prompt", "answer") if form == "gsm8k" else names
    if form in ("auto", "text") and isinstance(row.get(_first(readable, columns.text) or ""), str):
        names = ("text",)
    elif form in ("auto", "chat") and (messages := _first(readable, columns.messages)):
        _require_all_read(readable, [messages])
        return [messages], conversation(row[messages], columns.ignore)
    found = {name: column for name in names if (column := _first(readable, getattr(columns, name)))}
    context = _first(readable, columns.context) if names[0] == "prompt" else None
    if context is not None and not (isinstance(row[context], str) and row[context].strip()):
        context = None
    elif context is not None and "prompt" not in found:
        found, context = {"prompt": context, **found}, None
    if names[0] not in found or form == "chat" or (form == "text" and names[0] == "prompt"):
        raise _unknown(readable, form)
    texts = {name: row[column] for name, column in found.items()}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{found[name]} must be text, got {type(text).__name__}")
    used = list(found.values())
    if context is not None:
        used.insert(1, context)
        texts["prompt"] = f"{texts['prompt']}\n{row[context]}"
    _require_all_read(readable, used)
    marked = used == ["question", "answer"] and GSM8K_ANSWER in texts["answer"]
    if form == "gsm8k" or (form == "auto" and marked):
        return used, gsm8k_segments(texts["prompt"], texts.get("answer", ""))
    return used, _joined(found, texts)


def _require_all_read(readable: Mapping[str, Any], used: Sequence[str]) -> None:
    """Raise ValueError where a column that is neither ``used`` nor a label has text."""
    read = {*used, *(x for x in LABELS if not isinstance(readable.get(x), (dict, list)))}
    if others := [name for name in readable if name not in read and _has_text(readable[name])]:
        raise _Unread(
            {"ignore": others},
            f"the text in {shorten(', '.join(map(repr, others)), 150)} is not read (only "
            f"{', '.join(used)}); list it in corpus.columns.ignore (--ignore), or the columns to "
            "read in corpus.columns",
        )


class _Unread(ValueError):
    """Columns that are not read, and the settings by which they would be."""

    def __init__(self, columns: Mapping[str, Sequence[str]], message: str) -> None:
        super().__init__(message)
        self.columns = columns


def _unknown(row: Mapping[str, Any], form: CorpusFormat) -> _Unread:
    """A row of unknown form: its keys, and the map of columns by which its texts can be read."""
    texts = [x for x, value in row.items() if isinstance(value, str) and x not in LABELS]
    lists = [x for x, value in row.items() if isinstance(value, list)]
    chats = [x for x in lists if any(isinstance(turn, dict) for turn in row[x])]
    if chats:
        guess = {"messages": chats[:1], "ignore": chats[1:] + texts}
    elif len(texts) > 1:
        guess = {"prompt": texts[:1], "answer": texts[-1:], "ignore": texts[1:-1]}
    else:
        guess = {"text": texts}
    parts = (f"{name}: {json.dumps(given)}" for name, given in guess.items() if given)
    written = shorten(", ".join(parts), 160)
    return _Unread(
        {name: given for name, given in guess.items() if given},
        "expected 'text', 'messages', or 'prompt' with 'rationale' and 'answer', got the keys "
        f"{shorten(', '.join(map(repr, row)), 120)} (corpus.format: {form}); "
        + (
            f"if that fits, write corpus.columns: {{{written}}}" if texts or chats else "give texts"
        ),
    )


def conversation(turns: Any, ignore: Collection[str] = ()) -> Segments:
    """Segments of a chat: system and user are prompts, the assistant rationale and answer.

    A first prompt that another one follows is the system message. ``role``/``content`` or
    ``from``/``value``; the assistant's ``reasoning_content`` is its rationale.

    Raises:
        ValueError: not a list of such turns, another role, or text that is not read.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"a conversation must be a list of turns, got {brief(turns)}")
    segments: list[tuple[SegmentName, str]] = []
    before = None
    for number, turn in enumerate(turns):
        role, texts = _turn(turn, ignore, f"turn {number}")
        if role == "system" and number:
            raise ValueError(f"turn {number} is a system message; only the first turn can be one")
        if role == before == "user":
            texts = [("prompt", f"{segments.pop()[1]}\n{texts[0][1]}")]
        for name, text in texts:
            is_apart = not segments or text.startswith("\n")
            segments.append((name, text if is_apart else "\n" + text))
        before = role
    return tuple(segments)


def _turn(
    turn: Any, ignore: Collection[str], where: str
) -> tuple[str, list[tuple[SegmentName, str]]]:
    """Role and texts of one message."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object of role and content, got {brief(turn)}")
    readable = {name: value for name, value in turn.items() if name not in ignore}
    keys = [_first(readable, names) for names in (TURN_ROLE, TURN_TEXT, TURN_THOUGHT)]
    given = None if keys[0] is None else turn[keys[0]]
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise ValueError(
            f"{where} has the role {brief(given)}; expected system, user or assistant; rename it, "
            "or remove such conversations"
        )
    _require_all_read(readable, [key for key in keys if key is not None])
    thought, text = (_text_of(turn[key] if key else "", where) for key in (keys[2], keys[1]))
    if role == "assistant":
        return role, [("rationale", thought), ("answer", text)] if thought else [("answer", text)]
    if thought:
        raise ValueError(f"{where}: {keys[2]} of {role} is not read; remove it")
    return role, [("prompt", text)]


def _text_of(content: Any, where: str) -> str:
    """The text of a message: a string, or a list of parts that are all text."""
    if isinstance(content, (list, tuple)) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content must be text, got {brief(content)}")
    return content


def _joined(columns: Mapping[SegmentName, str], texts: Mapping[SegmentName, str]) -> Segments:
    """Segments separated by newlines; a completion may begin, or its prompt end, with a space."""
    segments: list[tuple[SegmentName, str]] = []
    for name, text in texts.items():
        before = segments[-1][1] if segments else "\n"
        is_apart = text.startswith("\n") or not segments
        if columns[name] == "completion":
            is_apart |= not (text[:1].strip() and before[-1:].strip())
        segments.append((name, text if is_apart else "\n" + text))
    return tuple(segments)


def gsm8k_segments(question: str, answer: str, where: str = "answer") -> Segments:
    """Question, worked solution and final ``#### 72`` of a GSM8K row."""
    rationale, marker, final = answer.rpartition(GSM8K_ANSWER)
    if not marker:
        raise CorpusError(
            f"{where}: a question whose answer does not end with '#### <number>' is not GSM8K's; "
            "corpus.format: segments reads any question and answer"
        )
    return (("prompt", question), ("rationale", "\n" + rationale), ("answer", marker + final))
