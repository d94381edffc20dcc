"""Rotary embedding against complex numbers, and against transformers' own."""

import pytest
import torch

from kvdistill.attention.rotary import rotary_candidates, rotate, scale_frequencies, unrotate
from kvdistill.errors import ConfigError
from kvdistill.store.manifest import RotarySpec
from tests.extract.models import BASE, tiny_model


def inverse_frequencies(rotary_dim, base=10_000.0):
    """``base^(−2i/d)`` for ``i = 0 … d/2 − 1`` (RoFormer, arXiv 2104.09864)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return (base**-exponent).float()


def spec(inv_freq, **settings):
    found = tuple(inv_freq.tolist())
    return RotarySpec(rotary_dim=2 * len(found), inv_freq=found, **settings)


def complex_rotation(x, position, inv_freq, interleaved):
    """Channel pairs as complex numbers, one position at a time."""
    d = 2 * len(inv_freq)
    out = x.clone()
    for t, p in enumerate(position.tolist()):
        turn = torch.polar(torch.ones(len(inv_freq)).double(), p * inv_freq.double())
        real, imag = (
            (x[..., t, 0:d:2], x[..., t, 1:d:2])
            if interleaved
            else (x[..., t, : d // 2], x[..., t, d // 2 : d])
        )
        z = torch.complex(real.double(), imag.double()) * turn
        if interleaved:
            out[..., t, 0:d:2], out[..., t, 1:d:2] = z.real.float(), z.imag.float()
        else:
            out[..., t, : d // 2], out[..., t, d // 2 : d] = z.real.float(), z.imag.float()
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_equals_complex_multiplication(interleaved, rotary_dim):
    torch.manual_seed(0)
    x, position = torch.randn(2, 3, 2, 5, 8), torch.tensor([0, 1, 7, 30, 31])
    inv_freq = inverse_frequencies(rotary_dim, 100.0)
    out = rotate(x, position, spec(inv_freq, interleaved=interleaved))
    expected = complex_rotation(x, position, inv_freq, interleaved)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])


def test_equals_transformers_for_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=128)
    position = torch.arange(20)[None]
    k = torch.randn(2, 3, 20, 16)
    cos, sin = LlamaRotaryEmbedding(config)(k, position)
    _, expected = apply_rotary_pos_emb(k, k, cos, sin)
    base = config.rope_parameters["rope_theta"]
    out = rotate(k, position, spec(inverse_frequencies(16, base)))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_unrotate_undoes_a_rotation_at_any_positions():
    x, position = torch.randn(2, 3, 6, 8), torch.randint(0, 500, (2, 1, 6))
    turned = spec(inverse_frequencies(6), attention_scaling=1.3)
    out = unrotate(rotate(x, position, turned), position, turned)
    torch.testing.assert_close(out, x, atol=1e-5, rtol=1e-5)


def test_a_rotation_of_both_sides_leaves_an_mse_unchanged():
    a, b = torch.randn(2, 1, 2, 2, 9, 8).unbind()
    position, turned = torch.arange(9), spec(inverse_frequencies(8))
    before = (a - b).square().mean()
    after = (rotate(a, position, turned) - rotate(b, position, turned)).square().mean()
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_scalings_by_their_definitions(dim, factor):
    base = 10_000.0
    inv_freq = inverse_frequencies(dim, base)
    ntk = inverse_frequencies(dim, base * factor ** (dim / (dim - 2)))
    torch.testing.assert_close(scale_frequencies(inv_freq, "ntk", factor), ntk)
    torch.testing.assert_close(ntk[0], inv_freq[0])
    torch.testing.assert_close(ntk[-1], inv_freq[-1] / factor)
    assert torch.equal(scale_frequencies(inv_freq, "linear", factor), inv_freq / factor)
    assert torch.equal(scale_frequencies(inv_freq, "student", factor), inv_freq)
    n, trained = 3000, 1000
    grown = factor * n / trained - (factor - 1)
    dynamic = inverse_frequencies(dim, base * grown ** (dim / (dim - 2)))
    got = scale_frequencies(inv_freq, "dynamic", factor, length=n, trained_length=trained)
    torch.testing.assert_close(got, dynamic)
    short = scale_frequencies(inv_freq, "dynamic", factor, length=500, trained_length=trained)
    torch.testing.assert_close(short, inv_freq)


def test_errors():
    with pytest.raises(ConfigError, match="must be > 0, got 0"):
        scale_frequencies(inverse_frequencies(8), "linear", 0)
    with pytest.raises(ConfigError, match="dynamic needs length"):
        scale_frequencies(inverse_frequencies(8), "dynamic", 2.0)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
        (
            "gemma3_text",
            {
                "head_dim": 8,
                "rope_parameters": {
                    "full_attention": {**YARN, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
        ),
    ],
)
def test_the_scaling_that_a_module_states_is_taken_as_it_is(model_type, options):
    model = tiny_model(model_type, **BASE, **options, vocab_size=32)
    layers = [candidates[0] for candidates in rotary_candidates(model, 3)]
    module = model.rotary_emb
    name = "full_attention_attention_scaling"
    stated = getattr(module, name, None) or module.attention_scaling
    assert stated != 1
    assert layers[1].attention_scaling == stated
    assert layers[0].attention_scaling == (1.0 if hasattr(module, name) else stated)
