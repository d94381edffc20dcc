"""The loss of every mode over random coverage, layers, weights and dropout, against plain loops.

A loop visits one pair of a layer and a token after the other. The teachers that serve it share its
weight; a pair that no teacher serves must be in no loss, no figure and no injection.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import AlignmentConfig, FusionConfig, LossConfig, ProjectionConfig
from kvdistill.distill.align.layers import LayerMap
from kvdistill.distill.distiller import Distiller, StudentOutput
from kvdistill.distill.targets import GroupSpace, TargetStatistics, TeacherSpace
from kvdistill.store.codecs import CODECS
from kvdistill.types import KINDS, CodecSpec

B, L, T, VOCAB = 2, 3, 4, 11
STUDENT = HeadShape(2, 4)
PAIRS = [(b, layer, t) for b in range(B) for layer in range(L) for t in range(T)]
SHAPES = {"one": HeadShape(1, 6), "two": HeadShape(3, 2), "three": HeadShape(2, 3)}
MODES = ("student_to_teacher", "frozen", "task", "joint", "shared_space", "identity")


class Leaves(Distiller):
    """A distiller whose student's queries, keys and values are given, so they have gradients."""

    output: StudentOutput

    def run_student(self, batch: Any) -> StudentOutput:
        return self.output


@dataclass
class Case:
    """What is random about a batch."""

    mode: str
    losses: dict[str, Any]
    fusion: dict[str, Any]
    covered: torch.Tensor  # [N, B, T]
    grouped: bool
    seed: int

    @property
    def names(self) -> list[str]:
        return list(SHAPES)[: len(self.covered)]


@st.composite
def cases(draw: Any, mode: str) -> Case:
    n = draw(st.integers(1, 3))
    names = list(SHAPES)[:n]
    bits = st.lists(st.booleans(), min_size=n * B * T, max_size=n * B * T)
    fused = mode != "student_to_teacher"
    method = draw(st.sampled_from(["fixed", "mlp", "gate"]))
    fusion: dict[str, Any] = {
        "method": method,
        "teacher_dropout": draw(st.sampled_from([0.0, 0.5])),
        "entropy": draw(st.sampled_from(["diverse", "specialized"])),
    }
    if method == "fixed":
        some = st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=n, max_size=n).filter(any)
        fusion["weights"] = dict(zip(names, draw(some), strict=True))
    else:
        fusion["granularity"] = draw(st.sampled_from(["sample", "layer", "token"]))
    if draw(st.booleans()):
        layers = st.lists(st.integers(0, L - 1), unique=True, max_size=2)
        fusion["layers"] = {name: draw(layers) for name in names[: draw(st.integers(1, n))]}
    losses: dict[str, Any] = {
        "key": 2.0, "value": draw(st.sampled_from([0.0, 3.0])), "cosine": 0.7, "relation": 0.6,
        "distance": draw(st.sampled_from(["mse", "smooth_l1"])),
        "layer_std": fused and draw(st.booleans()),
        "attention_kl": 0.4 * (fused and mode != "shared_space"),
        "round_trip": 0.3 * (mode == "shared_space"),
        "entropy": 0.2 * (method != "fixed"),
    }  # fmt: skip
    covered = torch.tensor(draw(bits)).view(n, B, T)
    return Case(mode, losses, fusion, covered, draw(st.booleans()), draw(st.integers(0, 999)))


def space(name: str, case: Case, causal: bool = True) -> TeacherSpace:
    """Every student layer mapped to a mix of two teacher layers, in one group or in two."""
    shape = STUDENT if case.mode == "identity" else SHAPES[name]
    groups = []
    for i, layers in enumerate([(0, 2), (1,)] if case.grouped else [tuple(range(L))]):
        rows = range(len(layers))
        mapping = LayerMap(tuple(rows), tuple(r + 1 for r in rows), (0.3,) * len(layers))
        channels = (len(layers) + 1, *shape)
        statistics = TargetStatistics(torch.randn(channels), torch.rand(channels) + 0.5)
        groups.append(
            GroupSpace(
                f"g{i}/", layers, mapping, dict.fromkeys(KINDS, shape),
                dict.fromkeys(KINDS, statistics),
            )
        )  # fmt: skip
    return TeacherSpace(name, CodecSpec(key="fp16", value="fp16"), tuple(groups), causal)


def llama() -> Any:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=L, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build(case: Case, *, kind: type[Distiller] = Leaves, causal: Any = None) -> Any:
    torch.manual_seed(case.seed)
    causal = causal or [True] * len(case.covered)
    distiller = kind(
        llama(),
        [space(name, case, flag) for name, flag in zip(case.names, causal, strict=True)],
        alignment=AlignmentConfig(),
        projection=ProjectionConfig(
            mode=case.mode,
            init="ridge" if case.mode == "student_to_teacher" and case.grouped else None,
            space_heads=1,
            space_dim=5,
        ),
        fusion=FusionConfig.model_validate(case.fusion),
        losses=LossConfig.model_validate(case.losses),
    )
    for name, parameter in distiller.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
        elif "key_OW" in name:  # a router with preferences
            torch.nn.init.normal_(parameter, std=0.5)
    for standardise in distiller.standardise_student.values():
        torch.nn.init.normal_(standardise.mean_LHD)
        torch.nn.init.uniform_(standardise.scale_LHD, 0.5, 2)
    return distiller.train()


def make_batch(distiller: Any, case: Case) -> dict[str, Any]:
    teachers = {}
    for name, covered, teacher in zip(case.names, case.covered, distiller.teachers, strict=True):
        teachers[name] = {
            "start": torch.arange(T).expand(B, T),
            "weight": covered[..., None].float(),
            "covered": covered,
        }
        for kind in KINDS:
            teachers[name][kind] = {
                g.prefix: CODECS["fp16"].encode(
                    torch.randn(B, len(g.layer_map.needed), g.shapes[kind].num_heads, T,
                                g.shapes[kind].head_dim), kind,
                )
                for g in teacher.groups
            }  # fmt: skip
    ids = torch.randint(0, VOCAB, (B, T))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "query_mask": torch.ones(B, T, dtype=torch.bool),
        "task": torch.zeros(B, dtype=torch.long),
        "inject_mask": torch.arange(T).expand(B, T) < 2,
        "inject_labels": ids.masked_fill(torch.arange(T) < 2, -100),
        "teachers": teachers,
    }


def given_output() -> StudentOutput:
    shape = (B, L, STUDENT.num_heads, T, STUDENT.head_dim)
    key, value = (torch.randn(shape, requires_grad=True) for _ in KINDS)
    query = torch.randn(B, L, 4, T, 4, requires_grad=True)
    return StudentOutput(torch.randn(B, T, VOCAB), query, key, value, torch.randn(B, T, 16))


def serving(case: Case, i: int, b: int, layer: int, t: int) -> bool:
    """Whether teacher ``i`` could serve a pair: it covers the token and teaches the layer."""
    name, fusion = case.names[i], case.fusion
    teaches = layer in fusion.get("layers", {}).get(name, range(L))
    return bool(case.covered[i, b, t]) and teaches and fusion.get("weights", {}).get(name, 1.0) > 0


def raw_weight(distiller: Any, case: Case) -> Any:
    """Teacher, sample, layer, token → the weight before any renormalisation."""
    if case.fusion["method"] == "fixed":
        return lambda i, b, layer, t: torch.tensor(case.fusion["weights"][case.names[i]])
    hidden = distiller.output.hidden
    router = distiller.weigh.router
    wide = router(hidden if case.fusion["granularity"] == "token" else hidden.mean(1))
    return lambda i, b, layer, t: wide.expand(-1, B, L, T)[i, b, layer, t]


def weights_of(raw: Any, teachers: list[int], pair: Any) -> dict[int, torch.Tensor]:
    total = sum(raw(i, *pair) for i in teachers)
    return {i: raw(i, *pair) / total for i in teachers}


def loop_weights(distiller: Any, case: Case, dropped: Any, among: Any = None) -> dict[Any, Any]:
    """Per pair, the weights of the teachers that serve it; no pair without a teacher."""
    raw, found = raw_weight(distiller, case), {}
    for pair in PAIRS:
        able = [i for i in range(len(case.covered)) if serving(case, i, *pair)]
        able = [i for i in able if among is None or i in among]
        left = [i for i in able if not dropped[i][pair[0]]] or able
        if left:
            found[pair] = weights_of(raw, left, pair)
    return found


def point(ours: Any, theirs: Any, case: Case) -> Any:
    if case.losses["distance"] == "mse":
        return (ours - theirs).square().mean()
    return F.smooth_l1_loss(ours, theirs)


def kl(logits: Any, ours: Any, columns: list[int]) -> Any:
    p, q = logits[columns].log_softmax(0), ours[columns].log_softmax(0)
    return (p.exp() * (p - q)).sum()


def relation(own: Any, theirs: Any, pair: Any, columns: list[int]) -> Any:
    b, layer, t = pair
    rows = []
    for x in (theirs, own):
        joined = x[b, layer].transpose(0, 1).reshape(T, -1)
        rows.append(joined @ joined[t] / joined.shape[1] ** 0.5)
    return kl(*rows, columns)


def attention(out: StudentOutput, fused_key: Any, pair: Any, columns: Any) -> Any:
    """Rotated by Llama's own formula; two query heads per key head."""
    b, layer, t = pair

    def rotated(x: Any) -> Any:
        angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, 4, 2) / 4)
        cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
        turned = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * cos + turned * sin

    query, own, target = (rotated(x[b, layer]) for x in (out.query_BLQTD, out.key_BLHTD, fused_key))
    columns = [c for c in columns if c <= t]
    rows = [
        kl(target[h // 2] @ query[h, t].detach() / 2, own[h // 2] @ query[h, t] / 2, columns)
        for h in range(4)
    ]
    return torch.stack(rows).mean()


def by_layer(groups: Any, parts: Any) -> list[Any]:
    """Per student layer, the row of the group that serves it."""
    found = [None] * L
    for group, part in zip(groups, parts, strict=True):
        for row, layer in enumerate(group.student_layers):
            found[layer] = part[:, row]
    return found


def loop(distiller: Any, batch: Any, case: Case, dropped: Any) -> tuple[dict, dict]:
    """Every part of the loss, and the figures."""
    weights = loop_weights(distiller, case, dropped)
    parts: dict[str, Any] = {}
    compared: list[Any] = []
    known = weights, distiller.targets(batch["teachers"]), compared
    for kind in KINDS:
        one = loop_regressed if case.mode == "student_to_teacher" else loop_fused
        for name, total in one(distiller, case, kind, known).items():
            if case.losses[name]:
                shared = 1 if name in KINDS else 1 / 2
                parts[name] = parts.get(name, 0) + shared * total / max(len(weights), 1)
    if case.losses["attention_kl"]:
        parts["attention_kl"] = parts["attention_kl"] * 2  # of keys alone
    if case.losses["entropy"]:
        contested = [
            weights_of(raw_weight(distiller, case), able, pair)
            for pair in PAIRS
            if len(able := [i for i in range(len(case.covered)) if serving(case, i, *pair)]) > 1
        ]
        sign = 1 if case.fusion["entropy"] == "specialized" else -1
        each = [-sum(a * a.log() for a in alpha.values()) for alpha in contested]
        parts["entropy"] = sign * (torch.stack(each).mean() if each else torch.tensor(0.0))
    return parts, loop_figures(case, weights, compared)


def loop_regressed(distiller, case, kind, known):
    weights, targets, compared = known
    total = dict.fromkeys((kind, "cosine", "relation"), 0.0)
    own = distiller.output.kind(kind)
    for i, head in enumerate(distiller.heads_of(kind)):
        guesses = by_layer(
            head.groups, head.predictions(distiller.regressed(distiller.output, kind))
        )
        wanted = by_layer(head.groups, targets[kind][i])
        for (b, layer, t), alpha in weights.items():
            if i not in alpha:
                continue
            ours, theirs = guesses[layer][b, :, t], wanted[layer][b, :, t]
            columns = [c for c in range(T) if i in weights.get((b, layer, c), {})]
            total[kind] += alpha[i] * point(ours, theirs, case)
            total["cosine"] += alpha[i] * (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()
            whole = torch.stack(wanted, 1)
            total["relation"] += alpha[i] * relation(own, whole, (b, layer, t), columns)
            compared.append((kind, i, layer, theirs, float(alpha[i].detach())))
    return total


def loop_fused(distiller, case, kind, known):
    weights, targets, compared = known
    own = distiller.output.kind(kind)
    ours = distiller.space[kind](own) if case.mode == "shared_space" else own
    projected = distiller.projected(targets)[kind]
    fused = torch.zeros_like(projected[0])
    for (b, layer, t), alpha in weights.items():
        fused[b, layer, :, t] = sum(a * projected[i][b, layer, :, t] for i, a in alpha.items())
    if case.mode != "joint":
        fused = fused.detach()
    total = dict.fromkeys((kind, "cosine", "relation"), 0.0)
    total |= {name: 0.0 for name in ("attention_kl", "round_trip") if case.losses[name]}
    for b, layer, t in weights:
        x, y = ours[b, layer, :, t], fused[b, layer, :, t]
        columns = [c for c in range(T) if (b, layer, c) in weights]
        scale = 1.0
        if case.losses["layer_std"]:
            rows = [fused[a, m, :, c].flatten() for a, m, c in weights if m == layer]
            scale = torch.cat(rows).detach().std(correction=0).clamp_min(1e-6)
        total[kind] += point(x, y, case) / scale
        total["cosine"] += (1 - F.cosine_similarity(x, y, dim=-1)).mean()
        total["relation"] += relation(ours, fused.detach(), (b, layer, t), columns)
        if case.losses["attention_kl"] and kind == "key":
            total["attention_kl"] += attention(
                distiller.output, fused.detach(), (b, layer, t), columns
            )
        if case.losses["round_trip"]:
            space = distiller.space[kind]
            back = space.out_of(space(own.detach()))[b, layer, :, t]
            total["round_trip"] += (back - own.detach()[b, layer, :, t]).square().mean()
            for i, a in weights[b, layer, t].items():
                head = distiller.heads_of(kind)[i]
                kept = by_layer(head.groups, targets[kind][i])[layer][b, :, t]
                backs = [
                    p.out_of(p(x)) for p, x in zip(head.project, targets[kind][i], strict=True)
                ]
                back = by_layer(head.groups, backs)[layer][b, :, t]
                total["round_trip"] += a.detach() * (back - kept).square().mean()
        compared.append((kind, 0, layer, y, 1.0))
    return total


def loop_figures(case: Case, weights: Any, compared: Any) -> dict[str, Any]:
    alphas = [
        [float(torch.as_tensor(alpha.get(i, 0.0)).detach()) for alpha in weights.values()]
        for i in range(len(case.covered))
    ]
    variance = mass = 0.0
    for place in {tuple(place) for *place, _, _ in compared if case.losses[place[0]]}:
        found = [(y.detach().flatten(), a) for *where, y, a in compared if tuple(where) == place]
        rows, w = torch.stack([y for y, _ in found]), torch.tensor([a for _, a in found])[:, None]
        mean = (w * rows).sum(0) / w.sum()
        variance += (w * (rows - mean).square()).sum(0).mean()
        mass += w.sum()
    return {
        "alpha": torch.tensor([sum(row) / max(len(row), 1) for row in alphas]),
        "target_variance": torch.as_tensor(variance / max(mass, 1e-12), dtype=torch.float32),
    }


def gradients(loss: Any, distiller: Any) -> dict[str, Any]:
    leaves = dict(distiller.named_parameters()) | {
        name: getattr(distiller.output, name)
        for name in ("query_BLQTD", "key_BLHTD", "value_BLHTD")
    }
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), found, strict=True)
    }


def close(got: Any, want: Any, what: str) -> None:
    want = torch.as_tensor(want, dtype=torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12)
@given(data=st.data())
def test_losses_gradients_and_figures_equal_a_loop(mode: str, data: Any) -> None:
    case = data.draw(cases(mode))
    distiller = build(case)
    distiller.kv_scale = 0.5
    batch = make_batch(distiller, case)
    distiller.output = given_output()
    torch.manual_seed(case.seed)
    got = distiller(batch, figures=True)
    torch.manual_seed(case.seed)
    chance = case.fusion["teacher_dropout"]
    draws = torch.rand(len(case.covered), B) if chance else torch.ones(len(case.covered), B)
    parts, figures = loop(distiller, batch, case, (draws < chance).tolist())
    scaled = {"key", "value", "cosine", "attention_kl", "relation"}
    total = sum(
        (0.5 if name in scaled else 1) * case.losses[name] * part for name, part in parts.items()
    )
    for name, part in got["parts"].items():
        if name != "cross_entropy":
            close(part, parts[name], name)
    close(got["loss"] - got["parts"]["cross_entropy"], total, "loss")
    for name, figure in figures.items():
        close(got["figures"][name], figure, name)
    wanted = gradients(total, distiller) if getattr(total, "requires_grad", False) else {}
    for name, found in gradients(got["loss"], distiller).items():
        close(found, wanted.get(name, torch.zeros_like(found)), f"gradient of {name}")


@contextmanager
def attending_to(model: Any, fused: dict[str, Any], pairs: set[Any], gate: Any) -> Iterator[None]:
    """Rewrite what ``k_proj`` and ``v_proj`` return, pair by pair."""

    def hook(layer: int, kind: str) -> Any:
        def rewrite(module: Any, args: Any, own: Any) -> Any:
            rows = []
            for b, t in itertools.product(range(B), range(T)):
                given = fused[kind][b, layer, :, t].flatten()
                if gate is not None:
                    opening = gate.logit_KL[KINDS.index(kind), layer].sigmoid()
                    given = own[b, t] + opening * given
                rows.append(given if (b, layer, t) in pairs else own[b, t])
            return torch.stack(rows).view_as(own)

        return rewrite

    hooks = [
        getattr(block.self_attn, f"{kind[0]}_proj").register_forward_hook(hook(i, kind))
        for i, block in enumerate(model.model.layers)
        for kind in KINDS
    ]
    yield
    for one in hooks:
        one.remove()


@pytest.mark.parametrize("style", ["replace", "residual"])
@pytest.mark.parametrize("mode", ["frozen", "shared_space", "student_to_teacher"])
@settings(max_examples=6)
@given(data=st.data())
def test_injection_equals_a_loop_and_keeps_what_is_not_served(
    mode: str, style: str, data: Any
) -> None:
    """Only decoders are injected; a sample that gets none of their KV is in no label count."""
    case = data.draw(cases(mode))
    case.losses |= {"inject": 1.5, "inject_style": style}
    causal = data.draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(lambda x: x[0]))
    decoders = [i for i in range(len(case.covered)) if causal[i]]
    distiller = build(case, causal=causal[: len(case.covered)])
    batch = make_batch(distiller, case)
    distiller.output = given_output()
    torch.manual_seed(case.seed)
    got = distiller(batch)["parts"]["inject"]
    torch.manual_seed(case.seed)
    chance = case.fusion["teacher_dropout"]
    dropped = (torch.rand(len(case.covered), B) < chance).tolist() if chance else [[False] * B] * 3
    weights = loop_weights(distiller, case, dropped, decoders)
    weights = {p: alpha for p, alpha in weights.items() if batch["inject_mask"][p[0], p[2]]}
    targets = distiller.targets(batch["teachers"])
    fused = {}
    for kind in KINDS:
        projected = distiller.projected(targets)[kind]
        fused[kind] = torch.zeros_like(projected[0])
        for (b, layer, t), alpha in weights.items():
            fused[kind][b, layer, :, t] = sum(
                a * projected[i][b, layer, :, t] for i, a in alpha.items()
            )
        if mode == "shared_space":
            fused[kind] = distiller.space[kind].out_of(fused[kind])
    with attending_to(distiller.student, fused, set(weights), distiller.gate):
        logits = distiller.student(input_ids=batch["input_ids"], use_cache=False).logits
    injected = {b for b, _, _ in weights}
    errors = [
        F.cross_entropy(logits[b, t - 1], batch["inject_labels"][b, t])
        for b, t in itertools.product(sorted(injected), range(2, T))
    ]
    want = torch.stack(errors).mean() if errors else torch.tensor(0.0)
    close(got, want, "inject")
    if errors:
        wanted = gradients(want, distiller)
        for name, found in gradients(got, distiller).items():
            close(found, wanted[name], f"gradient of {name}")


@pytest.mark.parametrize("mode", ["student_to_teacher", "frozen", "shared_space"])
def test_losses_do_not_depend_on_how_a_step_is_cut(mode: str) -> None:
    """Two micro-batches, divided by the counts of both, sum to the whole, whatever is served."""
    losses = {
        "key": 1.0, "value": 1.0, "cosine": 1.0, "relation": 1.0, "entropy": 1.0, "inject": 1.0,
        "round_trip": float(mode == "shared_space"),
    }  # fmt: skip
    covered = torch.tensor([[[1, 1, 0, 1], [0, 0, 0, 1]], [[1, 1, 0, 0], [1, 0, 1, 0]]]).bool()
    fusion = {"method": "mlp", "layers": {"two": [1]}, "granularity": "layer"}
    case = Case(mode, losses, fusion, covered, grouped=True, seed=1)
    distiller = build(case).eval()
    batch = make_batch(distiller, case)
    whole = distiller.output = given_output()
    expected = distiller(batch)
    counts = distiller.count(batch)
    loss = torch.tensor(0.0)
    for b in range(B):
        rows = {name: x[b : b + 1] for name, x in vars(whole).items() if x is not None}
        distiller.output = StudentOutput(**rows)
        loss = loss + distiller(_sample(batch, b), counts)["loss"]
    torch.testing.assert_close(loss, expected["loss"])


def test_explained_variance_is_of_what_is_served_in_this_batch() -> None:
    """The parts of a micro-batch are its shares of a step; the figure is not."""
    losses = {"key": 1.0, "value": 1.0}
    fusion = {"method": "fixed", "layers": {"one": [1]}}
    covered = torch.tensor([[[True, True, False, True], [True, True, True, True]]])
    case = Case("student_to_teacher", losses, fusion, covered, grouped=False, seed=2)
    distiller = build(case).eval()
    batch = make_batch(distiller, case)
    distiller.output = given_output()
    alone = distiller(batch, figures=True)["figures"]["explained_variance"]
    of_four = {name: 4 * number for name, number in distiller.count(batch).items()}
    shared = distiller(batch, of_four, figures=True)["figures"]["explained_variance"]
    torch.testing.assert_close(shared, alone)
    targets = distiller.targets(batch["teachers"])
    errors, spreads = [], []
    for kind in KINDS:
        guess = distiller.head("one", kind).predictions(distiller.output.kind(kind))[0]
        rows = [x[:, 1].transpose(1, 2)[covered[0]] for x in (guess, targets[kind][0][0])]
        errors.append((rows[0] - rows[1]).square().mean())
        spreads.append(rows[1].var(0, correction=0).mean())
    torch.testing.assert_close(alone, 1 - sum(errors).detach() / sum(spreads))


def _sample(batch: Any, b: int) -> Any:
    if isinstance(batch, dict):
        return {key: _sample(value, b) for key, value in batch.items()}
    return batch[b : b + 1]


def test_an_unserved_layer_is_not_pulled_to_zero() -> None:
    """Layer 2 has no teacher, and layer 1 none at the last two tokens."""
    losses = {"key": 1.0, "value": 1.0, "cosine": 1.0, "relation": 1.0, "attention_kl": 1.0}
    covered = torch.ones(2, B, T, dtype=torch.bool)
    covered[1, :, 2:] = False
    fusion = {"method": "fixed", "layers": {"one": [0], "two": [1]}}
    case = Case("frozen", losses, fusion, covered, grouped=False, seed=0)
    distiller = build(case)
    batch = make_batch(distiller, case)
    distiller.output = given_output()
    distiller(batch)["kv"].backward()
    gradient = distiller.output.key_BLHTD.grad.abs().sum(dim=(0, 2, 4))
    assert bool((gradient > 0).equal(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]) > 0))
    assert int(distiller.count(batch)["num_served"]) == B * (T + 2)
