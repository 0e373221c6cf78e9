"""A check of a node's GPUs by the report of the driver, `nvidia-smi -q -x`. Drivers leave out values that they lack."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SHARED_MEMORY = Path("/dev/shm")  # NCCL uses it between the GPUs of a node

_PATIENCE_S = 120.0
_IDLE_MIB = 1024  # some drivers count their own memory
_NO_DEVICES = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all devices
_NOTHING = ("", "None", "N/A")
# Elements that report a fault by Yes, and the fault.
_BAD = {
    "pending_retirement": "pages of its memory are to be retired: reset it",
    "pending_blacklist": "pages of its memory are to be retired: reset it",
    "remapped_row_pending": "rows of its memory are to be remapped: reset it",
    "remapped_row_failure": "a broken row of its memory could not be remapped: replace it",
}
# Reasons for reduced clocks that are faults. Idling and the power limit are not.
_THROTTLED = ("thermal_slowdown", "power_brake_slowdown")


def read_gpus() -> tuple[list[Element], str]:
    """Return the driver's report of each GPU that this process may use, and what is wrong if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in _NO_DEVICES or shutil.which("nvidia-smi") is None:
        return [], ""
    command = ["nvidia-smi", "-q", "-x", *(["-i", visible] if visible else [])]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    if done.returncode:
        return [], f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())}"
    try:
        return ElementTree.fromstring(done.stdout).findall("gpu"), ""
    except ElementTree.ParseError as error:
        return [], f"nvidia-smi gives what cannot be read: {error}"


def check_gpus(gpus: Sequence[Element]) -> Iterator[str]:
    """Yield what is wrong with the GPUs of `read_gpus`, on which nothing should run yet."""
    for number, gpu in enumerate(gpus):
        for finding in _check(gpu):
            yield f"GPU {number} ({gpu.findtext('uuid')}): {finding}"


def _check(gpu: Element) -> Iterator[str]:
    for process in gpu.iter("process_info"):
        if "C" in process.findtext("type", "C"):  # computing, not drawing
            yield f"process {process.findtext('pid')} ({process.findtext('process_name')}) is computing on it"
    if (used := _number(gpu.findtext("fb_memory_usage/used"))) > _IDLE_MIB:
        yield f"{used} MiB of its memory are taken"
    for element in gpu.iter():
        text = (element.text or "").strip()
        if element.tag.endswith(_THROTTLED) and text == "Active":
            yield f"its clocks are reduced ({element.tag.split('_reason_')[-1]}, {gpu.findtext('temperature/gpu_temp')})"
        if element.tag in _BAD and text == "Yes":
            yield _BAD[element.tag]
    if errors := _uncorrected(gpu):
        yield f"{errors} uncorrected errors of its memory since the driver was loaded: reset it"
    if (action := gpu.findtext("gpu_recovery_action", "")) not in _NOTHING:
        yield f"the driver asks for its recovery: {action}"


def _uncorrected(gpu: Element) -> int:
    volatile = gpu.find("ecc_errors/volatile")
    if volatile is None:
        return 0
    # Volta and older count double-bit errors instead.
    counts = [element for element in volatile.iter() if "uncorrectable" in element.tag]
    return sum(_number(element.text) for element in [*counts, *volatile.findall("double_bit/total")])


def _number(text: str | None) -> int:
    """Return `12 MiB` as 12, and 0 for a value that the GPU lacks."""
    word = (text or "").split()[:1]
    return int(word[0]) if word and word[0].isdigit() else 0
