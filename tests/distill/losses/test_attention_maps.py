"""Attention KL, relation and hidden-state losses against plain, dense forms; gradients too."""

import pytest
import torch
import torch.nn.functional as F

from kvdistill.attention.attention_rule import AttentionRule, MaskRule
from kvdistill.distill.losses.attention_maps import LayerAttention, attention_kl, relation_error
from kvdistill.distill.losses.pointwise import hidden_error
from kvdistill.errors import GeometryError

MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]]).bool()
MASK_BLT = torch.stack([MASK, MASK.roll(1, 1), torch.zeros_like(MASK)], 1)
PAIRS_BLTT = MASK_BLT[..., :, None] & MASK_BLT[..., None, :]
CAUSAL = torch.ones(6, 6).tril().bool()
PLAIN = AttentionRule(rotary=None, scaling=5**-0.5, mask=MaskRule(causal=True))


def plain_kl(query, own, target, mask):
    """Without rotation, window, cap, bias or sink, which the families of the table have."""
    layers = [LayerAttention(PLAIN, PLAIN)] * query.shape[1]
    return attention_kl(query, own, target, mask, layers)


def kl_rows(target, student, visible):
    """KL of softmaxes over the visible columns, row by row."""
    out = torch.zeros(target.shape[:-1], dtype=target.dtype)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in target.shape[:-1])).tolist():
        row = visible[place[0], place[-1]]
        if row.any():
            p = target[tuple(place)][row].log_softmax(0)
            q = student[tuple(place)][row].log_softmax(0)
            out[tuple(place)] = F.kl_div(q, p, log_target=True, reduction="sum")
    return out


def test_attention_kl_equals_the_dense_form():
    torch.manual_seed(0)
    query = torch.randn(2, 3, 4, 6, 5, requires_grad=True)
    own = torch.randn(2, 3, 2, 6, 5, requires_grad=True)
    target = torch.randn(2, 3, 2, 6, 5)
    got = plain_kl(query, own, target, MASK_BLT)
    expected = []
    for layer in range(3):
        q = query[:, layer]
        k, k_target = (x[:, layer].repeat_interleave(2, dim=1) for x in (own, target))
        logits, wanted = (q @ k.mT) / 5**0.5, (q.detach() @ k_target.mT) / 5**0.5
        expected.append(kl_rows(wanted, logits, PAIRS_BLTT[:, layer] & CAUSAL).mean(1))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(got, expected)
    mine = torch.autograd.grad(got.sum(), [query, own], retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), [query, own])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_equal_keys_have_no_divergence_and_masked_queries_score_zero():
    query, key = torch.randn(2, 1, 2, 6, 4), torch.randn(2, 1, 2, 6, 4)
    mask = MASK[:, None]
    got = plain_kl(query, key, key, mask)
    torch.testing.assert_close(got, torch.zeros(2, 1, 6), atol=1e-6, rtol=0)
    other = plain_kl(query, key, torch.randn_like(key), mask)
    assert not other[~mask].any()
    assert bool((other[mask] >= -1e-6).all())
    nothing = torch.zeros_like(mask)
    key.requires_grad_()
    empty = plain_kl(query, key, torch.randn_like(key), nothing)
    empty.sum().backward()
    assert not empty.any()
    assert bool(key.grad.isfinite().all())


@pytest.mark.parametrize("num_relations", [1, 2])
def test_relations_equal_the_dense_form_whatever_the_widths(num_relations):
    torch.manual_seed(0)
    own = torch.randn(2, 3, 2, 6, 5, requires_grad=True)
    teacher = torch.randn(2, 3, 3, 6, 4)
    got = relation_error(own, teacher, MASK_BLT, num_relations)
    expected = []
    for layer in range(3):
        logits = []
        for x in (teacher, own):
            joined = torch.cat(list(x[:, layer].unbind(1)), dim=-1)
            cut = torch.stack(joined.chunk(num_relations, dim=-1), dim=1)
            logits.append(cut @ cut.mT / cut.shape[-1] ** 0.5)
        expected.append(kl_rows(*logits, PAIRS_BLTT[:, layer]).mean(1))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), own, retain_graph=True)[0],
        torch.autograd.grad(expected.sum(), own)[0],
        atol=1e-6,
        rtol=1e-4,
    )


def test_relations_ignore_a_rotation_of_the_teacher():
    torch.manual_seed(0)
    own, teacher = torch.randn(2, 1, 1, 6, 8), torch.randn(2, 1, 1, 6, 8)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    torch.testing.assert_close(
        relation_error(own, teacher, MASK[:, None], 1),
        relation_error(own, teacher @ turn, MASK[:, None], 1),
    )


def test_hidden_error_against_its_definition():
    torch.manual_seed(0)
    student, target = torch.randn(4, 3, 5), 3 * torch.randn(4, 3, 5)
    error = F.smooth_l1_loss(student, target, reduction="none").mean(2)
    std = torch.stack([target[:, layer].flatten().std(correction=0) for layer in range(3)])
    torch.testing.assert_close(hidden_error(student, target), error / std)


def test_errors():
    x = torch.zeros(2, 1, 2, 6, 4)
    with pytest.raises(GeometryError, match="a multiple of 3 relation heads"):
        relation_error(x, x, MASK[:, None], 3)
