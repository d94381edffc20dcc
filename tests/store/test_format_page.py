"""The decoder printed in docs/store-format.md is right for every codec."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from safetensors.numpy import load_file

from tests.store.made import ALONE

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"


def decoder() -> Any:
    """The function printed on the page."""
    return _printed(r"^```python\n(import ml_dtypes.*?)^shard = ")["decode"]


def _printed(pattern: str) -> dict[str, Any]:
    (code,) = re.findall(pattern, PAGE.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_page_decodes_klt_as_kvdistill_does(tmp_path: Path, build: Any) -> None:
    names = _printed(r"^```python\n(import numpy as np\n\n\ndef decode_block.*?)^```")
    codec = {"key": "klt", "value": "klt", "key_bits": 5.5, "value_bits": 2.3, "block_layers": 2}
    store, _ = build.store(tmp_path / "store", build.teacher(codec=codec))
    shard = zarr.open_group(store.paths.shard("tiny", "00001"), mode="r")
    bases = load_file(store.paths.transform("tiny"))
    for kind in ("key", "value"):
        blocks = [names["decode_block"](shard, kind, bases, i) for i in (0, 1)]
        got = np.concatenate(blocks, axis=1)
        want = store.read_decoded("tiny", "00001", kind)
        want_TN = want.transpose(2, 0, 1, 3).reshape(want.shape[2], -1)
        others = np.setdiff1d(np.arange(len(got)), shard["sample_ptr"][:-1])
        np.testing.assert_array_equal(got[others], want_TN[others])
        first = shard["sample_ptr"][[0, 2]]  # the second sample has no tokens
        np.testing.assert_array_equal(want[:, :, first], shard[f"{kind}_exact"][:, :, [0, 2]])


def test_the_page_decodes_files_of_format_1_which_say_int4(tmp_path: Path, build: Any) -> None:
    teacher = build.teacher(codec={"key": "int4_v1", "value": "int4_v1"})
    store, _ = build.store(tmp_path / "store", teacher)
    want = {kind: store.read_decoded("tiny", "00001", kind) for kind in ("key", "value")}
    shard = zarr.open_group(store.paths.shard("tiny", "00001"), mode="r+")
    for kind, values in want.items():
        shard[kind].attrs["codec"] = "int4"
        np.testing.assert_array_equal(decoder()(shard, kind), values)


@pytest.mark.parametrize("codec", ALONE)
def test_the_page_decodes_as_kvdistill_does(tmp_path: Path, build: Any, codec: str) -> None:
    teacher = build.teacher(codec={"key": codec, "value": codec})
    store, _ = build.store(tmp_path / "store", teacher)
    shard = zarr.open_group(store.paths.shard("tiny", "00001"), mode="r")
    for kind in ("key", "value"):
        want = store.read_decoded("tiny", "00001", kind)
        np.testing.assert_array_equal(decoder()(shard, kind), want)
