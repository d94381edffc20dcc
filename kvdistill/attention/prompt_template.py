r"""How a sample is put to a model.

A prompt template is a string such as ``"Question: {prompt}\nAnswer:{rationale}{answer}"``, or a
tokenizer's chat template; without one a model reads the sample's text as it is. Rendering keeps
track of which characters come from where, so templates differ freely and still align.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, lru_cache
from string import Formatter
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.text import shorten

PLACEHOLDERS: Final = ("text", "prompt", "rationale", "answer")
STRIPS: Final = ("", "strip", "lstrip", "rstrip")
Pieces = tuple["str | Placeholder", ...]
Turns = tuple[tuple[str, tuple[int, ...]], ...]
"""Role and segments of every turn of a conversation."""
_ROLES: Final = ("user", "assistant")
_REMEDY: Final = "set `template` instead of `chat`"
OWN_TEMPLATE: Final = "kvdistill_chat_template"
"""Setting of the tokenizer of a student that reads prompts and answers in its chat template: the
date that the template prints, or an empty string."""
_SIDES: Final = {"": "", "l": "lstrip", "r": "rstrip", "lr": "strip"}


@dataclass(frozen=True)
class Placeholder:
    """A segment to fill in, with or without the white space around it."""

    name: str
    """Of the segment; its number in a conversation."""
    strip: str = ""

    def span(self, spans: dict[str, tuple[int, int]], text: str) -> tuple[int, int]:
        """The characters of the sample's text that are filled in."""
        start, end = spans.get(self.name, (0, 0))
        part = text[start:end]
        if self.strip in ("strip", "lstrip"):
            start = end - len(part.lstrip())
            part = text[start:end]
        if self.strip in ("strip", "rstrip"):
            end = start + len(part.rstrip())
        return start, end


@dataclass(frozen=True)
class RenderedPrompt:
    """Text for the tokenizer; ``ranges`` are ``(start, end, start in the sample's text)``."""

    text: str
    ranges: tuple[tuple[int, int, int], ...]

    def until(self, stop: int) -> str:
        """The text up to where the sample's text goes on at or after character ``stop``."""
        for start, end, origin in self.ranges:
            if origin + end - start > stop:
                return self.text[: start + max(stop - origin, 0)]
        return self.text

    def characters(self, offsets: NDArray[Any]) -> NDArray[Any]:
        """Token offsets in ``text``, ``[T, 2]``, in the sample's text; 0, 0 where in neither."""
        found = np.zeros_like(offsets)
        starts, ends = offsets.T
        for start, end, origin in self.ranges:
            inside = np.maximum(starts, start) < np.minimum(ends, end)
            inside &= found[:, 0] == found[:, 1]
            found[inside] = offsets[inside].clip(start, end) - start + origin
        return found


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template: literals, and placeholders between them."""

    pieces: Pieces
    source: str | None = None
    """The template as the manifest records it; None for the plain text."""
    date: str | None = None
    """ISO date that a chat template prints as today's; None where it prints none."""
    of_turns: Callable[[Turns], Pieces] | None = field(default=None, compare=False)
    """The pieces of a conversation with these turns; None where the template takes no turns."""

    def render(self, sample: Sample) -> RenderedPrompt:
        """The string that a teacher reads, and which parts of it are which part of the sample.

        Raises:
            TeacherError: the template names segments, but the sample is plain text, or has several
                turns.
        """
        parts: list[str] = []
        ranges: list[tuple[int, int, int]] = []
        length = 0
        spans = _named_spans(sample)
        pieces = self.pieces
        if self.of_turns is not None and sample.chat:
            turns = ((role, tuple(numbers)) for role, numbers in sample.turns)
            pieces = self.of_turns(tuple(turns))
        for piece in pieces:
            if isinstance(piece, str):
                part = piece
            else:
                if piece.name in PLACEHOLDERS[1:]:
                    _require_one_turn(sample, piece.name)
                start, end = piece.span(spans, sample.text)
                part = sample.text[start:end]
                _append(ranges, (length, length + len(part), start))
            parts.append(part)
            length += len(part)
        return RenderedPrompt("".join(parts), tuple(ranges))

    def before(self, name: str) -> PromptTemplate:
        """The part before a placeholder: a prompt to continue.

        Raises:
            TeacherError: the template has no such placeholder.
        """
        for position, piece in enumerate(self.pieces):
            if isinstance(piece, Placeholder) and piece.name == name:
                return PromptTemplate(self.pieces[:position], self.source)
        raise TeacherError(
            f"prompt template {self.source!r} has no {{{name}}} to generate; add it to the template"
        )


PLAIN_TEXT: Final = PromptTemplate((Placeholder("text"),))
SEGMENTS: Final = PromptTemplate(
    (Placeholder("prompt"), Placeholder("rationale"), Placeholder("answer"))
)
# The two halves of what an encoder-decoder reads: the prompt and the rest, or a plain text twice.
SOURCE: Final = PromptTemplate((Placeholder("source"),))
TARGET: Final = PromptTemplate((Placeholder("target"),))


def parse_template(template: str | None) -> PromptTemplate:
    """Parse a prompt template.

    Raises:
        TeacherError: an unknown placeholder, an unbalanced brace, or no placeholder at all.
    """
    if template is None:
        return PLAIN_TEXT
    try:
        parsed = [(literal, name, spec) for literal, name, spec, _ in Formatter().parse(template)]
    except ValueError as error:
        raise TeacherError(
            f"prompt template {template!r}: {error}; double a literal brace"
        ) from None
    pieces: list[str | Placeholder] = []
    for literal, name, spec in parsed:
        if literal:
            pieces.append(literal)
        if name is None:
            continue
        if name not in PLACEHOLDERS or spec not in STRIPS:
            found = f"{name}:{spec}" if spec else name
            raise TeacherError(
                f"prompt template {template!r}: unknown placeholder {{{found}}}; expected one of "
                f"{', '.join('{' + known + '}' for known in PLACEHOLDERS)}, each also without "
                "surrounding white space, as {prompt:strip}"
            )
        pieces.append(Placeholder(name, spec or ""))
    if not any(isinstance(piece, Placeholder) for piece in pieces):
        raise TeacherError(f"prompt template {template!r} has no placeholder, such as {{prompt}}")
    return PromptTemplate(tuple(pieces), template)


def chat_template(
    tokenizer: Any, system: str | None = None, day: date | None = None, remedy: str = _REMEDY
) -> PromptTemplate:
    """A tokenizer's chat template as a prompt template: a user turn, then an assistant turn.

    The chat template is rendered once with marks in place of the turns and cut at the marks, so
    none of its rules are re-implemented. Templates that print a date (Llama 3, gpt-oss, SmolLM3)
    print ``day``, or today where it is None.

    Raises:
        TeacherError: the tokenizer has no chat template, or one that fails, or that drops or
            changes its turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TeacherError(f"{_owner(tokenizer)} has no chat template; {remedy}")
    (before, between, after), prints_date = _around_turns(tokenizer, _ROLES, system, day, remedy)
    turn = (Placeholder("rationale", "lstrip"), Placeholder("answer", "rstrip"))
    pieces = (before, Placeholder("prompt", "strip"), between, *turn, after)
    source = f"{before}{{prompt:strip}}{between}{{rationale:lstrip}}{{answer:rstrip}}{after}"
    printed = (day or date.today()).isoformat() if prints_date else None

    @cache
    def of_turns(turns: Turns) -> Pieces:
        roles = tuple(role for role, _ in turns)
        own = None if roles[0] == "system" else system
        literals, _ = _around_turns(tokenizer, roles, own, day, remedy)
        pieces: list[str | Placeholder] = [literals[0]]
        for (_, numbers), literal in zip(turns, literals[1:], strict=True):
            for number in numbers:
                side = "l" * (number == numbers[0]) + "r" * (number == numbers[-1])
                pieces.append(Placeholder(str(number), _SIDES[side]))
            pieces.append(literal)
        return tuple(piece for piece in pieces if piece)

    return PromptTemplate(tuple(piece for piece in pieces if piece), source, printed, of_turns)


@lru_cache(maxsize=8)
def own_template(tokenizer: Any) -> PromptTemplate | None:
    """The chat template in which a student reads; None for one that reads the bare text.

    Raises:
        TeacherError: as ``chat_template``, or the template prints a date and none is set.
    """
    day = getattr(tokenizer, "init_kwargs", {}).get(OWN_TEMPLATE)
    if day is None:
        return None
    remedy = "set student.chat_template to corpus"
    found = chat_template(tokenizer, None, date.fromisoformat(day) if day else None, remedy)
    if found.date and not day:
        raise TeacherError(
            f"the chat template of {_owner(tokenizer)} prints today's date, and a resumed run "
            f"would read other texts; set student.template_date, or {remedy}"
        )
    return found


def own_prompt(tokenizer: Any, sample: Sample) -> RenderedPrompt | None:
    """A sample as a student reads it in its chat template; None where it reads the bare text."""
    template = own_template(tokenizer) if "text" not in dict(sample.segments) else None
    return None if template is None else template.render(replace(sample, chat=True))


def _around_turns(
    tokenizer: Any, roles: Sequence[str], system: str | None, day: date | None, remedy: str
) -> tuple[list[str], bool]:
    """What a chat template prints before, between and after turns, and whether it prints a date.

    Raises:
        TeacherError: it fails, or drops or changes a turn.
    """
    turns = [{"role": "system", "content": system}] if system is not None else []
    marks = [f"KVDISTILL-TURN-{number}-{role}" for number, role in enumerate(roles)]
    turns += [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest, prints_date = _render_on(day, tokenizer, turns, remedy)
    literals = []
    for mark in marks:
        literal, found, rest = rest.partition(mark)
        literals.append(literal)
        if not found or mark in rest:
            raise TeacherError(
                f"the chat template of {_owner(tokenizer)} does not render each turn exactly "
                f"once; {remedy}"
            )
    literals.append(rest)
    if system is not None and system.strip() not in "".join(literals):
        raise TeacherError(
            f"the chat template of {_owner(tokenizer)} does not render the system turn; remove "
            f"`system`, or {remedy}"
        )
    return literals, prints_date


def _owner(tokenizer: Any) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _render_on(
    day: date | None, tokenizer: Any, turns: Sequence[dict[str, str]], remedy: str
) -> tuple[str, bool]:
    """A chat template rendered on a day, and whether the day matters.

    Templates call transformers' ``strftime_now``, whose clock is replaced meanwhile; it takes none
    as an argument. Some read ``date_string`` instead, and print a fixed date without it.
    """
    from transformers.utils import chat_template_utils

    texts, clock = [], chat_template_utils.datetime
    try:
        for shown in (day or date.today(), date(2001, 2, 3)):
            chat_template_utils.datetime = SimpleNamespace(now=lambda shown=shown: shown)
            string = {} if day is None else {"date_string": shown.strftime("%d %b %Y")}
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False, **string))
    except Exception as error:  # a template is code, and may raise anything
        cause = shorten(str(error), 150)
        raise TeacherError(
            f"the chat template of {_owner(tokenizer)} refuses these turns: {cause}; change "
            f"`system`, or {remedy}"
        ) from error
    finally:
        chat_template_utils.datetime = clock
    return texts[0], texts[0] != texts[1]


def _named_spans(sample: Sample) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {"text": (0, len(sample.text))}
    for number, (start, end, _) in enumerate(sample.spans):
        spans[sample.segments[number][0]] = spans[str(number)] = (start, end)
    spans["source"] = (0, spans["prompt"][1]) if "prompt" in spans else spans["text"]
    spans["target"] = (spans["prompt"][1] if "prompt" in spans else 0, len(sample.text))
    return spans


def _require_one_turn(sample: Sample, wanted: str) -> None:
    """Raise TeacherError where a template's placeholder is none, or several, of the segments."""
    names = [name for name, _ in sample.segments]
    if "text" in names or len(names) > len(set(names)):
        what = "plain text" if "text" in names else "a conversation of several turns"
        remedy = "" if "text" in names else " or `chat: true`"
        raise TeacherError(
            f"sample {sample.sample_id!r} is {what}, but the prompt template contains "
            f"{{{wanted}}}; use a template with {{text}}{remedy}"
        )


def _append(ranges: list[tuple[int, int, int]], new: tuple[int, int, int]) -> None:
    """Append a range, or extend the last one where both texts continue without a gap."""
    if ranges:
        start, end, origin = ranges[-1]
        if end == new[0] and origin + end - start == new[2]:
            ranges[-1] = (start, new[1], origin)
            return
    ranges.append(new)
