"""Whether the runs of one seed held equal what a fair comparison holds equal."""

from __future__ import annotations

import json
from typing import Final

from kvdistill.pipelines.report.study import Study

SAID: Final = {
    "initial_student": "another initial student",
    "tokenizer": "another tokenizer",
    "corpus": "another training corpus",
    "evaluation": "other held-out texts",
    "order": "another order of the data",
    "steps": "another number of steps",
}
"""The ``controls`` that a run writes into its record, as words."""


def unequal(study: Study) -> list[str]:
    """One note per arm that differs from the baseline, under the same seed, in what it should not.

    Runs that recorded no controls are judged by their number of steps alone.
    """
    baseline = study.arm(study.baseline).by_seed()
    notes = []
    for arm in study.arms:
        different = {
            said
            for seed, run in arm.by_seed().items()
            if seed in baseline
            for key, said in SAID.items()
            if _control(run.record, key) != _control(baseline[seed].record, key)
        }
        if different:
            listed = ", ".join(sorted(different))
            notes.append(f"arm {arm.name!r} had {listed} than {study.baseline}: no fair comparison")
    return notes


def _control(record: dict[str, object], key: str) -> str:
    controls = record.get("controls")
    found = controls.get(key) if isinstance(controls, dict) else None
    return json.dumps(record["steps"] if key == "steps" and found is None else found)
