"""What works for every family, measured on tiny random models, as tables of the documentation.

``python -m tests.attention.family_table`` writes them into ``docs/``. An entry is measured or it is
the line by which the package refuses; a number that is wrong raises.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvdistill.attention.attention_rule import unexplained
from kvdistill.attention.fitting import Verified, fit_adapter
from kvdistill.attention.geometry import text_model
from kvdistill.attention.hooks import capture
from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.distill import AlignmentConfig
from kvdistill.config.training import LoraConfig
from kvdistill.distill.losses.attention_maps import AttentionMaps
from kvdistill.distill.student.injection import injecting
from kvdistill.distill.student.lora import adapt
from kvdistill.errors import StudentError, TeacherError
from kvdistill.store.manifest import RotarySpec
from tests.attention.families import DECODERS, MORE_DECODERS
from tests.extract.models import tiny_model

FAMILIES = dict(sorted((DECODERS | MORE_DECODERS).items()))
DOCS = Path(__file__).parents[2] / "docs"
HEADS = {
    "teachers": "| family | model type | adapter | attention layers | positions, attention "
    "| importance |",
    "students": "| family | keys and values | `attention_kl` | `inject` | LoRA | gradient "
    "checkpointing |",
}
IDS = torch.tensor(
    [[5, 9, 33, 7, 21, 60, 8, 40, 13, 3, 28], [17, 4, 52, 6, 11, 30, 9, 44, 25, 3, 7]]
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

Row = list[str]


def build(family: str) -> Any:
    """A model with a head, where the family has one, whose attention is far from uniform."""
    model_type, options = FAMILIES[family]
    try:
        model = tiny_model(model_type, head=True, **options)
    except ValueError:  # the text model of a multimodal family
        model = tiny_model(model_type, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        names = ("attn", "attention", "q_proj", "k_proj", "norm.weight")
        if any(part in name for part in names):
            is_matrix = parameter.ndim > 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(3.0 if is_matrix else 1.0).add_((0.1 if is_matrix else 0.3) * noise)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    else:
        model.config._attn_implementation = "eager"
    return model


def own_attention(model: Any, num_layers: list[int]) -> list[Tensor]:
    """Attention weights ``[B, HQ, T, T]`` that the model returns, of the layers with keys."""
    found = [w for w in model(IDS, output_attentions=True).attentions if w is not None]
    return [found[i] for i in num_layers] if len(found) > len(num_layers) else found


def multiplied_out(query: Tensor, key: Tensor, layer: Any, attention: Any) -> Tensor:
    """Attention of unrotated queries and keys by the description, written independently."""
    place = torch.arange(query.shape[2])
    rotary: RotarySpec | None = layer.rotary
    if rotary is not None:
        query, key = (_rotated(x, rotary) for x in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = layer.scaling * torch.einsum("bhqd,bhkd->bhqk", query, key)
    if layer.softcap is not None:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    if layer.bias is not None:
        scores = scores + layer.bias(place, place, len(place))
    distance = place[:, None] - place
    hidden = distance < 0
    if layer.mask.sliding_window is not None:
        hidden = hidden | (distance >= layer.mask.sliding_window)
    if layer.mask.chunk_size is not None:
        hidden = hidden | (place[:, None] // layer.mask.chunk_size > place // layer.mask.chunk_size)
    scores = scores.masked_fill(hidden, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weight = (scores - top).exp()
    if layer.sinks is None:
        return weight / weight.sum(-1, keepdim=True)
    sink = (getattr(attention, layer.sinks)[:, None, None] - top).exp()
    return weight / (weight.sum(-1, keepdim=True) + sink)


def _rotated(x: Tensor, spec: RotarySpec) -> Tensor:
    """Channel pairs as complex numbers, at positions 0, 1, 2, …"""
    frequency = torch.tensor(spec.inv_freq, dtype=torch.float64)
    if spec.trained_length is not None and x.shape[2] > spec.trained_length:
        if spec.long_inv_freq is not None:
            frequency = torch.tensor(spec.long_inv_freq, dtype=torch.float64)
        else:
            stretch = spec.dynamic_factor * (x.shape[2] / spec.trained_length - 1) + 1
            pair = torch.arange(len(frequency)) / (len(frequency) - 1)
            frequency = frequency / stretch**pair
    end = spec.rotary_start + spec.rotary_dim
    turning = x[..., spec.rotary_start : end].double()
    real, imaginary = (
        (turning[..., ::2], turning[..., 1::2]) if spec.interleaved else turning.chunk(2, dim=-1)
    )
    angle = torch.arange(x.shape[2])[:, None] * frequency
    turn = torch.polar(torch.full_like(angle, spec.attention_scaling), angle)
    turned = torch.complex(real, imaginary) * turn
    out = x.double().clone()
    if spec.interleaved:
        out[..., spec.rotary_start : end : 2] = turned.real
        out[..., spec.rotary_start + 1 : end : 2] = turned.imag
    else:
        out[..., spec.rotary_start : end] = torch.cat([turned.real, turned.imag], -1)
    return out.float()


def as_teacher(family: str) -> Row:
    """The family's row of the table of teachers."""
    model_type, _ = FAMILIES[family]
    try:
        model = text_model(build(family))
        verified = fit_adapter("t", model, None)
    except TeacherError as error:
        return [family, model_type, short(error), "", "", ""]
    problem = unexplained(verified.layers, torch.float32)
    if verified.sites and problem is None:
        seen: dict[int, Any] = {}
        with capture(verified.sites, seen.__setitem__):
            own = own_attention(model, [layer.layer_idx for layer in verified.layers])
        for weights, layer, site in zip(own, verified.layers, verified.sites, strict=True):
            query, key, _ = seen[layer.layer_idx]
            rotary = layer.rotary and RotarySpec.model_validate_json(layer.rotary.model_dump_json())
            assert rotary == layer.rotary  # as the manifest keeps it
            expected = multiplied_out(query, key, layer, site.attention)
            torch.testing.assert_close(expected, weights, **TOLERANCE)
    layers = str(len(verified.layers)) + (f" of {len(verified.layers) + len(verified.skipped)}"
                                          if verified.skipped else "")  # fmt: skip
    has_importance = "yes" if verified.sites and problem is None else "no"
    return [family, model_type, verified.adapter.name, layers, described(verified), has_importance]


REASONS = {
    "still depend on their position": "normed behind the rotation",
    "tapped queries, keys or values differ": "no adapter fits",
    "attention weights differ": "attention is not of queries and keys alone",
    "computes keys from latents": "keys share a part",
}


def short(error: Exception) -> str:
    """A refusal in a few words; an unexpected one raises."""
    reason = next((short for long, short in REASONS.items() if long in str(error)), None)
    if reason is None:
        raise AssertionError(str(error)) from error
    return f"refused: {reason}"


def described(verified: Verified) -> str:
    """What was measured of a model's attention, in words."""
    found = set()
    for layer in verified.layers:
        rotary, mask = layer.rotary, layer.mask
        if rotary is None:
            found.add("layers without rotary")
        else:
            partial = rotary.rotary_dim < layer.key_head_dim
            found.add(("partial " if partial else "") + "rotary")
            found |= {"interleaved"} if rotary.interleaved else set()
            found |= {"longrope"} if rotary.long_inv_freq else set()
            found |= {"dynamic"} if rotary.dynamic_factor else set()
        features = {
            "window": mask.sliding_window, "chunks": mask.chunk_size, "soft cap": layer.softcap,
            "position bias": layer.bias, "sinks": layer.sinks,
        }  # fmt: skip
        found |= {name for name, value in features.items() if value is not None}
    if "layers without rotary" in found and not any(layer.rotary for layer in verified.layers):
        found = {"absolute" if verified.behaviour.absolute_positions else "no rotary"} | (
            found - {"layers without rotary"}
        )
    return ", ".join(sorted(found))


def as_student(family: str) -> Row:
    """The family's row of the table of students."""
    model = build(family).requires_grad_(True)
    if not hasattr(model, "lm_head") and model.get_output_embeddings() is None:
        return [family, "no language-model head", "", "", "", ""]
    try:
        student = KVCapture(model)
    except StudentError as error:
        return [family, short(error), "", "", "", ""]
    with torch.no_grad():
        cells = [attention_kl(model, student), injection(model, student)]
        saved(model)
    return [family, "yes", *cells, lora(family), checkpointing(model)]


def attention_kl(model: Any, student: KVCapture) -> str:
    """Against own keys 0, against others the KL of attention that the model itself returns."""
    try:
        maps = AttentionMaps(model, AlignmentConfig())
    except StudentError as error:
        return short(error)
    query, key, value = run(model, student)
    mask = torch.ones(len(IDS), key.shape[1], IDS.shape[1], dtype=torch.bool)
    zero = torch.zeros(mask.shape)
    torch.testing.assert_close(maps(query, key, key, mask), zero, rtol=0.0, atol=2e-6)
    layers = [site.layer_idx for site in student.sites]
    own = own_attention(model, layers)
    generator = torch.Generator().manual_seed(2)
    for layer, (rule, site) in enumerate(zip(maps.rules, student.sites, strict=True)):
        other = key.flip(0) + 0.3 * torch.randn(key.shape, generator=generator)
        if student.adapter.can_rewrite:
            only = torch.zeros(mask.shape, dtype=torch.bool)
            only[:, layer] = True
            with injecting(student, other, value, only), student() as found:
                theirs = own_attention(model, layers)[layer]
            other[:, layer] = found[layer].key
        else:  # keys share a part, so no pass can have these
            theirs = multiplied_out(query[:, layer], other[:, layer], rule, site.attention)
        expected = divergence(theirs, own[layer]).mean(1)
        assert float(expected.mean()) > 1e-3
        torch.testing.assert_close(maps(query, key, other, mask)[:, layer], expected, **TOLERANCE)
    return "yes"


def divergence(target: Tensor, ours: Tensor) -> Tensor:
    """KL of attention rows, what a sink takes among them."""
    rows = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp_min(0)], -1) for x in (target, ours))
    p, q = (x.double() for x in rows)
    terms = p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log())
    return torch.where(p > 1e-6, terms, 0.0).sum(-1).float()


def run(model: Any, student: KVCapture) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated queries, keys and values of all attention layers: ``[B, L, H, T, D]``."""
    seen: dict[int, Any] = {}
    with capture(student.sites, seen.__setitem__):
        model(IDS, use_cache=False)
    query, key, value = (torch.stack(x, 1) for x in zip(*seen.values(), strict=True))
    return query, key, value


def injection(model: Any, student: KVCapture) -> str:
    """A student that attends to its own keys and values computes what it computed."""
    _, key, value = run(model, student)
    before = model(IDS, use_cache=False).logits
    mask = torch.ones(len(IDS), key.shape[1], IDS.shape[1], dtype=torch.bool)
    try:
        with injecting(student, key, value, mask):
            after = model(IDS, use_cache=False).logits
        with injecting(student, key.flip(0), value.flip(0), mask):
            other = model(IDS, use_cache=False).logits
    except StudentError as error:
        return short(error)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert float((other - before).abs().max()) > 1e-3
    return "yes"


def lora(family: str) -> str:
    """Captured keys carry the updates, and gradients reach them."""
    model = build(family)
    before = run(model, KVCapture(model))[1]
    cell = "yes"
    try:
        model = adapt(model, LoraConfig(rank=2), seed=0)
    except StudentError as error:
        if "incompatible with Mamba" not in str(error):
            raise
        cell, targets = "with `target_modules`", ["q_proj", "k_proj", "v_proj"]
        model = adapt(build(family), LoraConfig(rank=2, target_modules=targets), seed=0)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    torch.nn.init.normal_(adapters[0])
    for adapter in adapters:
        torch.nn.init.normal_(adapter, std=0.1)
    student = KVCapture(model)
    key = run(model, student)[1]
    assert float((key - before).detach().abs().max()) > 1e-3
    key.square().sum().backward()
    assert any(a.grad is not None and bool(a.grad.any()) for a in adapters)
    return cell


def checkpointing(model: Any) -> str:
    """Recomputed layers give the gradients of kept ones, injection included."""
    gradients = []
    for checkpointed in (False, True):
        student = KVCapture(model.train())
        if checkpointed:
            try:
                student.checkpoint_activations()
            except StudentError:
                return "no"
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        with student() as found:
            logits = model(IDS, use_cache=False).logits
        loss = logits.square().mean() + sum(layer.key.square().mean() for layer in found)
        loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    kept, recomputed = gradients
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=1e-5)
    return "yes"


def saved(model: Any) -> None:
    """A saved student loads with the keys that it had."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        before, after = (run(x, KVCapture(x))[1] for x in (model, loaded))
        torch.testing.assert_close(after, before, **TOLERANCE)


MARKS = "<!-- families: written by tests/attention/family_table.py -->", "<!-- end of families -->"
MEASURES = {"teachers": as_teacher, "students": as_student}


def documented(page: str) -> dict[str, Row]:
    """The table that a page has, by family."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    lines = text.partition(MARKS[0])[2].partition(MARKS[1])[0].split("\n")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line]
    return {row[0]: row for row in rows[2:]}


def write(page: str) -> None:
    """Measure all families, and write the table into its page."""
    path = DOCS / f"{page}.md"
    head, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    rows = [HEADS[page], "|---" * (HEADS[page].count("|") - 1) + "|"]
    rows += [f"| {' | '.join(MEASURES[page](family))} |" for family in FAMILIES]
    table = "\n".join([MARKS[0], *rows, MARKS[1]])
    path.write_text(head + table + rest.partition(MARKS[1])[2], encoding="utf-8")


if __name__ == "__main__":
    for name in MEASURES:
        write(name)
