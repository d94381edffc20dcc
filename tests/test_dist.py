"""What `make dist` has built: the wheel, the sdist, and an installation without the sources."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from kvdistill import __version__

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[1]
STARTS = "start_chat", "start_latent", "start_slurm"
AT_RUN_TIME = {
    "kvdistill/py.typed",
    *(f"kvdistill/config/{x}.yaml" for x in ("experiment", *STARTS)),
    *(f"kvdistill/studies/report/report.{x}.j2" for x in ("html", "md")),
}


def built(pattern: str) -> Path:
    found = sorted((ROOT / "dist").glob(pattern))
    if len(found) != 1:
        pytest.fail(f"dist/ has {len(found)} files {pattern}, expected one; run `make dist`")
    return found[0]


@pytest.fixture(scope="module")
def wheel() -> Path:
    """Built from the sdist, as `python -m build` does."""
    return built("*.whl")


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {x for x in archive.namelist() if ".dist-info/" not in x}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "kvdistill").rglob("*.py")}
    assert names == modules | AT_RUN_TIME
    assert wheel.name == f"kvdistill-{__version__}-py3-none-any.whl"


def test_the_sdist_holds_what_git_does_not_ignore() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    with tarfile.open(built("*.tar.gz")) as archive:
        names = {x.name.partition("/")[2] for x in archive.getmembers() if x.isfile()}
    assert names == {*listed.stdout.splitlines(), "PKG-INFO"}


def test_the_sources_build_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (again,) = tmp_path.iterdir()
    assert again.read_bytes() == wheel.read_bytes()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a new environment with the wheel; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    here = [path for path in sys.path if path.endswith("site-packages")]
    (Path(packages) / "dependencies.pth").write_text("\n".join(here))
    return folder / "bin"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -c 'import kvdistill; print(kvdistill.__file__)'", "installed0/lib"),
        ("kvdistill --help", "Commands:"),
        ("kvdistill init", "wrote experiment.yaml"),
        ("kvdistill init chat.yaml --from chat", "wrote chat.yaml"),
        ("kvdistill init latent.yaml --latent --slurm", "wrote latent.yaml"),
        ("kvdistill config show experiment.yaml", "teachers:"),
        ("kvdistill doctor", "✓ packages: Python"),
        ("_KVDISTILL_COMPLETE=bash_source kvdistill", "complete -o nosort"),
    ],
)
def test_the_wheel_works_in_an_empty_folder(
    installed: Path, tmp_path_factory: pytest.TempPathFactory, command: str, said: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "empty"
    folder.mkdir(exist_ok=True)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{installed}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
