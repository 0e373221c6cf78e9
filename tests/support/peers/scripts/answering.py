"""The command line of a peer: `python ask_X.py JOB.json ANSWERS.json` answers for every folder of the job, in one process.

An answer is a dictionary, or {"error": ...} where the peer raised. Arrays lie beside the answers and are named in them.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def answer(one: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Call `one(folder, job)` for each folder of the job and write its result, or the exception."""
    job, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    answers = {}
    for name, folder in job["folders"].items():
        try:
            answers[name] = _without_arrays(one(folder, job | {"name": name}), out, name)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
        out.write_text(json.dumps(answers), encoding="utf-8")


def _without_arrays(found: dict[str, Any], out: Path, name: str) -> dict[str, Any]:
    """Write the arrays of an answer to files and put their names in their place."""
    for key, value in found.items():
        if isinstance(value, np.ndarray):
            file = out.with_name(f"{out.stem}.{name}.{key}.npy")
            np.save(file, value)
            found[key] = str(file)
    return found
