"""The auxiliary loss of a mixture-of-experts student, by which its routers keep using all experts.

Number of experts · Σ_experts (share of the choices) · (mean probability), over the tokens of all
layers (Switch Transformers, arXiv 2101.03961, equations 4 to 6), as transformers computes it for
the model at hand. It is of one forward pass: shares over a step would need all ranks' routers.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
from torch import Tensor

from kvdistill.errors import ConfigError


class LoadBalancing:
    """The loss of one student; inactive where its model has none, or its weight is 0."""

    def __init__(self, model: Any, weight: float | None) -> None:
        """``weight`` is the model's own if not given.

        Raises:
            ConfigError: a weight, but the model has no such loss, or one that is not transformers'.
        """
        names = ("router_aux_loss_coef", "aux_loss_coef")
        own = [getattr(model, name) for name in names if hasattr(model, name)]
        exists = bool(own) and bool(getattr(model, "num_experts", None))
        self.weight = float((own[0] or 0.0) if weight is None and exists else weight or 0.0)
        if not self.weight:
            return
        module = sys.modules[type(model).__module__]
        self._loss: Any = getattr(module, "load_balancing_loss_func", None)
        if not exists or self._loss is None:
            what = "one that cannot be computed" if exists else "none"
            raise ConfigError(
                f"losses.router_aux weighs the load-balancing loss of the student's experts, but "
                f"type {model.config.model_type!r} has {what}; set it to 0"
            )
        known = {
            "num_experts": model.num_experts,
            "top_k": model.num_experts_per_tok,
            "num_keys": math.isqrt(model.num_experts),  # Doge's experts are products of keys
        }
        wanted = inspect.signature(self._loss).parameters
        self._options = {name: value for name, value in known.items() if name in wanted}

    @property
    def inputs(self) -> dict[str, Any]:
        """Further inputs of a forward pass from whose output the loss is taken."""
        return {"output_router_logits": True} if self.weight else {}

    def __call__(self, output: Any, attention_mask_BT: Tensor) -> Tensor | None:
        """A float32 scalar; 0 where no layer of the model has experts, None if inactive."""
        if not self.weight:
            return None
        loss = self._loss(output.router_logits, attention_mask=attention_mask_BT, **self._options)
        return torch.as_tensor(loss, dtype=torch.float32, device=attention_mask_BT.device)
