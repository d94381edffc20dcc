"""Shell completion: click's, without importing what a key press has no time for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvdistill.cli import COMMANDS

PROGRAM = "import sys; sys.argv[0] = 'kvdistill'; from kvdistill.cli import main; main()"
HEAVY = """
import atexit, os, sys
names = {'torch', 'transformers', 'matplotlib'}
atexit.register(lambda: os.write(2, repr(names & {*sys.modules}).encode()))
"""


def ask(instruction: str, words: str = "", before: str = "") -> tuple[str, str]:
    """What the shell reads for ``instruction``, after ``words`` were typed, and standard error."""
    environment = {**os.environ, "_KVDISTILL_COMPLETE": instruction}
    environment |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    command = [sys.executable, "-c", before + PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_produced(shell: str) -> None:
    script, _ = ask(f"{shell}_source")
    assert f"_KVDISTILL_COMPLETE={shell}_complete" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)


def test_every_command_is_offered_and_none_is_imported() -> None:
    offered, loaded = ask("bash_complete", "kvdistill ", HEAVY.replace("'torch'", "'pydantic'"))
    assert offered.split() == [f"plain,{name}" for name in COMMANDS]
    assert loaded == "set()"


def test_commands_are_explained() -> None:
    offered, _ = ask("zsh_complete", "kvdistill init")
    assert offered.splitlines() == ["plain", "init", COMMANDS["init"][1]]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kvdistill --de", ["plain,--debug"]),
        ("kvdistill init --from ", ["plain,texts", "plain,chat"]),
        ("kvdistill train ", ["file,"]),
    ],
)
def test_options_choices_and_files_are_completed(words: str, offered: list[str]) -> None:
    found, loaded = ask("bash_complete", words, HEAVY)
    assert found.split() == offered
    assert loaded == "set()"


def test_bash_completes_a_word(tmp_path: Path) -> None:
    program = tmp_path / "kvdistill"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PROGRAM}"\n')
    program.chmod(0o755)
    shell = (
        'eval "$(_KVDISTILL_COMPLETE=bash_source kvdistill)"; complete -p kvdistill;'
        "COMP_WORDS=(kvdistill abl) COMP_CWORD=1; _kvdistill_completion kvdistill;"
        'echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    registered, found = done.stdout.splitlines()
    assert registered.endswith("-F _kvdistill_completion kvdistill")
    assert found == "ablate"
