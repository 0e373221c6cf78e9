"""A separate Slurm on the loopback: one controller and "nodes" that are slurmd processes on this host. Needs no root.

    slurm = MiniSlurm(folder); slurm.start(); slurm.stop()

auth/none trusts every local process: for tests only. Waiting times are cut to seconds; otherwise a job sees what it would
see on a cluster.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support.runs import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("gpu1", "bignode-7")  # as on clusters that have grown
PATIENCE_S = 450
_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"  # where Debian has the daemons
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")


def missing() -> str | None:
    """Return why there can be no Slurm here, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if absent:
        return (
            f"Slurm is not installed (no {', '.join(absent)}): "
            "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client"
        )
    return None


class MiniSlurm:
    """Two nodes of four cores, which need not exist; a partition `train`, and `urgent`, whose jobs preempt its nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        for name in ("state", "log", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "slurm.conf").write_text(_configuration(self.folder))
        version = self.run("sinfo", "--version").split()[1]
        if int(version.split(".")[0]) >= 24:  # it probes cgroups even where it uses none
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self._spawn("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "the nodes to come up", 60)

    def stop(self) -> None:
        self.run("scancel", "--full", "--user", getpass.getuser(), check=False)
        for node in NODES:
            if node in self._daemons:
                self.kill_node(node)
        for process in self._daemons.values():
            process.terminate()
            process.wait(30)

    def start_node(self, node: str) -> None:
        self._spawn("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Let a node fail as in a power cut: SIGKILL to its slurmd and to all its descendants."""
        doomed = [self._daemons[node].pid, *_descendants(self._daemons[node].pid)]
        doomed += [pid for pid in _stepds(node, self.folder) for pid in (pid, *_descendants(pid))]
        for pid in dict.fromkeys(doomed):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemons.pop(node).wait()

    def submit(self, *words: str | Path, cwd: Path, **variables: str) -> str:
        """Run sbatch and return the job's number."""
        command = ["sbatch", "--parsable", *map(str, words)]
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | variables, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.environment, text=True, capture_output=True, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        return dict(re.findall(r"(?:^| )(\w[\w/:]*)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def node_states(self) -> dict[str, str]:
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-p", "train", "-o", "%N %T").splitlines())

    def over(self, number: str) -> bool:
        """Return whether the job is neither running nor queued."""
        return self.job(number)["JobState"] in _OVER

    def wait_over(self, number: str) -> dict[str, str]:
        """Wait for the job's end and return its last record."""
        self.wait_for(lambda: self.over(number), f"the end of job {number}")
        return self.job(number)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}\n{self.run('squeue', '-l')}"
            time.sleep(0.1)

    def _spawn(self, program: str, *options: str) -> None:
        name = options[-1] if program == "slurmd" else program
        log = open(self.folder / "log" / f"{name}.txt", "a", encoding="utf-8")  # noqa: SIM115 (the daemon keeps it)
        self._daemons[name] = subprocess.Popen(
            [program, "-D", *options], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )


def _descendants(pid: int) -> list[int]:
    return [pid for child in _pgrep("-P", str(pid)) for pid in (child, *_descendants(child))]


def _stepds(node: str, folder: Path) -> list[int]:
    """Return the slurmstepd processes of `node`: not children of its slurmd, but holders of its spool folder's sockets."""
    spool = str(folder / "spool" / node)
    listening = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
    inodes = {line.split()[6] for line in listening if line.split()[-1].startswith(spool)}
    return [pid for pid in _pgrep("-u", getpass.getuser(), "-x", "slurmstepd") if inodes & _sockets(pid)]


def _pgrep(*options: str) -> list[int]:
    found = subprocess.run(["pgrep", *options], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in found.split()]


def _sockets(pid: int) -> set[str]:
    """Return the inodes of the sockets that a process holds; none if it has just ended."""
    links = []
    with suppress(OSError):
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def _configuration(folder: Path) -> str:
    names = ",".join(NODES)
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=8000 State=UNKNOWN"
        for node in NODES
    )
    return f"""\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=15
KillWait=20
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
{nodes}
PartitionName=train Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
