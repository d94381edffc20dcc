"""Every decoder family, as teacher and as student, does what the tables of the docs state."""

from __future__ import annotations

import pytest

from tests.attention.family_table import FAMILIES, HEADS, as_student, as_teacher, documented

REFRESH = "python -m tests.attention.family_table"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_s_attention_is_that_of_its_stored_keys(family: str) -> None:
    assert as_teacher(family) == documented("teachers").get(family), REFRESH


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_s_losses_and_injection_are_of_its_own_attention(family: str) -> None:
    assert as_student(family) == documented("students").get(family), REFRESH


@pytest.mark.parametrize("page", HEADS)
def test_no_family_is_documented_that_is_not_measured(page: str) -> None:
    assert documented(page).keys() == FAMILIES.keys()
