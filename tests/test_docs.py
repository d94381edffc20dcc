"""The documentation is run: every ```bash and ```python block, page by page, on tiny models.

Pages share one set of names: ``experiment.yaml``, ``corpus.jsonl``, ``models/smollm2``,
``models/minilm``, ``models/gemma3``, ``tokenizer``, ``stores/my-experiment``. Blocks that show
something without being commands for this machine are ```console or ```text. The README is run by
`make test`, the other pages by `make docs`, those that are notebooks as well as such.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from docs.make_config_reference import reference
from docs.make_notebooks import EXAMPLES, NOTEBOOKS, notebook
from kvdistill.cli import COMMANDS
from tests.slurm.experiment import CORPUS, write_models

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CHATML = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TINY_TUTORIAL = {
    "--vocab-size 2048": "--vocab-size 400",
    "eval_samples: 32": "eval_samples: 4",
    "shard_chars: 20000": "shard_chars: 3000",
    "hidden_size: 256": "hidden_size: 16",
    "intermediate_size: 640": "intermediate_size: 24",
    "num_hidden_layers: 4": "num_hidden_layers: 2",
    "num_attention_heads: 8": "num_attention_heads: 2",
    "num_key_value_heads: 2": "num_key_value_heads: 1",
    "head_dim: 32": "head_dim: 8",
    "epochs: 8": "max_steps: 4",
    "max_length: 384": "max_length: 48",
    "eval_steps: 24": "eval_steps: 2",
    "seeds: [0, 1, 2]": "seeds: [0, 1]",
}
"""What the tutorial's files state, and the sizes that they are run with here."""
TINY = {"max_steps": 4, "batch_size": 2, "max_length": 48, "eval_steps": None, "warmup_steps": 0}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    """A folder as the pages assume it, with an extracted store and a finished run."""
    folder = tmp_path_factory.mktemp("docs")
    write_models(folder / "models")
    (folder / "models/llama").rename(folder / "models/smollm2")
    (folder / "models/bert").rename(folder / "models/minilm")
    write_gemma(folder / "models/gemma3", folder / "models/minilm")
    (folder / "models/smollm2/chat_template.jinja").write_text(CHATML)
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


def write_gemma(folder: Path, tokenizer: Path) -> None:
    """A random Gemma 3 with the tokenizer of another model."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=400, hidden_size=24, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


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


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[] if page.stem == "README" else pytest.mark.docs)
        for page in PAGES
        if page.stem not in NOTEBOOKS
    ],
)
def test_every_command_and_example_of_a_page_runs(
    page: Path, prepared: Path, programs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        run(folder, programs, language, code)


@pytest.mark.docs
@pytest.mark.parametrize("page", NOTEBOOKS)
def test_a_notebook_runs(
    page: str, prepared: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    text = (EXAMPLES / NOTEBOOKS[page]).read_text(encoding="utf-8")
    for stated, tiny in TINY_TUTORIAL.items() if page == "tutorial" else ():
        assert stated in text
        text = text.replace(stated, tiny)
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), os.environ["PATH"]]))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    cells = nbformat.reads(text, as_version=4)
    NotebookClient(cells, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    if page == "tutorial":
        assert {"tutorial.html", "tutorial.csv"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_a_notebook_is_in_step_with_its_page(page: str) -> None:
    written = (EXAMPLES / NOTEBOOKS[page]).read_text(encoding="utf-8")
    assert written == notebook(page), "run: python docs/make_notebooks.py"


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
