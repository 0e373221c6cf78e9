"""This process's place among the ranks, under any launcher, and errors that reach every rank.

`deepspeed` and `torchrun` set RANK and similar variables. `srun` (one task per rank) sets SLURM_*. Plain `python` sets
nothing and is one rank. All four are mapped to the same environment variables.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from pretrain.distributed.rendezvous import Place, meet
from pretrain.distributed.signals import StopFlag
from pretrain.errors import MachineFault, SharedUserError, UserError

Result = TypeVar("Result")
T = TypeVar("T")

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WHO_SETS = "deepspeed, torchrun and srun set it; unset RANK, WORLD_SIZE and LOCAL_RANK to run alone."
_SCONTROL_S = 60.0
_LONGEST_NUMBER = 9  # digits, so that it is an int of C

_control_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run.

    Attributes:
        rank: its number among all ranks.
        local_rank: its number among the ranks of its node.
        world_size: the number of ranks.
        device: the device that it computes on.
        launched: whether a launcher that watches it has started it.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    launched: bool = False

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0


def rank_from_environment() -> int:
    """Return this process's rank before any process group exists; 0 where the environment holds no number."""
    return _number("RANK", "SLURM_PROCID")


def local_rank_from_environment() -> int:
    """Return this process's number on its node before any process group exists; 0 where the environment holds none."""
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def map_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher did not.

    Values that are set already stay, so those of torchrun or deepspeed inside a Slurm job win. Slurm's variables count
    only inside a job step (SLURM_STEP_ID): the batch shell has them too, and is not a rank.

    Raises:
        UserError: values that are no numbers, or contradict each other.
    """
    for name in _PLACE:
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]  # an empty variable counts as not set
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"RANK={os.environ['RANK']} is set and WORLD_SIZE is not. Set both, or unset RANK to run alone; deepspeed, "
            "torchrun and srun set them."
        )
    in_step = "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ
    slurm: Mapping[str, str] = os.environ if in_step else {}
    os.environ.setdefault("RANK", slurm.get("SLURM_PROCID", "0"))
    os.environ.setdefault("WORLD_SIZE", slurm.get("SLURM_NTASKS", "1"))
    os.environ.setdefault("LOCAL_RANK", slurm.get("SLURM_LOCALID", "0"))
    if "LOCAL_WORLD_SIZE" not in os.environ:
        tasks_here = slurm.get("SLURM_STEP_TASKS_PER_NODE", os.environ["WORLD_SIZE"])
        os.environ["LOCAL_WORLD_SIZE"] = tasks_here.split("(")[0].split(",")[0]
    if slurm and os.environ["WORLD_SIZE"] != "1":  # checked below
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _slurm_head_address(slurm)
        os.environ.setdefault("MASTER_PORT", str(_slurm_port(slurm)))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    _check_place()


def initialize(timeout_s: float | None = None, flag: StopFlag | None = None) -> Ranks:
    """Join the run's process group (NCCL on GPUs, gloo on CPU) and choose this rank's device and threads.

    Args:
        timeout_s: seconds to wait for the other ranks, and that a collective may take before the library gives it up. None:
            the library's own limit.
        flag: ends this process while it waits.

    Raises:
        UserError, MachineFault: as in `rendezvous.meet`.
    """
    global _control_group
    launched = "RANK" in os.environ or "SLURM_STEP_ID" in os.environ
    map_environment()
    store = meet(Place.from_environment(), timeout_s or default_pg_timeout.total_seconds(), flag)
    timeout: dict[str, Any] = {} if timeout_s is None else {"timeout": timedelta(seconds=timeout_s)}
    import deepspeed
    import deepspeed.ops

    if "OMP_NUM_THREADS" not in os.environ:
        # On GPUs too: offloaded states and the recorder's figures are computed on the host.
        torch.set_num_threads(cores_of_rank(int(os.environ["LOCAL_WORLD_SIZE"])))
    rank, world_size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        device = _bound_gpu(local_rank)
        torch.cuda.set_device(device)
        deepspeed.init_distributed(dist_backend="nccl", **timeout)
    else:
        device = torch.device("cpu")
        # DeepSpeed would compile a shared-memory collective here, which needs a C++ compiler and minutes. gloo needs
        # none (docs/development.md).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", **timeout)
    _control_group = dist.new_group(backend="gloo", **timeout)
    del store  # rank 0 has kept it open until the library had its own
    return Ranks(rank, local_rank, world_size, device, launched)


def control_group() -> dist.ProcessGroup | None:
    """Return the group of all ranks over gloo, for small CPU tensors between steps that need no wait for a GPU.

    Before `initialize` it is None, the default group.
    """
    return _control_group


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Return the result of `action`, called on each rank. Collective.

    Use it for work that may fail on some ranks only, such as reading files of one node: no rank is left waiting.

    Raises:
        SharedUserError, MachineFault: on every rank, if `action` raises a UserError or MachineFault on any. The message
            names the rank at fault.
    """
    result: Result | None = None
    failure: tuple[type[SharedUserError | MachineFault], str] | None = None
    try:
        result = action()
    except (UserError, MachineFault) as error:
        failure = (SharedUserError if isinstance(error, UserError) else MachineFault, str(error))
    failures = all_gather_object(failure)
    failed = {rank: theirs for rank, theirs in enumerate(failures) if theirs is not None}
    if failed:
        kind, message = next(iter(failed.values()))
        others = "" if len(failed) == len(failures) else f" (on rank {', '.join(map(str, failed))})"
        raise kind(message + others)
    return cast(Result, result)


def from_first_rank(action: Callable[[], Result]) -> Result:
    """Return rank 0's result of `action` on every rank. Collective. Nodes may see different contents of a folder.

    Raises:
        SharedUserError, MachineFault: on every rank, if `action` raises a UserError or MachineFault on rank 0.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    result: Result | None = on_every_rank(action if first else lambda: None)
    return cast(Result, all_gather_object(result)[0])


def all_gather_object(value: T) -> list[T]:
    """Return the `value` of every rank, in rank order. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def cores_of_rank(ranks_here: int) -> int:
    """Return how many cores each of the `ranks_here` ranks of this node may use: its share, or those it is bound to.

    A launcher that binds each rank to cores of its own leaves a process no more than its share. Where a process may use more,
    it shares them with the other ranks.
    """
    total, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    return usable if usable <= total // ranks_here else max(1, usable // ranks_here)


def _bound_gpu(local_rank: int) -> torch.device:
    """Return the GPU of this rank: the only one where the launcher binds one per task, else the one of its number."""
    visible = torch.cuda.device_count()
    if visible == 1:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed chooses its device by it
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"rank {os.environ['RANK']} is number {local_rank} on {socket.gethostname()}, which shows it {visible} GPUs. "
            "Start no more ranks on a node than it has GPUs."
        )
    return torch.device("cuda", local_rank)


def _slurm_head_address(slurm: Mapping[str, str]) -> str:
    """Return the address of the job's first node, from the node record: node names need not resolve everywhere."""
    nodes = slurm.get("SLURM_STEP_NODELIST", slurm.get("SLURM_JOB_NODELIST", ""))
    try:
        head = _scontrol("show", "hostnames", nodes).split()[0]
        record = _scontrol("show", "node", "-o", head)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"cannot find the address of the first node of '{nodes}' with scontrol ({error}). "
            "Export MASTER_ADDR and MASTER_PORT in the job script."
        ) from error
    fields = dict(pair.split("=", 1) for pair in record.split() if "=" in pair)
    return fields.get("NodeAddr", head)


def _slurm_port(slurm: Mapping[str, str]) -> int:
    """Return a port for the job, and another when Slurm starts it again, as slurm/job.sh chooses them."""
    return 20000 + (int(slurm["SLURM_JOB_ID"]) + 1009 * int(slurm.get("SLURM_RESTART_COUNT", "0"))) % 10000


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=_SCONTROL_S).stdout


def _number(*names: str) -> int:
    """Return the first of these variables that is set, as a number; 0 if it is none."""
    text = next((os.environ[name] for name in names if os.environ.get(name)), "0")
    return int(text) if text.isdecimal() else 0


def _check_place() -> None:
    """Raise UserError unless the variables of this rank's place are consistent numbers."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not (os.environ[name].isascii() and os.environ[name].isdecimal()):
            raise UserError(f"{name}={os.environ[name]} is no whole number. {_WHO_SETS}")
        if len(os.environ[name]) > _LONGEST_NUMBER:
            raise UserError(f"{name}={os.environ[name]} is no number of ranks or ports. {_WHO_SETS}")
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if not int(os.environ[name]):
            raise UserError(f"{name}=0: a run, and each of its nodes, has at least one rank. {_WHO_SETS}")
    if rank >= world_size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world_size}: ranks are 0 to {world_size - 1}. {_WHO_SETS}")
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is no port: choose one from 1024 to 65535.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
