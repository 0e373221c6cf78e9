"""A rank that trains runs, one after another, each in a child process of its own.

Its argument is a JSON file {name: case}. Each case is {"config", "ports", "resume_at", "plant"}: the content of a run file,
the ports of its rendezvous and of the second run's, the step from whose checkpoint a second run starts or null, and the
name of a fault of `tests.fakecuda.faults` that is planted before or null. The output of a case goes to
<run folder>.<rank>.log. The libraries are loaded once, and a case that fails leaves nothing behind for the next one.
"""

import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

from pretrain import quiet  # noqa: F401
from pretrain.config.schema import Config
from pretrain.distributed.ranks import initialize
from tests.fakecuda import faults
from tests.support.faults import replace
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import leave
from tests.support.workers.registry_worker import resumed, run

# Imported once, before the first case.
LIBRARIES = ("pretrain.train", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
LIMIT_S = 200.0  # a case that takes longer hangs


def main(path: Path) -> None:
    """Run all cases."""
    for name, case in json.loads(path.read_text(encoding="utf-8")).items():
        for number, port in enumerate(case["ports"]):
            child = os.fork()
            if child == 0:
                be_rank(name, case, port, resume=number > 0)
            os.waitpid(child, 0)


def be_rank(name: str, case: dict[str, Any], port: int, resume: bool) -> NoReturn:
    """Be a rank of one case, or of the run that resumes it."""
    folder = Path(case["config"]["out"]) / name
    log = os.open(f"{folder}.{os.environ['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    os.environ["MASTER_PORT"] = str(port)
    try:
        train(case, resume)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    leave()


def train(case: dict[str, Any], resume: bool) -> None:
    """Train. `finished` in the output says that all went well."""
    if case["plant"] is not None:
        faults.FAULTS[case["plant"]]()
    config = Config.model_validate(case["config"])
    ranks = initialize()
    run(resumed(config, case["resume_at"], ranks) if resume else config, ranks)
    print("finished", flush=True)


def compute_as_the_device_does() -> None:
    """Let a CPU use the kernels that run on the fake device: its own round differently, and bf16 makes more of that."""
    torch.backends.cuda.enable_flash_sdp(False)  # attention
    start = torch.optim.AdamW.__init__

    def start_fused(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **{**options, "fused": True})

    replace(torch.optim.AdamW, "__init__", start_fused)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        compute_as_the_device_does()
        allow_fp16_on_cpu()
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    main(Path(sys.argv[1]))
