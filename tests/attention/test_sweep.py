"""Every text model type of the installed transformers is read right or refused in one line."""

from __future__ import annotations

import pytest

from tests.attention.sweep import PAGE, in_a_process, page, sweep
from tests.attention.tiny_configs import text_types


@pytest.mark.slow
def test_every_type_is_right_or_refused_and_the_page_is_up_to_date() -> None:
    outcomes = dict(sweep(text_types()))
    faults = {
        (model_type, role): outcome
        for model_type, found in outcomes.items()
        for role, outcome in found.items()
        if "FAULT" in outcome
    }
    assert faults == {}
    assert sum("built" not in found for found in outcomes.values()) >= 190
    assert PAGE.read_text(encoding="utf-8") == page(outcomes), (
        "run: python -m tests.attention.sweep --write"
    )


def test_a_type_of_every_kind() -> None:
    """The sweep's own machinery, on types of which each outcome is known."""
    found = {t: in_a_process(t) for t in ("llama", "bert", "bart", "mamba")}
    assert found["llama"] == {"teacher": "works", "student": "works"}
    assert found["bert"] == {"teacher": "works, encoder", "student": "no: an encoder"}
    assert set(found["bart"].values()) == {"works"}
    assert all(outcome.startswith("no: ") for outcome in found["mamba"].values())
