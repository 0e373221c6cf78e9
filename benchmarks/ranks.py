"""Start the ranks of a measurement on this machine and collect what the first of them prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from pretrain.processes import own_package


def run_ranks(module: str, argument: Any, ranks: int) -> list[dict[str, Any]]:
    """Start `python -m module ARGUMENT` on ranks that share the cores, and return the JSON objects that they print.

    Args:
        module: The module to run.
        argument: Any value that JSON can hold.
        ranks: How many processes to start.

    Raises:
        RuntimeError: If a rank fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", module, json.dumps(argument)]
    environment = {**os.environ, **own_package(), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"the ranks failed:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
