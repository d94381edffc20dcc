"""One Slurm per test session, for tests marked ``slurm``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_daemons, slurm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running Slurm. Asked for by tests that are marked ``slurm`` alone."""
    missing = missing_daemons()
    if missing or os.geteuid() != 0:
        pytest.fail(f"needs root and {missing}; run .ci/slurm-packages, or leave '-m slurm' away")
    with slurm(tmp_path_factory.mktemp("slurm") / "root") as running:
        yield running


@pytest.fixture
def login(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """This process as a user on the cluster's login node."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        if name not in cluster.environment:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return cluster
