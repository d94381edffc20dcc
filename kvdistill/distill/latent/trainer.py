"""The trainer of a latent student: the same one, but held-out samples are answered, not scored."""

from __future__ import annotations

from typing import Any

from kvdistill.distill.held_out import HeldOut
from kvdistill.distill.latent.evaluate import score_latent
from kvdistill.distill.trainer import KVDistillTrainer


class LatentTrainer(KVDistillTrainer):
    """Trains a ``LatentDistiller``; evaluates by exact match.

    Perplexity is left out: a latent student has no text of a rationale to be surprised by.
    """

    def score(self, student: Any) -> HeldOut:
        """Exact match on ``training.exact_match_samples`` held-out samples, or on all of them."""
        training = self.experiment.training
        return score_latent(
            student,
            self.processing_class,
            self.evaluation,
            batch_size=training.batch_size,
            answer=training.exact_match_samples or None,
        )
