"""Rate and distortion of every codec on a real model's keys and values.

    python benchmarks/codecs.py --model models/smollm2 --corpus gsm8k/train.jsonl --samples 16

Rate: bits per stored element, scales included, as written by the zarr backend (in brackets: by the
safetensors backend). Distortion: the effect of the decoded keys and values inside the model:

    tensor     relative error of keys and of values
    attention  relative error of the attention output (before the output projection); the inputs of
               each layer are those of the unmodified model; mean over layers
    KL, ΔNLL   all layers replaced at once: divergence of the next-token distribution from that of
               the unmodified model, and change of the negative log-likelihood of the text
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvdistill.corpus.readers import read_jsonl
from kvdistill.store.backends.safetensors import SafetensorsBackend
from kvdistill.store.backends.zarr import ZarrBackend
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name
from kvdistill.store.format import ArraySpec
from kvdistill.types import KINDS, CodecName, Kind, LayerGroup

PAIRS: tuple[tuple[CodecName, CodecName], ...] = (
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("int8", "int8"),
    ("fp8_e4m3", "fp8_e4m3"),
    ("int8", "int4"),
    ("int4", "int8"),
    ("int4", "int4"),
)


@dataclass
class Clean:
    """Outputs of the unmodified model on one text."""

    input_ids: Tensor
    log_probs: Tensor
    states: dict[tuple[str, int], Tensor] = field(default_factory=dict)


@contextmanager
def hooks(model: torch.nn.Module, change: Callable[[str, int, Tensor], Tensor]) -> Iterator[None]:
    """Pass the output ``[1, T, H·D]`` of every q, k and v projection through ``change``."""
    handles = [
        getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
            lambda _module, _inputs, out, name=name, i=i: change(name, i, out)
        )
        for i, layer in enumerate(model.model.layers)
        for name in ("q", "k", "v")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def heads(x_1TE: Tensor, head_dim: int) -> Tensor:
    """``[1, T, H·D]`` → ``[H, T, D]``."""
    return x_1TE[0].unflatten(-1, (-1, head_dim)).transpose(0, 1)


def run_clean(model: torch.nn.Module, input_ids: Tensor) -> Clean:
    states: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, layer: int, out: Tensor) -> Tensor:
        states[name, layer] = heads(out, model.config.head_dim)
        return out

    with hooks(model, keep):
        logits = model(input_ids).logits[0]
    return Clean(input_ids, logits.log_softmax(-1), states)


def through(codec: CodecName, x_HTD: Tensor, kind: Kind) -> Tensor:
    parts = CODECS[codec].encode(x_HTD[None], kind)
    return CODECS[codec].decode(parts, kind)[0]


def attention_output(model: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position_ids = torch.arange(q.shape[1])[None]
    cos, sin = model.model.rotary_emb(v[None], position_ids)
    q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
    return F.scaled_dot_product_attention(q, k, v[None], is_causal=True, enable_gqa=True)


def measure(model: torch.nn.Module, texts: list[Clean], pair: tuple[CodecName, CodecName]) -> str:
    names: dict[str, tuple[Kind, CodecName]] = {"k": ("key", pair[0]), "v": ("value", pair[1])}
    tensor = {name: [0.0, 0.0] for name in names}
    attention = torch.zeros(len(model.model.layers), 2, dtype=torch.float64)
    kl, nll, count = 0.0, 0.0, 0
    for clean in texts:
        decoded = {
            (name, layer): through(codec, clean.states[name, layer], kind)
            for layer in range(len(attention))
            for name, (kind, codec) in names.items()
        }
        for (name, layer), x in decoded.items():
            want = clean.states[name, layer]
            tensor[name][0] += float((x - want).square().sum())
            tensor[name][1] += float(want.square().sum())
            if name == "k":
                q, v = clean.states["q", layer], decoded["v", layer]
                exact = attention_output(model, q, want, clean.states["v", layer])
                error = attention_output(model, q, x, v) - exact
                attention[layer] += torch.stack([error.square().sum(), exact.square().sum()])

        def replace(name: str, layer: int, out: Tensor, decoded=decoded) -> Tensor:
            if name == "q":
                return out
            return decoded[name, layer].transpose(0, 1).flatten(-2)[None]

        with hooks(model, replace):
            log_probs = model(clean.input_ids).logits[0].log_softmax(-1)
        kl += float((clean.log_probs.exp() * (clean.log_probs - log_probs)).sum())
        target = clean.input_ids[0, 1:, None]
        nll += float((clean.log_probs - log_probs)[:-1].gather(-1, target).sum())
        count += clean.input_ids.shape[1]
    k, v = ((error / norm) ** 0.5 for error, norm in tensor.values())
    out = float((attention[:, 0] / attention[:, 1]).sqrt().mean())
    zarr_bits, plain_bits = bits_per_element(texts, pair, model)
    return (
        f"| {pair[0]} / {pair[1]} | {zarr_bits:.2f} ({plain_bits:.2f}) | "
        f"{zarr_bits / 16:.3f} | {k:.2%} | {v:.2%} | {out:.2%} | {kl / count:.1e} | "
        f"{nll / count:+.4f} |"
    )


def bits_per_element(
    texts: list[Clean], pair: tuple[CodecName, CodecName], model: torch.nn.Module
) -> tuple[float, float]:
    config = model.config
    layers = tuple(range(config.num_hidden_layers))
    group = LayerGroup(layers, config.num_key_value_heads, config.head_dim, config.head_dim)
    arrays, specs, elements = {}, {}, 0
    for name, kind, codec_name in zip("kv", KINDS, pair, strict=True):
        samples = [torch.stack([clean.states[name, i] for i in layers]) for clean in texts]
        elements += sum(x.numel() for x in samples)
        encoded = [CODECS[codec_name].encode(x, kind) for x in samples]
        for part in CODECS[codec_name].parts(kind):
            array = torch.cat([parts[part.suffix] for parts in encoded], dim=2).numpy()
            stored = part_name(kind, part.suffix)
            attributes = {
                "role": part.suffix or "codes",
                "codec": codec_name,
                "logical_dtype": part.logical,
            }
            axes = ("layer", "head", part.per, "dim")
            specs[stored] = ArraySpec(stored, axes, array.shape, part.dtype, attributes, group)
            arrays[stored] = array
    sizes = []
    for backend in (ZarrBackend(), SafetensorsBackend()):
        with tempfile.TemporaryDirectory() as folder:
            backend.write(Path(folder), arrays, specs, {})
            files = (path for path in Path(folder).rglob("*") if path.is_file())
            data = (path for path in files if path.name != "zarr.json")
            sizes.append(8 * sum(path.stat().st_size for path in data) / elements)
    return sizes[0], sizes[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    samples = itertools.islice(read_jsonl(arguments.corpus), arguments.samples)
    texts = [
        run_clean(model, tokenizer(sample.text, return_tensors="pt").input_ids)
        for sample in samples
    ]
    print("| K / V | bits | of bf16 | K error | V error | attention | KL | ΔNLL |")
    print("|---|---|---|---|---|---|---|---|")
    for pair in PAIRS:
        print(measure(model, texts, pair), flush=True)


if __name__ == "__main__":
    main()
