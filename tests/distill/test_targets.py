"""Targets made layer by layer are those of decoding, standardising and placing everything."""

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import ProjectionConfig
from kvdistill.distill.align.band import Band, apply_band
from kvdistill.distill.align.layers import LayerMap, layer_map
from kvdistill.distill.align.resample import align_global
from kvdistill.distill.project.standardise import TargetStatistics
from kvdistill.distill.targets import GroupSpace, TeacherHead, TeacherSpace
from kvdistill.store.codecs import CODECS
from kvdistill.types import CodecSpec

SAMPLES, COLUMNS, ROWS, HEADS, DIM = 2, 70, 9, 3, 8
MAPS = {
    "mixed": layer_map("uniform", 4, (2, 5, 6, 9, 11)),
    "more student layers": layer_map("ratio", 7, (0, 1)),
    "backwards": LayerMap((9, 2, 2), (9, 5, 5), (0.0, 0.25, 0.75)),
}


def space(mapping, codec):
    shape = HeadShape(HEADS, DIM)
    statistics = TargetStatistics(
        torch.randn(len(mapping.needed), HEADS, DIM), torch.rand(len(mapping.needed), HEADS, DIM)
    )
    group = GroupSpace(
        "",
        tuple(range(len(mapping.lower))),
        mapping,
        dict.fromkeys(("key", "value"), shape),
        dict.fromkeys(("key", "value"), statistics),
    )
    return TeacherSpace("t", CodecSpec(key=codec, value=codec), (group,), causal=True)


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("case", MAPS)
def test_layers_equal_the_whole_placed_at_once(case, kind, codec):
    torch.manual_seed(0)
    teacher = space(MAPS[case], codec)
    head = TeacherHead(teacher, kind, HeadShape(1, 4), ProjectionConfig(), projects=False)
    mapping = MAPS[case]
    x = torch.randn(SAMPLES, len(mapping.needed), HEADS, COLUMNS, DIM)
    parts = {"": CODECS[codec].encode(x, kind)}
    full = torch.ones(SAMPLES, ROWS).bool(), torch.ones(SAMPLES, COLUMNS).bool()
    band = align_global(*full)
    weight = band.weight.clone()
    weight[1, 4:] = 0  # not covered
    band = Band(band.start, weight, weight.sum(-1) > 0)
    decoded = head.standardise[0](CODECS[codec].decode(parts[""], kind))
    expected = apply_band(band, mapping.apply(decoded, mapping.needed))
    (targets,) = head.targets(parts, band)
    torch.testing.assert_close(targets, expected)
    assert not targets[1, :, :, 4:].any()
    (layers,) = head.layers(parts, band)
    for row in reversed(range(len(mapping.lower))):  # in any order
        torch.testing.assert_close(layers(row), expected[:, row])
