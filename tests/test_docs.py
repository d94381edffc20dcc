"""The documentation is run: every ```bash and ```python block, page by page, on tiny models.

Pages share one set of names: ``experiment.yaml``, ``corpus.jsonl``, ``models/smollm2``,
``models/minilm``, ``tokenizer``, ``stores/my-experiment``. Blocks that show something without
being commands for this machine are ```console or ```text.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.make_config_reference import reference
from kvdistill.cli import COMMANDS
from tests.slurm.experiment import CORPUS, write_models

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TINY = {"max_steps": 4, "batch_size": 2, "max_length": 48, "eval_steps": None, "warmup_steps": 0}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    """A folder as the pages assume it, with an extracted store and a finished run."""
    folder = tmp_path_factory.mktemp("docs")
    write_models(folder / "models")
    (folder / "models/llama").rename(folder / "models/smollm2")
    (folder / "models/bert").rename(folder / "models/minilm")
    shutil.copytree(folder / "models/smollm2", folder / "tokenizer")
    (folder / "corpus.jsonl").write_text("".join(CORPUS.open().readlines()[:24]))
    template = (ROOT / "kvdistill/config/experiment.yaml").read_text(encoding="utf-8")
    body = yaml.safe_load(template)
    body["corpus"] = {"path": "corpus.jsonl", "eval_samples": 4, "shard_chars": 3000}
    body["teachers"] = {name: {"model": f"models/{name}"} for name in ("smollm2", "minilm")}
    body["student"]["architecture"] |= {"hidden_size": 16, "intermediate_size": 24}
    body["student"]["architecture"] |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    body["student"]["architecture"] |= {"num_key_value_heads": 1, "head_dim": 8}
    body["training"] = TINY
    (folder / "experiment.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    run(folder, programs, "bash", "kvdistill run experiment.yaml")
    return folder


def run(folder: Path, programs: Path, language: str, code: str) -> str:
    """What a block prints, run in ``folder`` with the programs of another folder first."""
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail"] if language == "bash" else [str(programs / "python")]
    done = subprocess.run(
        [*command, "-c", code], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_example_of_a_page_runs(
    page: Path, prepared: Path, programs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        run(folder, programs, language, code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_source_files_named_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "kvdistill" / name).exists(), name


def test_the_config_reference_is_up_to_date() -> None:
    written = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python docs/make_config_reference.py"


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in COMMANDS if f"kvdistill {name}" not in text]
    assert missing == []
