"""Files for installation and publication agree with pyproject and with one another."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from kvdistill import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TORCH = next(x for x in map(Requirement, PROJECT["dependencies"]) if x.name == "torch")
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PAGE = (ROOT / "docs/install.md").read_text(encoding="utf-8")
DOCKER = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?ms)^%(\w+)\n(.*?)(?=^%|\Z)", (ROOT / "apptainer.def").read_text()))


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.*?) \|", PAGE))
    packages = {
        name: ", ".join(Requirement(x).name for x in wanted)
        for name, wanted in EXTRAS.items()
        if name not in {"dev", "docs"}
    }
    assert rows == packages


def test_the_page_states_the_lowest_python_and_torch() -> None:
    stated = re.findall(r"Python \(≥ ([\d.]+)\) on torch ≥ (\d+\.\d+)", PAGE)
    assert stated == [(PROJECT["requires-python"][2:], str(TORCH.specifier)[2:])]


def test_every_extra_named_in_a_file_exists() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kvdistill/**/*.py")]:
        for named in re.findall(
            r"(?:kvdistill|whl\)|'\.)\[([a-z,]+)\]['\"]", path.read_text("utf-8")
        ):
            assert set(named.split(",")) <= EXTRAS.keys(), path


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert citation["url"] == PROJECT["urls"]["Documentation"]
    assert citation["authors"] == [{"name": "The kvdistill authors"}]


def test_the_documentation_is_built_with_the_packages_of_its_extra() -> None:
    settings = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text(encoding="utf-8"))
    (command,) = settings["build"]["jobs"]["install"]
    assert re.findall(r'"(.*?)"', command) == EXTRAS["docs"]
    assert (ROOT / settings["mkdocs"]["configuration"]).exists()


def test_both_containers_have_one_base_and_the_same_extras() -> None:
    header = (ROOT / "apptainer.def").read_text(encoding="utf-8").partition("%")[0]
    base = re.search(r"(?m)^ARG BASE=(\S+)", DOCKER)
    extras = re.search(r"(?m)^ARG EXTRAS=(\S+)", DOCKER)
    assert base is not None
    assert extras is not None
    assert dict(re.findall(r"(?m)^(\w+): (\S+)", header)) == {
        "Bootstrap": "docker",
        "From": base[1],
    }
    assert SECTIONS["arguments"].split() == [f"EXTRAS={extras[1]}"]
    assert set(extras[1].split(",")) <= EXTRAS.keys()
    assert TORCH.specifier.contains(base[1].partition(":")[2].partition("-")[0])


def test_the_containers_hold_what_the_wheel_is_built_from() -> None:
    built = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "kvdistill"}
    copied = re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", DOCKER)
    assert set(" ".join(copied).split()) == built
    assert {line.split()[0] for line in SECTIONS["files"].strip().splitlines()} == built
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == built


def test_a_container_runs_kvdistill_as_no_root() -> None:
    assert re.findall(r"(?m)^USER (\S+)", DOCKER)[-1].split(":")[0] not in {"0", "root"}
    assert 'ENTRYPOINT ["kvdistill"]' in DOCKER
    assert 'exec kvdistill "$@"' in SECTIONS["runscript"]
    assert not re.search("(?i)token|password|secret", DOCKER + "".join(SECTIONS.values()))


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_apptainer_s_scripts_are_shell(section: str) -> None:
    subprocess.run(["sh", "-n"], input=SECTIONS[section], text=True, check=True)


def test_the_commands_of_the_page_are_shell() -> None:
    blocks = re.findall(r"(?ms)^```(?:bash|console)\n(.*?)^```", PAGE)
    assert len(blocks) > 5
    subprocess.run(["bash", "-n"], input="".join(blocks), text=True, check=True)
