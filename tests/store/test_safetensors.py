"""The safetensors backend, seen from outside and from inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

SHARD = Path("store", "teachers", "tiny", "shards", "00000", "shard.safetensors")


def test_any_safetensors_reader_finds_tensors_by_layer_and_head(tmp_path: Any, build: Any) -> None:
    codec = {"key": "bf16", "value": "fp8_e4m3"}
    teacher = build.teacher(backend="safetensors", codec=codec, has_importance=True)
    _, made = build.store(tmp_path / "store", teacher)
    arrays = made["00000"].shard.arrays
    with safe_open(tmp_path / SHARD, framework="pt") as file:
        key = file.get_tensor("layer.03.head.01.key")
        value = file.get_tensor("layer.03.head.01.value")
        scale = file.get_tensor("layer.03.head.01.value_scale")
        token_ids = file.get_tensor("token_ids")
    assert key.dtype == torch.bfloat16
    assert value.dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(key.view(torch.uint16).numpy(), arrays["key"][2, 1])
    np.testing.assert_array_equal(scale.numpy(), arrays["value_scale"][2, 1])
    assert token_ids.tolist() == list(range(194))


def test_two_groups_share_one_name_space(tmp_path: Any, build: Any) -> None:
    build.store(tmp_path / "store", build.teacher(backend="safetensors", groups=build.two_groups))
    with safe_open(tmp_path / SHARD, framework="np") as file:
        shapes = {
            layer: file.get_tensor(f"layer.{layer:02d}.head.00.key").shape for layer in (0, 1, 2)
        }
    assert shapes == {0: (194, 8), 1: (194, 4), 2: (194, 8)}


def test_reading_copies_nothing_and_writing_to_a_view_changes_no_file(
    tmp_path: Any, build: Any
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend="safetensors"))
    before = (tmp_path / SHARD).read_bytes()
    first = store.read_shard("tiny", "00000").arrays["key"]
    second = store.read_shard("tiny", "00000", layers=[1, 3], heads=[1]).arrays["key"]
    assert np.shares_memory(first, second)
    first[:] = 1
    assert (tmp_path / SHARD).read_bytes() == before
