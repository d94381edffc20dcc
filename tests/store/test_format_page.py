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


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_the_page_decodes_as_kvdistill_does(tmp_path: Path, build: Any, codec: str) -> None:
    teacher = build.teacher(codec={"key": codec, "value": codec})
    store, _ = build.store(tmp_path / "store", teacher)
    (code,) = re.findall(
        r"^```python\n(import ml_dtypes.*?)^shard = ", PAGE.read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(code, names)
    shard = zarr.open_group(store.paths.shard("tiny", "00001"), mode="r")
    for kind in ("key", "value"):
        want = store.read_decoded("tiny", "00001", kind)
        np.testing.assert_array_equal(names["decode"](shard, kind), want)
