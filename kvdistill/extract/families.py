"""Which adapters to try on a model: its own family's, or for a stranger every one that might fit.

Trying is safe because every adapter is verified on the model in hand before it is used.
"""

from __future__ import annotations

from typing import Any, Final

from kvdistill.adapters import (
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    REFUSED,
    Adapter,
)
from kvdistill.errors import TeacherError
from kvdistill.types import Stream

STRANGERS: Final[tuple[Adapter, ...]] = tuple(
    sorted({*DECODERS.values(), *ENCODERS.values()}, key=lambda a: (not a.key_norm, a.name))
)
"""Adapters to try on an unknown architecture, those that know about key norms first."""


def adapters_for(name: str, model: Any, stream: Stream | None = None) -> list[Adapter]:
    """Candidates for a model, likeliest first.

    Raises:
        TeacherError: the architecture is known to have no keys that the store can hold, or is
            an encoder-decoder and the stream is not chosen.
    """
    model_type = model.config.get_text_config().model_type
    if model_type in REFUSED:
        raise TeacherError(f"teacher {name!r} ({model_type}) cannot be read: {REFUSED[model_type]}")
    if model.config.model_type in ENCODER_DECODERS:
        streams = ENCODER_DECODERS[model.config.model_type]
        if stream not in streams:
            raise TeacherError(
                f"teacher {name!r} is an encoder-decoder; set teachers.{name}.stream to one of "
                f"{', '.join(streams)}"
            )
        return [streams[stream]]
    if stream is not None:
        raise TeacherError(
            f"teacher {name!r} ({model_type}) has one stream of tokens; leave out "
            f"teachers.{name}.stream, which chooses among those of an encoder-decoder"
        )
    if model_type in DECODERS:
        return [DECODERS[model_type]]
    if model_type in ENCODERS:
        return [ENCODERS[model_type]]
    return list(STRANGERS)


def is_known(model: Any) -> bool:
    """Whether the architecture has an adapter of its own."""
    model_type = model.config.get_text_config().model_type
    return model_type in {*DECODERS, *ENCODERS, *ENCODER_DECODERS}
