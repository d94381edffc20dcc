"""The decoder printed in docs/store-format.md is right for every codec."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kvdistill.store.codecs import CODECS

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"


def decoder() -> Any:
    """The function printed on the page."""
    (code,) = re.findall(
        r"^```python\n(import ml_dtypes.*?)^shard = ", PAGE.read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(code, names)
    return names["decode"]


def test_the_page_decodes_files_of_format_1_which_say_int4(tmp_path: Path, build: Any) -> None:
    teacher = build.teacher(codec={"key": "int4_v1", "value": "int4_v1"})
    store, _ = build.store(tmp_path / "store", teacher)
    want = {kind: store.read_decoded("tiny", "00001", kind) for kind in ("key", "value")}
    shard = zarr.open_group(store.paths.shard("tiny", "00001"), mode="r+")
    for kind, values in want.items():
        shard[kind].attrs["codec"] = "int4"
        np.testing.assert_array_equal(decoder()(shard, kind), values)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_page_decodes_as_kvdistill_does(tmp_path: Path, build: Any, codec: str) -> None:
    teacher = build.teacher(codec={"key": codec, "value": codec})
    store, _ = build.store(tmp_path / "store", teacher)
    shard = zarr.open_group(store.paths.shard("tiny", "00001"), mode="r")
    for kind in ("key", "value"):
        want = store.read_decoded("tiny", "00001", kind)
        np.testing.assert_array_equal(decoder()(shard, kind), want)
