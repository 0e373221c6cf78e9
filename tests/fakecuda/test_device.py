"""The fake CUDA device takes what a real one takes, and refuses what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.fakecuda import build

pytestmark = pytest.mark.cuda_placement

REFUSED = {
    "add_host_matrix": "same device",
    "multiply_host_matrix": "same device",
    "add_in_place_to_host": "same device",
    "embed_host_tokens": "same device",
    "concatenate_host_number": "same device",
    "fused_adam_with_host_step": "same device",
    "two_devices": "same device",
    "host_values_by_index": "same device",
    "host_storage": "storage of cpu",
    "host_tensor_in_nccl_group": "No backend type associated with device type cpu",
    "host_list_in_nccl_group": "NCCL got a tensor of cpu",
    "device_tensor_in_gloo_group": "No backend type associated with device type cuda",
    "waiting_in_error_mode": "synchronizing CUDA operation",
    "plain_copy_in_error_mode": "synchronizing CUDA operation",
    "copy_on_a_stream_is_read_too_early": "[nan, nan]",
    "host_overwrites_what_is_being_copied": "[0.0, 0.0]",
    "host_reads_too_early": "[0.0, 0.0]",
}


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """Return the error of each case of the worker, None for those that pass."""
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.fakecuda.run", "-m", "tests.fakecuda.workers.device_worker"]
    environment = os.environ | {"LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, cwd=build.REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    result: dict[str, str | None] = json.loads(ended.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, found: dict[str, str | None]) -> None:
    error = found[case]
    assert error is not None
    assert REFUSED[case] in error


def test_takes_everything_else(found: dict[str, str | None]) -> None:
    assert {case: error for case, error in found.items() if case not in REFUSED and error is not None} == {}
    assert len(found) > len(REFUSED)
