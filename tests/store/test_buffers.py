"""Memory is used again only when no array refers to it any more."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from kvdistill.store import buffers


@pytest.fixture(autouse=True)
def _fresh_pool() -> None:
    buffers._kept.clear()


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    first = buffers.empty((3, 1 << 20), "uint8")
    address = first.ctypes.data
    view = first[1].reshape(2, -1)[:, ::2].view(np.int8)
    view[:] = 7
    del first
    gc.collect()
    other = buffers.empty((3, 1 << 20), "uint8")
    assert other.ctypes.data != address
    other[:] = 1
    assert (view == 7).all()
    del view
    gc.collect()
    assert buffers.empty((3, 1 << 20), "uint8").ctypes.data == address


def test_a_tensor_keeps_its_memory() -> None:
    array = buffers.empty((2, 1 << 20), "float16")
    tensor = torch.from_numpy(array)[1]
    del array
    gc.collect()
    tensor.fill_(3)
    buffers.empty((2, 1 << 20), "float16")[:] = 0
    assert bool((tensor == 3).all())


def test_like_sizes_share_memory_and_small_arrays_do_not_enter() -> None:
    array = buffers.empty((1, 10_000_000), "uint8")
    address = array.ctypes.data
    del array
    again = buffers.empty((1, 9_900_000), "uint8")
    assert again.ctypes.data == address
    assert again.shape == (1, 9_900_000)
    del again
    kept = len(buffers._kept)
    del_me = buffers.empty((10,), "uint8")
    del del_me
    assert len(buffers._kept) == kept


def test_the_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "MAX_KEPT_BYTES", 5 << 20)
    many = [buffers.empty((2 << 20,), "uint8") for _ in range(6)]
    many.clear()
    gc.collect()
    assert sum(memory.nbytes for memory in buffers._kept) <= 5 << 20
