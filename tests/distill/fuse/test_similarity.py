"""Similarity weights against definitions spelled out."""

import math

import pytest
import torch

from kvdistill.distill.fuse.fusion_weights import similarity_weights
from kvdistill.errors import ConfigError, GeometryError


def likeness(query, prototype, similarity):
    if similarity == "l2":
        return -math.dist(query, prototype)
    dot = sum(a * b for a, b in zip(query, prototype, strict=True))
    return dot if similarity == "dot" else dot / (math.hypot(*query) * math.hypot(*prototype))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_weights_against_the_definition(similarity, temperature):
    torch.manual_seed(0)
    queries = [torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 3)]
    prototypes = [torch.randn(2, 3), torch.randn(1, 5), torch.randn(4, 3)]
    alpha = similarity_weights(queries, prototypes, similarity, temperature)
    assert alpha.shape == (3, 4, 1, 1)
    for b in range(4):
        scores = [
            math.exp(max(likeness(q[b].tolist(), p.tolist(), similarity) for p in ps) / temperature)
            for q, ps in zip(queries, prototypes, strict=True)
        ]
        expected = torch.tensor(scores) / sum(scores)
        torch.testing.assert_close(alpha[:, b, 0, 0], expected)


def test_a_text_like_one_teacher_is_given_to_it():
    prototypes = torch.eye(3).unsqueeze(1).unbind()
    alpha = similarity_weights([torch.eye(3)] * 3, prototypes, "cosine", 0.01)
    torch.testing.assert_close(alpha[:, :, 0, 0], torch.eye(3))


def test_errors():
    with pytest.raises(ConfigError, match="expected > 0, got 0"):
        similarity_weights([torch.ones(1, 2)], [torch.ones(1, 2)], temperature=0)
    with pytest.raises(GeometryError, match="width 2 and prototypes of width 3"):
        similarity_weights([torch.ones(1, 2)], [torch.ones(1, 3)])
    with pytest.raises(GeometryError, match="1 queries for 2 teachers"):
        similarity_weights([torch.ones(1, 2)], [torch.ones(1, 2)] * 2)
