"""What latents learn from: the teacher tokens that an eviction keeps, re-derived at every reading.

Nothing about the eviction is in the store: keys, importance and segments are, so another method,
budget or λ is another run and no new extraction. Scores are taken where their papers take them,
on rotated keys, of the teacher's own rotary embedding at the teacher's own positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.config_latent import LatentConfig
from kvdistill.distill.alignment import LayerMap, rotate
from kvdistill.distill.data.collate import Batch
from kvdistill.distill.spaces import GroupSpace
from kvdistill.errors import ConfigError
from kvdistill.eviction import Eviction, evict
from kvdistill.store.manifest import RotarySpec, TeacherManifest


def nearest_layers(mapping: LayerMap) -> LayerMap:
    """A layer map without mixing: two layers keep different tokens, and their mean is neither."""
    rows = zip(mapping.lower, mapping.upper, mapping.fraction, strict=True)
    layers = tuple(up if part >= 0.5 else low for low, up, part in rows)
    return LayerMap(layers, layers, (0.0,) * len(layers))


@dataclass(frozen=True)
class Rationales:
    """Chooses the tokens of one teacher's rationale, for one group of its layers."""

    latent: LatentConfig
    rotary: Mapping[int, RotarySpec]
    """Per stored layer; empty where keys are not rotated."""

    @staticmethod
    def of(latent: LatentConfig, manifest: TeacherManifest) -> Rationales:
        """For a stored teacher.

        One that was evicted when it was read has slots for tokens, other tokens in every head, in
        order: where they are no more than the latents, they are taken as they are.

        Raises:
            ConfigError: more slots than the budget, and a method that needs the tokens' positions.
        """
        stored, method = manifest.eviction, latent.eviction.method
        if stored is None:
            return Rationales(latent, manifest.rotary)
        if stored.budget <= latent.budget:
            first = latent.eviction.model_copy(update={"method": "right_crop"})
            return Rationales(latent.model_copy(update={"eviction": first}), {})
        if method.startswith("rkv"):
            raise ConfigError(
                f"teacher {manifest.name!r} was extracted with {stored.budget} slots, and {method} "
                f"cannot choose {latent.budget} among them: its keys are ranked at the tokens' "
                "own positions; use importance, random or uniform, or that budget at extraction"
            )
        return Rationales(latent, {})

    def choose(self, group: GroupSpace, key_BLHTD: Tensor, teacher: Batch) -> Eviction:
        """The kept tokens per layer and head, padded to the number of latents.

        Args:
            group: whose layers ``key`` holds.
            key_BLHTD: stored keys, decoded, not rotated.
            teacher: the teacher's part of a batch.
        """
        eviction = self.latent.eviction
        layers = group.layer_map.needed
        by_keys = eviction.method.startswith("rkv")
        kept = evict(
            eviction.method,
            teacher["rationale"],
            len(layers),
            key_BLHTD.shape[2],
            self.latent.budget,
            key_BLHTD=self._rotated(key_BLHTD, layers) if by_keys else None,
            importance_BLHT=teacher["importance"].get(group.prefix),
            mix=eviction.mix,
            seed_B=teacher["seed"],
        )
        return kept.padded(self.latent.positions)

    def _rotated(self, key_BLHTD: Tensor, layers: Sequence[int]) -> Tensor:
        if not self.rotary:
            return key_BLHTD
        position_BT = torch.arange(key_BLHTD.shape[3], device=key_BLHTD.device)[None]
        turned = [
            _turn(key_BLHTD[:, i : i + 1], position_BT, self.rotary[layer])
            for i, layer in enumerate(layers)
        ]
        return torch.cat(turned, dim=1)


def _turn(key_BLHTD: Tensor, position_BT: Tensor, spec: RotarySpec) -> Tensor:
    return rotate(
        key_BLHTD,
        position_BT,
        torch.tensor(spec.inv_freq, device=key_BLHTD.device),
        interleaved=spec.interleaved,
        attention_scaling=spec.attention_scaling,
    )
