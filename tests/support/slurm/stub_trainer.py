"""A stand-in for pretrain/train.py that "trains" until it is signalled, or ends as its run's name says. Loads no library."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

rank = os.environ["SLURM_PROCID"]
text = Path(sys.argv[sys.argv.index("--config") + 1]).read_text(encoding="utf-8")
out, name = (re.findall(rf"^{key}: '?(.*?)'?$", text, re.MULTILINE)[0] for key in ("out", "name"))
run = Path(out) / name
caught: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda signalled, _: caught.append(signalled))


def end(code: int, status: str | None = None, message: str = "") -> None:
    if status and rank == "0":
        (run / "status.json").write_text(json.dumps({"status": status, "step": 8, "reason": message}))
    print(message, flush=True)
    os._exit(code)


with open(run / "starts.txt", "a", encoding="utf-8") as starts:
    starts.write(f"{os.environ.get('SLURM_RESTART_COUNT', '0')} {os.environ['SLURMD_NODENAME']} {rank}\n")
if name == "crashes":
    end(1, message=f"Segmentation of rank {rank}")
if name == "diverges":
    end(4, "failed", "the loss is not finite")
if name == "refused":
    time.sleep(0 if rank == "0" else 3)
    end(2, message="error: there is no token shard in data/none")
if name.startswith("quick") or (name == "chained" and len((run / "starts.txt").read_text().splitlines()) == 2):
    end(0, "finished", "all steps done")
while not caught:
    time.sleep(0.05)
time.sleep(1)
end(0, "preempted", "stopped after saving")
