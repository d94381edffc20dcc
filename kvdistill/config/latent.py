"""Latent reasoning as settings: how the student thinks, and which teacher tokens teach it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvdistill.config.base import Fraction, Positive, Section
from kvdistill.types import EvictionMethod

LatentMethod = Literal["none", "pause", "codi", "pccot"]


class EvictionConfig(Section):
    """Which tokens of the teacher's rationale the latent positions are matched with."""

    method: EvictionMethod = "rkv"
    """How tokens are ranked, per layer and head; `random` and `uniform` are controls."""
    budget: Positive | None = None
    """Tokens that are kept, at most `num_latents`; as many as these if not given. Fewer leave the
    last latent positions without a target."""
    mix: Fraction = 0.1
    """Share of importance in the R-KV scores, lambda."""
    seed: int = 0
    """Seed of `random`."""


class LatentConfig(Section):
    """A student that thinks in latent positions instead of words."""

    method: LatentMethod = "pccot"
    """`pccot`: all latents at once, refined `iterations` times (Jacobi). `codi`: one after the
    other. `pause`: latent positions that are never refined. `none`: no latents, the answer
    follows the question."""
    num_latents: Positive = 24
    """Latent positions."""
    iterations: Annotated[int, Field(ge=0)] = 3
    """Refinements of `pccot`; 0 is `pause`, `num_latents` is `codi`."""
    projector_width: Positive = 2048
    """Inner width of the map from a hidden state to the next latent's input."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before that map."""
    eviction: EvictionConfig = EvictionConfig()
    """Which teacher tokens the latents learn from."""
    shuffle_targets: bool = False
    """A placebo: every sample learns from the keys and values of the next one in its batch."""
    max_new_tokens: Positive = 32
    """Room for an answer, at evaluation."""

    @property
    def positions(self) -> int:
        """Latent positions of this method."""
        return 0 if self.method == "none" else self.num_latents

    @property
    def budget(self) -> int:
        """Teacher tokens per layer and head."""
        return self.eviction.budget or self.num_latents

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.eviction.method == "full":
            raise ValueError(
                "eviction.method full keeps every token, and latents are fewer; use right_crop"
            )
        if self.budget > self.num_latents:
            raise ValueError(
                f"eviction.budget is {self.budget}, but there are {self.num_latents} latents"
            )
        return self
