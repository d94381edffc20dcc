"""The device against the CPU, and what only a process with a GPU does."""

from __future__ import annotations

import pytest
import torch

from benchmarks.device_checks import CHECKS, Inapplicable, Setting, relative
from kvdistill.pipelines.train import reset_peak_memory, resource_usage
from kvdistill.slurm.local_pool import visible_gpus
from kvdistill.store.codecs import Symmetric


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Setting.make(torch.device("cuda", 0), tmp_path_factory.mktemp("device"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_the_device_computes_what_the_cpu_does(setting, name):
    assert CHECKS[name](setting)


@pytest.mark.gpu
def test_a_pool_of_workers_finds_the_devices(setting, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(visible_gpus()) == torch.cuda.device_count()


@pytest.mark.gpu
def test_the_peak_of_device_memory_is_that_of_the_run(setting):
    x = torch.empty(1 << 28, dtype=torch.uint8, device=setting.device)
    assert resource_usage()["peak_device_bytes"] >= x.nbytes
    del x
    reset_peak_memory()
    assert resource_usage()["peak_device_bytes"] < 1 << 28


def test_a_code_that_is_two_steps_off_is_found(monkeypatch, tmp_path):
    encode, calls = Symmetric.encode, []

    def shifted(self, x, kind):
        calls.append(self.name)
        parts = encode(self, x, kind)
        if len(calls) % 2 == 0:  # the device's
            parts[""] = parts[""].clone()
            parts[""].view(-1)[5] += 2 if parts[""].view(-1)[5] < 0 else -2
        return parts

    check = CHECKS["codecs"]
    cpu = Setting(torch.device("cpu"), tmp_path)
    assert max(check(cpu).values()) == 0
    monkeypatch.setattr(Symmetric, "encode", shifted)
    with pytest.raises(AssertionError, match="int8 key: codes, in steps"):
        check(cpu)


def test_nothing_that_is_not_finite_is_close():
    x = torch.ones(3)
    assert relative(torch.tensor([1.0, float("nan"), 1.0]), x) == float("inf")
    with pytest.raises(Inapplicable):
        CHECKS["out of memory"](Setting(torch.device("cpu"), None))
