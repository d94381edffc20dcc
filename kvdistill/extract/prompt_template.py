r"""How a sample is put to a teacher.

A prompt template is a string such as ``"Question: {prompt}\nAnswer:{rationale}{answer}"``, or a
tokenizer's chat template; without one a teacher reads the sample's text as it is. Rendering keeps
track of which characters come from where, so templates differ freely and still align.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from string import Formatter
from types import SimpleNamespace
from typing import Any, Final

from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.text import shorten

PLACEHOLDERS: Final = ("text", "prompt", "rationale", "answer")
STRIPS: Final = ("", "strip", "lstrip", "rstrip")
_USER, _ASSISTANT = "KVDISTILL-USER-TURN", "KVDISTILL-ASSISTANT-TURN"


@dataclass(frozen=True)
class Placeholder:
    """A segment to fill in, with or without the white space around it."""

    name: str
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


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template: literals, and placeholders between them."""

    pieces: tuple[str | Placeholder, ...]
    source: str | None = None
    """The template as the manifest records it; None for the plain text."""
    date: str | None = None
    """ISO date that a chat template prints as today's; None where it prints none."""

    def render(self, sample: Sample) -> RenderedPrompt:
        """The string that a teacher reads, and which parts of it are which part of the sample.

        Raises:
            TeacherError: the template names segments, but the sample is plain text.
        """
        parts: list[str] = []
        ranges: list[tuple[int, int, int]] = []
        length = 0
        spans = _named_spans(sample)
        for piece in self.pieces:
            if isinstance(piece, str):
                part = piece
            else:
                if piece.name in PLACEHOLDERS[1:] and "text" in dict(sample.segments):
                    raise TeacherError(
                        f"sample {sample.sample_id!r} is plain text, but the prompt template "
                        f"contains {{{piece.name}}}; use a template with {{text}}"
                    )
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
    tokenizer: Any, system: str | None = None, day: date | None = None
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
        raise TeacherError(
            f"{_owner(tokenizer)} has no chat template; set `template` instead of `chat`"
        )
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    rendered, prints_date = _render_on(day, tokenizer, turns)
    before, user_mark, rest = rendered.partition(_USER)
    between, assistant_mark, after = rest.partition(_ASSISTANT)
    if not user_mark or not assistant_mark or _USER in rest or _ASSISTANT in after:
        raise TeacherError(
            f"the chat template of {_owner(tokenizer)} does not render each turn exactly "
            "once; set `template` instead of `chat`"
        )
    if system is not None and system.strip() not in before + between + after:
        raise TeacherError(
            f"the chat template of {_owner(tokenizer)} does not render the system turn; remove "
            "`system`, or set `template` instead of `chat`"
        )
    turn = (Placeholder("rationale", "lstrip"), Placeholder("answer", "rstrip"))
    pieces = (before, Placeholder("prompt", "strip"), between, *turn, after)
    source = f"{before}{{prompt:strip}}{between}{{rationale:lstrip}}{{answer:rstrip}}{after}"
    printed = (day or date.today()).isoformat() if prints_date else None
    return PromptTemplate(tuple(piece for piece in pieces if piece), source, printed)


def _owner(tokenizer: Any) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _render_on(
    day: date | None, tokenizer: Any, turns: Sequence[dict[str, str]]
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
            "`system`, or set `template` instead of `chat`"
        ) from error
    finally:
        chat_template_utils.datetime = clock
    return texts[0], texts[0] != texts[1]


def _named_spans(sample: Sample) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {"text": (0, len(sample.text))}
    for (name, _), (start, end, _) in zip(sample.segments, sample.spans, strict=True):
        spans[name] = (start, end)
    spans["source"] = spans.get("prompt", spans["text"])
    spans["target"] = (spans["prompt"][1] if "prompt" in spans else 0, len(sample.text))
    return spans


def _append(ranges: list[tuple[int, int, int]], new: tuple[int, int, int]) -> None:
    """Append a range, or extend the last one where both texts continue without a gap."""
    if ranges:
        start, end, origin = ranges[-1]
        if end == new[0] and origin + end - start == new[2]:
            ranges[-1] = (start, new[1], origin)
            return
    ranges.append(new)
