"""Fusion by what each teacher thought of the text: the weights, and what is compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.config.distill import FusionConfig
from kvdistill.distill.align.character_iou import Spans
from kvdistill.distill.fuse.by_confidence import Likelihood, confidence_weights, likelihood_of
from kvdistill.distill.fuse.fusion_weights import FusionWeights
from kvdistill.distill.fuse.weights import renormalise
from kvdistill.errors import ConfigError
from kvdistill.store.shard import EncodedShard, TokenTable
from tests.store.made import make_teacher


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    """Nats (NaN at encoders and here and there), who is an encoder, who serves, τ, a share."""
    number = draw(st.integers(1, 4))
    encoders = torch.tensor(draw(st.lists(st.booleans(), min_size=number, max_size=number)))
    some = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    nats = torch.rand(number, 3, 1, 5, generator=some) * draw(st.sampled_from([0.01, 1, 60]))
    nats[torch.rand(nats.shape, generator=some) < 0.1] = math.nan
    nats[encoders] = math.nan
    serves = torch.rand(number, 3, 2, 5, generator=some) < 0.7
    temperature = draw(st.sampled_from([1e-40, 1e-6, 0.1, 1.0, 100.0]))
    return nats, encoders.view(-1, 1, 1, 1), serves, temperature, draw(st.floats(0, 1))


def weights(nats: torch.Tensor, encoders: torch.Tensor, *settings: Any) -> torch.Tensor:
    found = zip(nats[:, :, 0], encoders.flatten().tolist(), strict=True)
    return confidence_weights([None if e else x for x, e in found], encoders, *settings)


@given(cases())
def test_weights_sum_to_one_over_who_covers(case: Any) -> None:
    nats, encoders, serves, temperature, share = case
    alpha = renormalise(weights(nats, encoders, temperature, share, serves), serves)
    torch.testing.assert_close(alpha.sum(0), serves.any(0).float())
    assert not alpha[~serves].any()
    known = serves & ~nats.isnan()
    both = known.any(0) & (serves & encoders).any(0)
    of_encoders = (alpha * encoders).sum(0)[both]
    torch.testing.assert_close(of_encoders, torch.full_like(of_encoders, share), atol=1e-5, rtol=0)


@given(st.integers(1, 5), st.sampled_from([1e-40, 0.1, 3.0]), st.floats(0, 40, width=32))
def test_equal_teachers_are_uniform(number: int, temperature: float, nats: float) -> None:
    serves = torch.ones(number, 2, 3, 4, dtype=torch.bool)
    alike = torch.full((number, 2, 1, 4), nats)
    nobody = torch.zeros(number, 1, 1, 1, dtype=torch.bool)
    alpha = weights(alike, nobody, temperature, 0.0, serves)
    assert torch.equal(alpha, torch.full_like(alpha, 1 / number))


@given(cases())
def test_the_definition_and_its_limit(case: Any) -> None:
    nats, encoders, serves, temperature, _ = case
    temperature = max(temperature, 1e-6)
    alpha = weights(nats, encoders, temperature, 0.0, serves)
    cold = weights(nats, encoders, 1e-40, 0.0, serves)
    known = serves & ~nats.isnan()
    score = (-nats.double() / temperature).expand(serves.shape).masked_fill(~known, -math.inf)
    expected = score.softmax(0).nan_to_num(0.0)
    torch.testing.assert_close(alpha.double(), expected, atol=1e-4, rtol=1e-3)
    lowest = nats.expand(serves.shape).masked_fill(~known, math.inf).amin(0)
    assert (cold.sum(0) == known.any(0)).all()
    assert (nats.expand(serves.shape)[cold > 0] == lowest.expand(serves.shape)[cold > 0]).all()


def table(pieces: list[str], segments: list[int]) -> TokenTable:
    """One sample whose tokens are these pieces of its text; an empty one is special."""
    ends = np.cumsum([len(piece) for piece in pieces]).astype(np.int32)
    starts = ends - np.array([len(piece) for piece in pieces], np.int32)
    ids = np.arange(len(pieces), dtype=np.int32)
    ptr = np.array([0, len(pieces)])
    return TokenTable(("a",), ptr, ids, starts, ends, np.array(segments, np.int8))


def student(lengths: list[int], segments: list[int]) -> Spans:
    end = torch.tensor(lengths).cumsum(0)[None]
    mask = torch.ones_like(end, dtype=torch.bool)
    return Spans(end - torch.tensor(lengths), end, torch.tensor(segments)[None], mask)


def rate(granularity: Any, smoothing: int = 0, own_text: bool = False, bos: bool = True) -> Any:
    """ "ab cd efgh": the teacher reads ab| cd| ef|gh, the student a|b cd| efgh."""
    pieces, nll = ["", "ab", " cd", " ef", "gh"], [math.nan, 1.0, 6.0, 3.0, 5.0]
    segments = [-1, 1, 1, 2, 3]
    if not bos:
        pieces, nll, segments = pieces[1:], [math.nan, *nll[2:]], segments[1:]
    arrays = {"nll": np.array(nll, np.float16)}
    shard = EncodedShard(table(pieces, segments), arrays)
    own = Likelihood(granularity, smoothing, own_text)
    return own([(shard, 0)], student([1, 4, 5], [1, 1, 3]))[0].tolist()


def test_nats_are_per_character_of_the_sample_segment_or_token() -> None:
    assert rate("sample") == pytest.approx([15 / 10])
    assert rate("segment") == pytest.approx([7 / 5, 7 / 5, 5 / 2])
    assert rate("token") == pytest.approx([1 / 2, (0.5 + 6) / 4, 8 / 5])
    assert rate("token", smoothing=1) == pytest.approx([1 / 2, (1 + 6 + 1) / 6, (2 + 8) / 6])
    assert rate("token", smoothing=99) == pytest.approx([1.5] * 3)


def test_what_nothing_predicts_has_the_samples() -> None:
    whole = 14 / 8
    assert rate("sample", bos=False) == pytest.approx([whole])
    assert rate("token", bos=False) == pytest.approx([whole, 6 / 3, 8 / 5])
    assert rate("sample", own_text=True) == pytest.approx([12 / 7])
    alone = EncodedShard(table(["a"], [0]), {"nll": np.array([np.nan], np.float16)})
    assert Likelihood("token", 4, own_text=False)([(alone, 0)], student([1], [0])).isnan().all()


def test_bytes_of_one_character_add_it_once() -> None:
    tokens = table(["", "x", "猫", "", "y"], [-1, 0, 0, 0, 0])
    tokens.char_start[3], tokens.char_end[3] = tokens.char_start[2], tokens.char_end[2]
    shard = EncodedShard(tokens, {"nll": np.array([np.nan, 1, 2, 4, 1], np.float16)})
    own = Likelihood("token", 0, own_text=False)
    assert own([(shard, 0)], student([1, 1, 1], [0] * 3))[0].tolist() == [1, 6, 1]


def test_who_has_no_likelihood() -> None:
    fusion = FusionConfig(method="confidence", granularity="token")
    assert likelihood_of(make_teacher(kind="encoder"), fusion) is None
    cross = {"kind": "encoder_decoder", "stream": "cross"}
    assert likelihood_of(make_teacher(**cross), fusion) is None
    with pytest.raises(ConfigError, match="the store has none of teacher 'tiny'"):
        likelihood_of(make_teacher(), fusion)
    with pytest.raises(ConfigError, match="generated its own rationales; set it to segment"):
        likelihood_of(make_teacher(has_confidence=True, own_text=True), fusion)


class Space:
    def __init__(self, name: str, *, predicts: bool) -> None:
        self.name = name
        self.likelihood = Likelihood("sample", 0, own_text=False) if predicts else None


@pytest.mark.parametrize(("share", "wanted"), [(None, 1 / 3), (0.5, 0.5), (0.0, 0.0)])
def test_encoders_take_their_share_of_each_batch(share: float | None, wanted: float) -> None:
    spaces: Any = [Space("one", predicts=True), Space("bert", predicts=False)]
    spaces.append(Space("two", predicts=True))
    config = FusionConfig(method="confidence", temperature=0.1, encoder_share=share)
    weigh = FusionWeights(config, spaces, 8, 2, {})
    covered = torch.ones(2, 3, dtype=torch.bool)
    teachers = {name: {"covered": covered} for name in ("one", "bert", "two")}
    for name, nats in (("one", [[0.5], [0.5]]), ("two", [[0.5], [0.7]])):
        teachers[name]["nats"] = torch.tensor(nats)
    alpha = weigh({"teachers": teachers}, None).alpha()[:, :, 0, 0]
    best = 1 / (1 + math.exp(-2))
    expected = [[(1 - wanted) / 2, wanted, (1 - wanted) / 2]]
    expected.append([(1 - wanted) * best, wanted, (1 - wanted) * (1 - best)])
    torch.testing.assert_close(alpha.T, torch.tensor(expected))
    with pytest.raises(ConfigError, match="no teacher predicts text; use fixed"):
        FusionWeights(config, spaces[1:2], 8, 2, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "confidence", "granularity": "layer"}, "require a router"),
        ({"method": "mlp", "granularity": "segment"}, "require method confidence, got method mlp"),
        ({"encoder_share": 0.5}, "require method confidence, got method fixed"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusionConfig.model_validate(settings)
