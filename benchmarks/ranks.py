"""Starts the ranks of a measurement on this machine and collects what the first of them prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from pretrain.processes import own_package


def run_ranks(module: str, argument: Any, ranks: int) -> list[dict[str, Any]]:
    """The JSON objects that `python -m module ARGUMENT` prints, started as `ranks` processes that share the cores.

    argument: whatever JSON can hold. Raises RuntimeError if a rank fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", module, json.dumps(argument)]
    environment = {**os.environ, **own_package(), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"the ranks failed:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
