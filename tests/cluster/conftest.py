"""A real Slurm for these tests, and a folder to submit jobs from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY
from tests.support.slurm.mini_slurm import MiniSlurm, missing

PARTS = ("pretrain", "tools", "ds_configs", "slurm")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    """Yield a Slurm of two nodes with four cores each. Skip if Slurm is not installed."""
    if why := missing():
        pytest.skip(why)
    cluster = MiniSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def submit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout that a test may edit and break."""
    folder = tmp_path_factory.mktemp("cluster") / "my $(touch pwned) checkout"
    for part in PARTS:
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
