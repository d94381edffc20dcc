"""What a fair comparison holds equal, checked before any run starts and again when all are done.

Seven controls: the same initial student, order of the data, optimizer steps and schedule, student
tokens, evaluation, budget per arm and seeds. An arm may differ from the baseline only in settings
that it states, and in no controlled section. What runs recorded is compared afterwards, which also
catches another version of the tokenizer or a corpus file edited between two runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kvdistill.config.load import flatten
from kvdistill.config.study import CONTROLLED, ArmConfig
from kvdistill.errors import ControlError
from kvdistill.pipelines.run_folder import refuse_other_config
from kvdistill.studies.design import StudyDesign

NOT_COMPARED: Final = ("name", "preset")


def check_settings(design: StudyDesign) -> None:
    """Refuse arms that differ from the baseline in what they do not state, or in a control.

    Raises:
        ControlError: names the two arms, the setting and both values.
    """
    base = design.of_arm(design.baseline)[0]
    theirs = flatten(base.experiment.model_dump(mode="json"))
    for name, arm in design.arms.items():
        if "seed" in arm.settings:
            raise ControlError(
                f"arm {name} sets `seed`; every arm runs under the study's `seeds`. Remove it"
            )
        stated = _stated(design.arms[design.baseline]) | _stated(arm)
        ours = flatten(design.of_arm(name)[0].experiment.model_dump(mode="json"))
        for setting in sorted(ours.keys() | theirs.keys()):
            own, other = ours.get(setting), theirs.get(setting)
            if setting in NOT_COMPARED or own == other:
                continue
            difference = f"{setting} is {own!r} in arm {name} and {other!r} in arm {base.arm}"
            if not _covers(stated, setting):
                raise ControlError(f"{difference}, and neither states it")
            if _covers(CONTROLLED, setting) and not _covers(design.config.may_differ, setting):
                raise ControlError(
                    f"{difference}; a fair comparison holds it equal. Remove it from the arm, or, "
                    "if it is what you study, name it under `may_differ`"
                )


def check_folders(design: StudyDesign) -> None:
    """Refuse run folders, finished ones included, whose settings are not the study's.

    Raises:
        ConfigError: names the folder, the setting and both values.
    """
    for run in design.runs:
        if run.folder.config.is_file():
            refuse_other_config(run.folder, run.experiment)


def check_records(design: StudyDesign) -> None:
    """Compare the controls that finished runs recorded, seed by seed.

    Raises:
        ControlError: names the two runs, the control and both values.
    """
    for seed in design.config.seeds:
        found = {
            run.name: run.folder.read_record().get("controls")
            for run in design.runs
            if run.seed == seed and run.is_finished
        }
        recorded = [(name, controls) for name, controls in found.items() if controls]
        for control in sorted({control for _, controls in recorded for control in controls}):
            if _covers(design.config.may_differ, control):
                continue
            first, expected = recorded[0][0], recorded[0][1].get(control)
            for name, controls in recorded[1:]:
                if (got := controls.get(control)) != expected:
                    raise ControlError(
                        f"{control.replace('_', ' ')} is {got} in run {name} and {expected} in "
                        f"run {first}; they cannot be compared. Remove the older of the two and "
                        "run again"
                    )


def _stated(arm: ArmConfig) -> frozenset[str]:
    """Settings that an arm declares to change."""
    return frozenset((*arm.settings, *(("teachers",) if arm.teachers is not None else ())))


def _covers(stated: Iterable[str], setting: str) -> bool:
    """Whether ``setting`` is one of those stated, or inside one, or the section of one."""
    return any(
        setting == one or setting.startswith(f"{one}.") or one.startswith(f"{setting}.")
        for one in stated
    )
