"""Logits made in chunks are the model's own, cost no more than a chunk, and train the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvdistill.attention import language_head
from kvdistill.attention.hooks import attached
from kvdistill.attention.language_head import DeferredLogits, LanguageHead, OutputHead
from kvdistill.distill.losses.pointwise import cross_entropy
from tests.attention.families import DECODERS, ENCODER_DECODERS, MORE_DECODERS
from tests.distill.student.latent.thinkers import batch, thinker

VOCABULARY = 101
WIDTHS = (16, 32)  # what a head reads
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # a head with a bias
    "opt": {},  # a projection behind the layers
    "gpt2": {},
    "mixtral": {"num_local_experts": 4},
    "llama4_text": {"head_dim": 8, "num_local_experts": 2},
}


def built(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL | FAMILIES[model_type])
    return AutoModelForCausalLM.from_config(config).eval()  # without dropout


def texts() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Largest(TorchDispatchMode):
    """The most elements of any tensor of logits; the head's weights are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.shape[-1:] == (VOCABULARY,) and len(x) not in WIDTHS:
                self.numel = max(self.numel, x.numel())
        return found


def loss_and_gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    given = texts()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    _, logits = LanguageHead(model).run(**given, use_cache=False)
    loss = cross_entropy(logits, labels, None)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return loss, [g for g in found if g is not None]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_loss_in_chunks_is_the_loss_of_all_logits(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(model_type)
    whole = loss_and_gradients(model)
    labels = texts()["input_ids"].masked_fill(texts()["attention_mask"] == 0, -100)
    own = model(**texts(), use_cache=False).logits
    torch.testing.assert_close(whole[0], cross_entropy(own, labels, None))
    monkeypatch.setattr(language_head, "MAX_LOGITS", 4 * VOCABULARY)
    _, logits = LanguageHead(model).run(**texts(), use_cache=False)
    assert isinstance(logits, DeferredLogits)
    torch.testing.assert_close(logits.whole(), own, atol=1e-5, rtol=1e-4)
    with Largest() as largest:
        loss, gradients = loss_and_gradients(model)
    # Verification takes five tokens.
    assert largest.numel <= 5 * VOCABULARY
    torch.testing.assert_close(loss, whole[0])
    for ours, theirs in zip(gradients, whole[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_model_whose_logits_need_all_tokens_computes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    forward = model.forward

    def mixing(**given: Any) -> Any:
        output = forward(**given)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output

    model.forward = mixing
    monkeypatch.setattr(language_head, "MAX_LOGITS", 1)
    head = LanguageHead(model)
    assert not head.is_separable
    _, logits = head.run(**texts(), use_cache=False)
    assert isinstance(logits, Tensor)
    assert torch.equal(logits, mixing(**texts(), use_cache=False).logits)


def test_verification_changes_nothing() -> None:
    model = built("llama").train()
    model.model.layers[0].eval()
    before = torch.random.get_rng_state()
    LanguageHead(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert not model.model._forward_hooks
    assert "forward" not in model.model.__dict__


@pytest.mark.parametrize("settings", [{"iterations": 3}, {"method": "codi"}])
def test_latents_do_not_run_the_head(settings: dict[str, Any]) -> None:
    student = thinker(num_latents=4, **settings)
    seen: list[int] = []
    head: nn.Module = student.backbone.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    given = batch()
    thought = student(**given)
    assert seen == [1 + given["answer_BA"].shape[1]]
    assert thought.answer_logits.shape[1] == seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS | MORE_DECODERS | ENCODER_DECODERS)
def test_the_head_of_every_family_makes_logits_of_its_bodys_hidden_states(family: str) -> None:
    model_type, options = (DECODERS | MORE_DECODERS | ENCODER_DECODERS)[family]
    config = AutoConfig.for_model(model_type, **options)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    try:
        model = kind.from_config(config).eval()
    except ValueError as error:
        pytest.skip(f"transformers has no head for it: {str(error)[:80]}")
    head = OutputHead(model)
    found: list[Tensor] = []
    ids = torch.randint(3, 60, (2, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    hook = head.body.register_forward_hook(lambda *args: found.append(args[-1][0]))
    with torch.no_grad(), attached([hook]):
        wanted = model(**given).logits
        torch.testing.assert_close(head(found[0]), wanted, atol=1e-5, rtol=1e-4)
