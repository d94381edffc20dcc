"""Leave one teacher out: arms of a study that differ in nothing but one teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping

from kvdistill.config_file import flatten
from kvdistill.pipelines.report.reading import NOT_OF_AN_ARM
from kvdistill.pipelines.report.study import Arm, Study


def left_out(study: Study) -> dict[str, Mapping[str, Arm]]:
    """For each arm of several teachers, by teacher, the arm that has all but that one.

    An arm counts only if everything but its teachers and their weights is set alike: otherwise
    the difference would not be the teacher's. Placebos have no teachers to leave out.
    """
    real = [arm for arm in study.arms if not arm.placebo and arm.teachers]
    found: dict[str, Mapping[str, Arm]] = {}
    for full in real:
        without = {
            teacher: arm
            for teacher in full.teachers
            for arm in real
            if set(arm.teachers) == set(full.teachers) - {teacher}
            and _besides_teachers(arm) == _besides_teachers(full)
        }
        if len(full.teachers) > 1 and without:
            found[full.name] = without
    return found


def _besides_teachers(arm: Arm) -> str:
    settings = {key: value for key, value in arm.config.items() if key not in NOT_OF_AN_ARM}
    flat = {
        key: value
        for key, value in flatten(settings).items()
        if not key.startswith(("teachers.", "fusion.weights"))
    }
    return json.dumps(flat, sort_keys=True)
