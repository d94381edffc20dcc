"""What a fair comparison holds equal, enforced before any run starts and again when all are done.

Seven controls: the same initial student, the same order of the data, the same optimizer steps and
schedule, the same student tokens, the same evaluation, the same budget per arm, and every arm
under the same seeds. Settings decide all of them, so settings are compared first: an arm may
differ from the baseline in what it states, and in nothing that a control names. What runs
recorded of themselves (``measured.py``) is compared afterwards, which also catches what no
setting says: another version of the tokenizer, a corpus file edited between two runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvdistill.config.load import flatten
from kvdistill.config.study import CONTROLLED, ArmConfig
from kvdistill.errors import ControlError
from kvdistill.pipelines.run_folder import refuse_other_config
from kvdistill.studies.study import StudyPlan, StudyRun

NOT_COMPARED: Final = ("name", "preset")


SELECTED_BY_TEACHERS: Final = ("teachers",)


def check_settings(plan: StudyPlan) -> None:
    """Refuse arms that differ from the baseline in what they do not state, or in a control.

    Raises:
        ControlError: names the two arms, the setting and both values.
    """
    for name, arm in plan.arms.items():
        if "seed" in arm.settings:
            raise ControlError(f"arm {name} states a seed; every arm runs under the study's seeds")
    _check_seeds(plan)
    first = plan.of_arm(plan.baseline)[0]
    own = _stated(plan.arms[plan.baseline])
    for name, arm in plan.arms.items():
        run = plan.of_arm(name)[0]
        for setting, ours, theirs in _differences(run, first):
            said = f"{setting} is {ours!r} in arm {name} and {theirs!r} in arm {first.arm}"
            if not _covers(own | _stated(arm), setting):
                raise ControlError(f"{said}, and neither states it")
            if _covers(CONTROLLED, setting) and not _covers(plan.config.may_differ, setting):
                raise ControlError(
                    f"{said}; a fair comparison holds it equal. Take it out of the arm, or, if "
                    "it is what you study, name it under `may_differ`"
                )


def check_folders(plan: StudyPlan) -> None:
    """Refuse run folders that hold runs of other settings than the study's, finished ones too.

    Raises:
        ConfigError: names the folder, the setting and both values.
    """
    for run in plan.runs:
        if run.folder.config.is_file():
            refuse_other_config(run.folder, run.experiment)


def check_records(plan: StudyPlan) -> None:
    """Compare what finished runs recorded of themselves, seed by seed.

    Raises:
        ControlError: names the two runs, the control and both values.
    """
    for seed in plan.config.seeds:
        records = {
            run.name: run.folder.read_record().get("controls")
            for run in plan.runs
            if run.seed == seed and run.is_finished
        }
        known = {name: controls for name, controls in records.items() if controls}
        for control in _controls(known.values()):
            if _covers(plan.config.may_differ, control):
                continue
            _check_equal(control, {name: found.get(control) for name, found in known.items()})


def _check_equal(control: str, values: Mapping[str, Any]) -> None:
    (first, expected), *others = values.items()
    for name, got in others:
        if got != expected:
            raise ControlError(
                f"{control.replace('_', ' ')} is {got} in run {name} and {expected} in run "
                f"{first}; they cannot be compared. Remove the older of the two and run again"
            )


def _check_seeds(plan: StudyPlan) -> None:
    for name in plan.arms:
        seeds = tuple(run.seed for run in plan.of_arm(name))
        if seeds != plan.config.seeds:
            raise ControlError(f"arm {name} runs under the seeds {seeds}, not all of the study's")


def _differences(run: StudyRun, other: StudyRun) -> Iterable[tuple[str, Any, Any]]:
    ours = flatten(run.experiment.model_dump(mode="json"))
    theirs = flatten(other.experiment.model_dump(mode="json"))
    for setting in sorted(ours.keys() | theirs.keys()):
        if setting not in NOT_COMPARED and ours.get(setting) != theirs.get(setting):
            yield setting, ours.get(setting), theirs.get(setting)


def _stated(arm: ArmConfig) -> frozenset[str]:
    """Settings that an arm says it changes."""
    chosen = SELECTED_BY_TEACHERS if arm.teachers is not None else ()
    return frozenset((*arm.settings, *chosen))


def _covers(stated: Iterable[str], setting: str) -> bool:
    """Whether ``setting`` is one of those stated, or inside one, or the section of one."""
    return any(
        setting == one or setting.startswith(f"{one}.") or one.startswith(f"{setting}.")
        for one in stated
    )


def _controls(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({control for record in records for control in record})
