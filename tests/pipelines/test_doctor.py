"""The doctor: green where a run would go on, and red with the words of what would refuse."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from kvdistill.cli import cli
from kvdistill.config.load import load_experiment
from kvdistill.distill.losses.load_balancing import LoadBalancing
from kvdistill.errors import ConfigError
from kvdistill.pipelines import doctor
from tests.slurm.experiment import write_experiment, write_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("doctor")
    write_models(made / "models")
    write_experiment(made, made / "models")
    return made


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor.client, "is_available", lambda: False)


def found(folder: Path, *overrides: str) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(folder / "experiment.yaml", overrides)}


def test_a_machine_and_an_experiment_that_fit_are_green(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["doctor", str(folder / "experiment.yaml"), "--json"])
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.exit_code == 0, done.stdout
    assert all(check["is_fine"] for check in checks.values())
    assert list(checks) == [
        "packages", "device", "slurm", "hub", "store", "runs", "corpus", "teacher llama",
        "teacher bert", "student", "losses",
    ]  # fmt: skip
    assert "3 layers × 2 KV heads of 16" in checks["teacher llama"]["text"]
    assert "44 samples to train on, 4 held out" in checks["corpus"]["text"]
    assert "offline" in checks["hub"]["text"].lower()
    assert not (folder / "store").exists()
    wrong = ["doctor", str(folder / "experiment.yaml"), "--set", "losses.router_aux=1"]
    red = CliRunner().invoke(cli, wrong)
    assert (red.exit_code, red.stdout.count("✗ losses: "), red.stdout.count("✗")) == (1, 1, 1)
    alone = CliRunner().invoke(cli, ["doctor"])
    assert (alone.exit_code, alone.stdout.count("✓")) == (0, 4)


@pytest.mark.parametrize(
    ("fault", "shown"),
    [(None, ", fused kernel"), ("Triton is not installed", "no fused kernel: Triton is not")],
)
def test_a_gpu_is_named_with_what_it_can_run(
    monkeypatch: pytest.MonkeyPatch, fault: str | None, shown: str
) -> None:
    names = SimpleNamespace(get_device_name=lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: names)
    monkeypatch.setattr(doctor, "operations_per_second", lambda device: 1e12)
    monkeypatch.setattr(doctor, "kernel_fault", lambda device: fault)
    (device,) = (check for check in doctor.examine() if check.name == "device")
    assert device.is_fine
    assert device.text.startswith("GPU 0, GPU 1, 1,000 GFLOP/s")
    assert shown in device.text


MLA = {
    "model_type": "deepseek_v2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "red", "words"),
    [
        (["teachers.bert.model=/none/such"], ["teacher bert"], "no such folder"),
        (["teachers.bert.chat=true"], ["teacher bert"], "no chat template"),
        (["teachers.bert.stream=encoder"], ["teacher bert"], "leave out `stream`"),
        (["student.tokenizer=/none"], ["student"], "no such folder"),
        (["student.architecture.num_layers=2"], ["student"], "no setting"),
        (["training.max_length=4096", "student.architecture.model_type=gpt2",
          "student.architecture.n_positions=64"], ["student"], "setting"),
        (["losses.router_aux=1"], ["losses"], "load-balancing loss"),
        (["alignment.layers=skip", "student.architecture.num_hidden_layers=3"], ["losses"], "skip"),
        ([f"student.architecture={json.dumps(MLA)}", "losses.inject=1"], ["losses"], "to 0"),
        (["corpus.path=/none.jsonl"], ["corpus"], "not found"),
        (["output_dir=/dev/null/x"], ["runs"], "Not a directory"),
        (["losses.keys=1"], ["config"], "losses.key"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_would_be_refused_is_red(
    folder: Path, overrides: list[str], red: list[str], words: str
) -> None:
    checks = found(folder, *overrides)
    assert [name for name, check in checks.items() if not check.is_fine] == red
    for name in red:
        assert words in checks[name].text
        assert len(checks[name].text) <= 500
        assert "\n" not in checks[name].text


def test_the_words_are_those_of_training(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(ConfigError) as caught:
        LoadBalancing(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)), 1.0)
    assert found(folder, "losses.router_aux=1")["losses"].text == str(caught.value)


def test_losses_that_run_the_student_are_tried_on_random_weights(folder: Path) -> None:
    overrides = ["losses.attention_kl=1", "projection.mode=frozen"]
    text = found(folder, *overrides)["losses"].text
    assert text == "key, value, attention_kl, cross_entropy: usable with this student"


def test_a_teacher_without_weights_is_red(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "models/llama", tmp_path / "llama")
    (tmp_path / "llama/model.safetensors").unlink()
    checks = found(folder, f"teachers.llama.model={tmp_path / 'llama'}")
    assert "no *.safetensors" in checks["teacher llama"].text
    other = found(
        folder, f"teachers.llama.model={tmp_path / 'llama'}", "teachers.llama.weights=random"
    )
    assert other["teacher llama"].is_fine


def test_packages_out_of_range_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.metadata.distributions
    old = SimpleNamespace(name="Transformers", version="4.40.0")
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: [*real(), old])
    (packages, *_) = doctor.examine()
    assert not packages.is_fine
    assert packages.text.startswith("transformers 4.40.0, expected ")
    assert "pip install 'transformers" in packages.text


def test_slurm_is_needed_where_profiles_are_and_has_their_partitions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment(folder / "experiment.yaml")
    monkeypatch.setattr(doctor.client, "is_available", lambda: True)
    monkeypatch.setattr(doctor.client, "call", lambda command: "low\ngpu\n")
    assert doctor._slurm(experiment) == "partitions low, gpu"
    monkeypatch.setattr(doctor.client, "call", lambda command: "gpu\n")
    with pytest.raises(doctor.SlurmError, match=r"profiles\.site\.partition: expected one of gpu"):
        doctor._slurm(experiment)

    def fails(command: Any) -> str:
        raise doctor.SlurmError("sinfo failed")

    monkeypatch.setattr(doctor.client, "call", fails)
    with pytest.raises(doctor.SlurmError, match="login node"):
        doctor._slurm(experiment)
    assert "only --slurm needs it" in doctor._slurm(None)


def test_a_hub_that_does_not_answer_is_asked_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    class Silent(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.path)
            self.close_connection = True

        do_GET = do_HEAD

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        checks = found(folder, "teachers.llama.model=org/not-there")
        server.shutdown()
    assert "not reachable" in checks["hub"].text
    assert not checks["teacher llama"].is_fine
    assert len(requests) == 1
