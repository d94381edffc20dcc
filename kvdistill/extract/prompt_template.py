r"""How a sample is put to a teacher.

A view is a template such as ``"Question: {prompt}\nAnswer:{rationale}{answer}"``, or what a
tokenizer's chat template makes of it; without one a teacher reads the sample's text as it is.
Rendering remembers which characters came from where, so views differ freely and still align.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Any, Final

from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError

PLACEHOLDERS: Final = ("text", "prompt", "rationale", "answer")


STRIPS: Final = ("", "strip", "lstrip", "rstrip")


_USER, _ASSISTANT = "KVDISTILL-USER-TURN", "KVDISTILL-ASSISTANT-TURN"


@dataclass(frozen=True)
class TemplateSlot:
    """A segment to fill in, with or without the white space around it."""

    name: str
    strip: str = ""

    def span(self, spans: dict[str, tuple[int, int]], text: str) -> tuple[int, int]:
        """The characters of the sample's text that go here."""
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
    """A parsed template: literals, and slots between them."""

    pieces: tuple[str | TemplateSlot, ...]
    source: str | None = None
    """What the manifest keeps of it; None for the text as it is."""

    def render(self, sample: Sample) -> RenderedPrompt:
        """The string a teacher reads, and which parts of it are which part of the sample.

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
                _refuse_plain_text(piece, sample)
                start, end = piece.span(spans, sample.text)
                part = sample.text[start:end]
                _append(ranges, (length, length + len(part), start))
            parts.append(part)
            length += len(part)
        return RenderedPrompt("".join(parts), tuple(ranges))

    def before(self, name: str) -> PromptTemplate:
        """What stands before a slot: a prompt to continue.

        Raises:
            TeacherError: the view has no such slot.
        """
        for position, piece in enumerate(self.pieces):
            if isinstance(piece, TemplateSlot) and piece.name == name:
                return PromptTemplate(self.pieces[:position], self.source)
        raise TeacherError(f"template {self.source!r} has no {{{name}}} to generate")


AS_IT_IS: Final = PromptTemplate((TemplateSlot("text"),))


SEGMENTS: Final = PromptTemplate(
    (TemplateSlot("prompt"), TemplateSlot("rationale"), TemplateSlot("answer"))
)


def parse_template(template: str | None) -> PromptTemplate:
    """Read a template.

    Raises:
        TeacherError: an unknown placeholder, an unbalanced brace, or no placeholder at all.
    """
    if template is None:
        return AS_IT_IS
    try:
        parsed = [(literal, name, spec) for literal, name, spec, _ in Formatter().parse(template)]
    except ValueError as error:
        raise TeacherError(f"template {template!r}: {error}; double a literal brace") from None
    pieces: list[str | TemplateSlot] = []
    for literal, name, spec in parsed:
        if literal:
            pieces.append(literal)
        if name is None:
            continue
        if name not in PLACEHOLDERS or spec not in STRIPS:
            asked = f"{name}:{spec}" if spec else name
            raise TeacherError(
                f"template {template!r}: unknown placeholder {{{asked}}}; known: "
                f"{', '.join('{' + known + '}' for known in PLACEHOLDERS)}, each also with white "
                "space left out, as {prompt:strip}"
            )
        pieces.append(TemplateSlot(name, spec or ""))
    if not any(isinstance(piece, TemplateSlot) for piece in pieces):
        raise TeacherError(f"template {template!r} has no placeholder, such as {{prompt}}")
    return PromptTemplate(tuple(pieces), template)


def chat_template(tokenizer: Any, system: str | None = None) -> PromptTemplate:
    """The view that a tokenizer's chat template makes: user, then assistant.

    The template is rendered once around marks, and cut at them, so nothing of it is guessed.

    Raises:
        TeacherError: the tokenizer has no chat template, or one that drops or changes its turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TeacherError(
            f"{type(tokenizer).__name__} has no chat template; give `template` instead of `chat`"
        )
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    rendered: str = tokenizer.apply_chat_template(turns, tokenize=False)
    before, user_mark, rest = rendered.partition(_USER)
    between, assistant_mark, after = rest.partition(_ASSISTANT)
    if not user_mark or not assistant_mark or _USER in rest or _ASSISTANT in after:
        raise TeacherError("the chat template does not show each turn exactly once")
    answer = (TemplateSlot("rationale", "lstrip"), TemplateSlot("answer", "rstrip"))
    pieces = (before, TemplateSlot("prompt", "strip"), between, *answer, after)
    shown = f"{before}{{prompt:strip}}{between}{{rationale:lstrip}}{{answer:rstrip}}{after}"
    return PromptTemplate(tuple(piece for piece in pieces if piece), shown)


def _refuse_plain_text(slot: TemplateSlot, sample: Sample) -> None:
    if slot.name in ("prompt", "rationale", "answer") and "text" in dict(sample.segments):
        raise TeacherError(
            f"sample {sample.sample_id!r} is plain text, but the template asks for "
            f"{{{slot.name}}}; use a template with {{text}}"
        )


def _named_spans(sample: Sample) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {"text": (0, len(sample.text))}
    for (name, _), (start, end, _) in zip(sample.segments, sample.spans, strict=True):
        spans[name] = (start, end)
    # What an encoder-decoder's two halves read: the prompt and the rest, or the text twice.
    spans["source"] = spans.get("prompt", spans["text"])
    spans["target"] = (spans["prompt"][1] if "prompt" in spans else 0, len(sample.text))
    return spans


def _append(ranges: list[tuple[int, int, int]], new: tuple[int, int, int]) -> None:
    """Join parts that follow each other both as read and in the sample."""
    if ranges:
        start, end, origin = ranges[-1]
        if end == new[0] and origin + end - start == new[2]:
            ranges[-1] = (start, new[1], origin)
            return
    ranges.append(new)
