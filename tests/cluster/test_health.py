"""tools/check_node.py as a job runs it on each node, and its checks of faults that a healthy machine cannot show."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from pretrain.cluster.health import system
from pretrain.cluster.health.arithmetic import check_device
from pretrain.cluster.health.gpus import check_gpus, read_gpus

TOOL = Path(__file__).parents[2] / "tools" / "check_node.py"

# As nvidia-smi 550 prints it, cut to what matters.
HEALTHY = """
<gpu id="00000000:19:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <uuid>GPU-7</uuid>
  <clocks_event_reasons>
    <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
    <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
    <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
  </clocks_event_reasons>
  <fb_memory_usage><total>81559 MiB</total><used>1 MiB</used></fb_memory_usage>
  <ecc_errors>
    <volatile><sram_uncorrectable_parity>0</sram_uncorrectable_parity><dram_uncorrectable>0</dram_uncorrectable></volatile>
    <aggregate><dram_uncorrectable>7</dram_uncorrectable></aggregate>
  </ecc_errors>
  <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
  <remapped_rows>
    <remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
  <temperature><gpu_temp>45 C</gpu_temp></temperature>
  <gpu_recovery_action>None</gpu_recovery_action>
  <processes><process_info><pid>4</pid><type>G</type><process_name>Xorg</process_name></process_info></processes>
</gpu>
"""
# What is changed in it, and what is then found.
FAULTS = {
    "computing": (
        (
            "<processes>",
            "<processes><process_info><pid>31</pid><type>C</type><process_name>python</process_name></process_info>",
        ),
        "process 31 (python) is computing on it",
    ),
    "memory taken": (("1 MiB", "40211 MiB"), "40211 MiB of its memory are taken"),
    "hot": (("slowdown>Not Active", "slowdown>Active"), "its clocks are reduced (hw_thermal_slowdown, 45 C)"),
    "memory errors": (
        ("<dram_uncorrectable>0", "<dram_uncorrectable>2"),
        "2 uncorrected errors of its memory since the driver was loaded: reset it",
    ),
    "memory errors of a V100": (
        ("<volatile>", "<volatile><double_bit><device_memory>3</device_memory><total>3</total></double_bit>"),
        "3 uncorrected errors of its memory since the driver was loaded: reset it",
    ),
    "pages": (("retirement>N/A", "retirement>Yes"), "pages of its memory are to be retired: reset it"),
    "rows": (("pending>No", "pending>Yes"), "rows of its memory are to be remapped: reset it"),
    "broken row": (("failure>No", "failure>Yes"), "a broken row of its memory could not be remapped: replace it"),
    "to be reset": (("action>None", "action>GPU Reset"), "the driver asks for its recovery: GPU Reset"),
}


def document(*gpus: str) -> str:
    return f"""<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><driver_version>550.54.15</driver_version>{"".join(gpus)}</nvidia_smi_log>"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in nvidia-smi's place."""

    def place(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return place


def run(*options: object, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOL, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **how)


def findings(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 1, done.stdout + done.stderr
    start = f"{socket.gethostname()}: "
    assert all(line.startswith(start) for line in done.stdout.splitlines())
    return [line.removeprefix(start) for line in done.stdout.splitlines()]


def test_a_healthy_node_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run("--folder", tmp_path / "runs/new", "--gpus", 0, "--min-free-gb", 0.001)
    assert (done.returncode, done.stdout) == (0, f"{socket.gethostname()}: nothing is wrong\n"), (
        done.stdout + done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_all_faults_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run(
        *("--folder", "/proc/run", "--gpus", 8, "--min-free-gb", 1),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )
    assert findings(done) == [
        "a process may open 200 files, fewer than 1024: raise the limit with `ulimit -n`",
        "/proc has 0.00 GB free, less than 1 GB",
        "/proc cannot be written: No such file or directory",
        "0 GPUs are here and 8 are wanted",
    ]


@pytest.mark.parametrize("options", [["--gpus", "-1"], ["--min-free-gb", "nan"], ["--gpus", "a"]])
def test_wrong_arguments_end_with_exit_code_2(tmp_path: Path, options: list[str]) -> None:
    done = run("--folder", tmp_path, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert options[0] in done.stderr


def test_gpus_are_counted_and_checked_through_nvidia_smi(tmp_path: Path, nvidia_smi: Callable) -> None:
    hot = HEALTHY.replace("slowdown>Not Active", "slowdown>Active").replace("GPU-7", "GPU-8")
    (tmp_path / "smi.xml").write_text(document(HEALTHY, hot))
    nvidia_smi(f'[ "$*" = "-q -x" ] && cat {tmp_path}/smi.xml')
    found = findings(run("--folder", tmp_path, "--min-free-gb", 0, "--gpus", 4))
    assert found[:2] == [
        "2 GPUs are here and 4 are wanted",
        "GPU 1 (GPU-8): its clocks are reduced (hw_thermal_slowdown, 45 C)",
    ]
    if not torch.cuda.is_available():
        assert [line.split(":")[0] for line in found[2:]] == ["torch finds 0 GPUs and nvidia-smi 2"]


def test_only_gpus_that_the_launcher_gave_are_checked(nvidia_smi: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(f'[ "$*" = "-q -x -i 2,3" ] && echo \'{document(HEALTHY)}\'')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    gpus, complaint = read_gpus()
    assert (len(gpus), complaint) == (1, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read_gpus() == ([], "")


@pytest.mark.parametrize(
    ("script", "finding"),
    [
        ("echo 'Unable to determine the device handle: GPU is lost'; exit 15", "nvidia-smi fails: Unable to determine"),
        ("echo oops", "nvidia-smi gives what cannot be read"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_finding(nvidia_smi: Callable, script: str, finding: str) -> None:
    nvidia_smi(script)
    gpus, complaint = read_gpus()
    assert not gpus
    assert complaint.startswith(finding)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_the_driver_reports_is_a_finding(fault: str) -> None:
    (old, new), finding = FAULTS[fault]
    assert old in HEALTHY
    healthy_and_not = document(HEALTHY, HEALTHY.replace(old, new, 1))
    gpus = ElementTree.fromstring(healthy_and_not).findall("gpu")
    assert list(check_gpus(gpus)) == [f"GPU 1 (GPU-7): {finding}"]


@pytest.mark.parametrize(("seconds", "finding"), [(9, "9 s ahead of"), (-3600, "3600 s behind"), (3, "")])
def test_a_clock_that_is_not_the_file_systems_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, finding: str
) -> None:
    real = system.time.time
    monkeypatch.setattr(system, "time", SimpleNamespace(time=lambda: real() + seconds))
    found = list(system.check_folder(tmp_path, 0))
    assert bool(found) == bool(finding)
    assert all(f"this node's clock is {finding} that of {tmp_path}" in line for line in found)


def test_a_file_system_with_room_for_few_files_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    space = SimpleNamespace(f_bavail=real.f_bavail, f_frsize=real.f_frsize, f_files=10**6, f_favail=12)
    monkeypatch.setattr(system.os, "statvfs", lambda folder: space)
    assert list(system.check_folder(tmp_path, 0)) == [f"{tmp_path} has room for 12 more files, fewer than 10000"]


def test_memory_that_something_else_uses_is_found(tmp_path: Path) -> None:
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:       1000000 kB\nMemFree:  5 kB\nMemAvailable:   99000 kB\nHugePages_Total:       0\n")
    assert list(system.check_memory(table)) == ["0.1 GB of 1.0 GB memory are available: something else is using it"]
    table.write_text(table.read_text().replace("99000", "101000"))
    assert list(system.check_memory(table)) == []


ONCE = "does not give the same product of two matrices of {} twice"
WRONG = "multiplies matrices of {} wrongly: off by"


@pytest.mark.parametrize(
    ("flips", "finding"),
    [
        # products are made in the order float32, float32, bfloat16, bfloat16; {product: bit}
        ({1: 0}, ONCE.format(torch.float32)),
        ({2: 0}, ONCE.format(torch.bfloat16)),
        ({0: 26, 1: 26}, WRONG.format(torch.float32)),
        ({2: 11, 3: 11}, WRONG.format(torch.bfloat16)),
        ({}, ""),
    ],
)
def test_a_wrong_bit_of_a_processor_is_found(
    monkeypatch: pytest.MonkeyPatch, flips: dict[int, int], finding: str
) -> None:
    multiply, made = torch.Tensor.__matmul__, []

    def err(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = multiply(left, right)
        if left.dtype != torch.float64:
            if len(made) in flips:
                element = product.view(-1)[77:78]
                element.view({2: torch.int16, 4: torch.int32}[element.element_size()]).bitwise_xor_(
                    1 << flips[len(made)]
                )
            made.append(product)
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", err)
    found = list(check_device(torch.device("cpu")))
    assert len(found) == bool(flips)
    assert all(f"cpu {finding}" in line for line in found)
