"""A teacher whose weights two processes share (gloo) gives the store that one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.config.load import dump_experiment
from kvdistill.errors import ConfigError, TeacherError
from kvdistill.extract.teacher import load_teacher
from kvdistill.pipelines.extract import ExtractionWork, extract
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import parts_of
from kvdistill.store.identity import recorded_settings
from kvdistill.store.reader import KVStore
from tests.extract.models import save_teacher
from tests.faults.test_identity import two_shards

ROOT = Path(__file__).parents[2]
ASKED = {"confidence": True, "summaries": True, "hidden_at_cue": True}


WORKER = """
from kvdistill.cli import main
from kvdistill.pipelines import extract as module

load = module.load_teacher

def loaded(*args):
    teacher = load(*args)
    for name in ("mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj"):
        weight = teacher.model.layers[0].get_submodule(name).weight
        print(f"{name}: {weight.to_local().numel() / weight.numel()}\\n", end="", flush=True)
    return teacher

module.load_teacher = loaded
main()
"""


def torchrun(experiment: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    """Extract in two processes, which print the shares of weights that they hold."""
    config, worker = folder / "experiment.yaml", folder / "worker.py"
    config.write_text(dump_experiment(experiment), encoding="utf-8")
    worker.write_text(WORKER, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *launcher, str(worker), "extract", str(config)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def decoded(shard: Any, name: str) -> Any:
    """Keys or values as float32, of a shard that is stored in bf16."""
    return CODECS["bf16"].decode(parts_of(shard.arrays, name), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": False}),  # biases, one head
    ],
)
def test_two_processes_store_what_one_does(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    save_teacher(tmp_path / "t", model_type, head=True, **options)
    stored = {"codec": {"key": "bf16", "value": "bf16"}, **ASKED}
    alone = two_shards(tmp_path, **stored)
    assert extract(alone).complete
    together = two_shards(tmp_path, {"tp_plan": "auto"}, **stored)
    together = together.model_copy(update={"store": tmp_path / "together"})
    assert recorded_settings(together, "t") == recorded_settings(alone, "t")
    done = torchrun(together, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj"):
        assert done.stdout.count(f"{name}: 0.5\n") == 2, done.stdout
    assert done.stdout.count("is complete") == 1
    ours, theirs = (KVStore.open(each.store) for each in (together, alone))
    mine, other = (store.teacher("t") for store in (ours, theirs))
    for fact in ("weights_fingerprint", "state_fingerprint", "groups", "extraction_fingerprint"):
        assert getattr(mine, fact) == getattr(other, fact), fact
    assert len(ours.shard_ids) == 2
    for shard_id in ours.shard_ids:
        pair = [store.read_shard("t", shard_id) for store in (ours, theirs)]
        for name, array in pair[1].arrays.items():
            both, tolerance = [pair[0].arrays[name], array], 2e-3
            if name in ("key", "value"):
                both, tolerance = [decoded(shard, name) for shard in pair], 2**-7
            found, expected = (x.astype("float32") for x in both)
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-5, err_msg=name)
    assert extract(alone.model_copy(update={"store": together.store})).complete  # in one process


def test_what_a_tp_plan_does_not_go_with_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    for change, match in (
        ({"device_map": "auto"}, "`tp_plan` does not go with `device_map`"),
        ({"weights": "random"}, "`tp_plan` does not go with `weights: random`"),
        ({"codec": {"key": "klt"}}, r"codec klt needs one; use device_map"),
    ):
        with pytest.raises(ConfigError, match=match):
            two_shards(tmp_path, {"tp_plan": "auto", **change})
    experiment = two_shards(tmp_path, {"tp_plan": "auto"})
    with pytest.raises(TeacherError, match=r"`torchrun --nproc_per_node=GPUS -m kvdistill\.cli"):
        load_teacher("t", experiment)
    with pytest.raises(ConfigError, match="without --workers, --task"):
        ExtractionWork(experiment, "t")


def test_a_model_without_a_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    save_teacher(tmp_path / "t", "gpt2", base={})
    with pytest.raises(TeacherError, match=r"no tensor-parallel plan .*; use device_map: auto"):
        load_teacher("t", two_shards(tmp_path, {"tp_plan": "auto"}))
