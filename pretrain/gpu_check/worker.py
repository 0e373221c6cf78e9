"""The process of one stage: loads the libraries, waits for its order, and writes what it finds to standard output.

It is started while the stage before it runs, so that loading costs no time. It does not touch the GPU before its order.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Read one line of JSON from standard input, run the stage that it names, and end."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print goes where errors go
    import_module("deepspeed")
    stage_module = import_module("pretrain.gpu_check.stage")
    for module in ("correctness", "speed"):
        import_module(f"pretrain.gpu_check.{module}")
    line = sys.stdin.readline()
    if not line:
        return  # the check has ended before this stage
    order = json.loads(line)

    def say(case: str, passed: bool | None, note: str = "", **values: Any) -> None:
        results.write(json.dumps({"case": case, "passed": passed, "note": note, **values}) + "\n")

    module, function = order["run"].split(":")
    stage = stage_module.Stage(Path(order["folder"]), order["quick"], say)
    getattr(import_module(f"pretrain.gpu_check.{module}"), function)(stage, **order["arguments"])
    results.flush()
    sys.stderr.flush()
    os._exit(0)  # without the teardown of process groups and engines, which has nothing to add


if __name__ == "__main__":
    main()
