"""Injected keys and values are what the student attends to, for every way of tapping them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvdistill.attention.kv_capture import KVCapture, stack_layers
from kvdistill.distill.fuse.router import Router
from kvdistill.distill.fuse.weights import fuse, renormalise
from kvdistill.distill.student.injection import InjectionGate, following, injecting
from kvdistill.errors import GeometryError

SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
STUDENTS = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma3_text": GROUPED | {"sliding_window": 64},
    "phi3": GROUPED | {"pad_token_id": 0},
    "gpt2": SMALL,
}


def student(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **STUDENTS[model_type])
    return AutoModelForCausalLM.from_config(config).eval()


def run(model, ids):
    capture = KVCapture(model)
    with capture() as found:
        logits = model(input_ids=ids, use_cache=False).logits
    _, key, value = stack_layers(found)
    return logits, key, value


@pytest.fixture(params=STUDENTS)
def model(request):
    return student(request.param)


@torch.no_grad()
def test_own_keys_and_values_change_nothing(model):
    ids = torch.randint(0, 50, (2, 9))
    logits, key, value = run(model, ids)
    with injecting(KVCapture(model), key, value, torch.ones(2, 2, 9).bool()):
        again = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(again, logits)


@torch.no_grad()
def test_another_texts_prompt_can_be_put_in(model):
    """With the prompt's KV given, later tokens cannot tell which prompt was really there."""
    ids, other = torch.randint(0, 50, (1, 9)), torch.randint(0, 50, (1, 9))
    other[:, 5:] = ids[:, 5:]
    wanted, key, value = run(model, other)
    plain = model(input_ids=ids, use_cache=False).logits
    prompt = (torch.arange(9) < 5).expand(1, 2, 9)
    with injecting(KVCapture(model), key, value, prompt):
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got[:, 5:], wanted[:, 5:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain[:, 5:], wanted[:, 5:], atol=1e-4)
    with torch.inference_mode():
        after = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, plain)  # no hook is left behind


def test_gradients_reach_what_is_given_and_the_gate_but_not_masked_tokens():
    model = student("llama")
    ids = torch.randint(0, 50, (1, 6))
    _, key, value = run(model, ids)
    key, value = (torch.randn_like(x).requires_grad_() for x in (key, value))
    gate = InjectionGate(2)
    mask = (torch.arange(6) < 3).expand(1, 2, 6)
    with injecting(KVCapture(model), key, value, mask, gate):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for x in (key, value):
        assert bool((x.grad[..., :3, :] != 0).any())
        assert not x.grad[..., 3:, :].any()
    assert bool((gate.logit_KL.grad != 0).all())


def test_a_gate_starts_as_far_open_as_asked():
    gate = InjectionGate(1, opening=0.0474)
    own, given = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    mixed = gate(own, given, 0, "key")
    torch.testing.assert_close(mixed, own + 0.0474 * given, atol=1e-3, rtol=0)


def test_a_router_trained_by_injection_votes_a_noise_teacher_out():
    """The prompt is hidden from the student; only the true teacher's KV says what follows it."""
    torch.manual_seed(0)
    model = student("llama")
    capture, router = KVCapture(model), Router("mlp", 2, 4)
    meaning = torch.randn(2, 6, 2, 2, 1, 8)  # per kind and word: what the teacher makes of it
    optimizer = torch.optim.Adam([*model.parameters(), *router.parameters()], 0.01)
    covered = torch.tensor([True, False]).expand(2, 32, 2, 2)
    for _ in range(120):
        word = torch.randint(0, 6, (32,))
        alpha = renormalise(router(torch.randn(32, 4)), covered)
        kv = [
            fuse(alpha, [x.expand(-1, -1, -1, 2, -1), torch.randn(32, 2, 2, 2, 8)])
            for x in meaning[:, word]
        ]
        with injecting(capture, *kv, covered[0]):
            logits = model(input_ids=torch.zeros(32, 2).long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, 1], word)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert router(torch.randn(50, 4))[1].mean().item() < 0.05
    assert loss.item() < 0.3


def test_following_starts_after_the_last_injected_token():
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    labels = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    got = following(mask, labels)
    assert got.int().tolist() == [[0, 0, 0, 1, 0], [0] * 5, [0] * 5]


def test_a_teachers_own_shape_is_refused():
    capture = KVCapture(student("llama"))
    wrong = torch.zeros(1, 2, 4, 6, 8)
    with (
        pytest.raises(GeometryError, match=r"expected a key \[B, 2, 2, T, 8\]"),
        injecting(capture, wrong, wrong, torch.ones(1, 2, 6).bool()),
    ):
        pass
