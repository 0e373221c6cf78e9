"""The meeting of a run's ranks, before any library connects them.

The communication library would wait without a message and without reacting to signals, and its errors name sockets. So the
ranks meet here first, at the store that the library uses afterwards: rank 0's (or the one of torchrun's agent) at
MASTER_ADDR:MASTER_PORT. Each rank puts its record there. Rank 0 ends the waiting with a verdict for all, as does a rank that
is stopped or finds a contradiction. The store is polled at short intervals, so a signal acts at once. The missing ranks are
named at growing intervals.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch.distributed as dist

from pretrain.distributed.launcher import launcher
from pretrain.distributed.rank_names import spans
from pretrain.distributed.signals import StopFlag, stop_before_start
from pretrain.errors import MachineFault, SharedUserError, UserError, first_line

LOOK_EVERY_S = 0.1
FIRST_MESSAGE_S = 3.0  # doubles from one message to the next
NAME_PATIENCE_S = 5.0  # the name of a machine that is just starting may become known
PORT_PATIENCE_S = 5.0  # a rank 0 that has just been killed may still hold its port
REACH_S = 5.0  # of one attempt to reach rank 0
_LINGER_S = 1.0  # the rank that has the store stays this long, so that the others can read the verdict
_VERDICT, _SIZE = "verdict", "world size"


@dataclass(frozen=True)
class Place:
    """A rank's place in the run, and where the ranks meet.

    Attributes:
        rank, world_size: this rank's number, and the number of ranks.
        address, port: of the store.
        hosted: whether the store is the launcher's, and rank 0 only a client.
        attempt: how often the launcher has started all ranks again.
        reports: whether this rank reports that it cannot reach the store. A launcher's ranks of one node would all report
            the same.
    """

    rank: int
    world_size: int
    address: str
    port: int
    hosted: bool
    attempt: str = "0"
    reports: bool = True

    @classmethod
    def from_environment(cls) -> Place:
        """Return the place from the variables that `map_environment` has checked and completed."""
        given = os.environ
        return cls(
            int(given["RANK"]),
            int(given["WORLD_SIZE"]),
            given["MASTER_ADDR"],
            int(given["MASTER_PORT"]),
            given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            given.get("TORCHELASTIC_RESTART_COUNT", "0"),
            launcher() is None or given["LOCAL_RANK"] == "0",
        )

    @property
    def where(self) -> str:
        """Return address and port of the store."""
        return f"{self.address}:{self.port}"

    @property
    def name(self) -> str:
        """Return the name of this rank in messages."""
        return f"rank {self.rank} of {self.world_size}"

    @property
    def serves(self) -> bool:
        """Return whether this rank has the store."""
        return self.rank == 0 and not self.hosted


def meet(place: Place, limit_s: float, flag: StopFlag | None = None) -> dist.Store:
    """Wait until all ranks have come, and return the store, which must be kept until the process group is made.

    A signal that `flag` has caught ends this process with 128 + its number, and the others where they can be reached.

    Args:
        place: this rank's place.
        limit_s: seconds to wait.
        flag: the flag that signals set; None: signals have their usual effect.

    Raises:
        UserError: the variables are wrong or contradict each other; SharedUserError where another rank has found it.
        MachineFault: ranks have not come within `limit_s`, or rank 0 has left.
    """
    waiting = _Waiting(place, limit_s, flag)
    _resolve(place, waiting)
    store = _serve(place, waiting) if place.serves else _reach(place, waiting)
    _Meeting(place, dist.PrefixStore(f"evenkeel/{place.attempt}", store), waiting).hold()
    return store


class _Waiting:
    """The waiting of one rank: its limit, and messages at growing intervals."""

    def __init__(self, place: Place, limit_s: float, flag: StopFlag | None) -> None:
        self._place, self._limit_s, self._flag = place, limit_s, flag
        self._began = time.monotonic()
        self._next_message_s = FIRST_MESSAGE_S

    @property
    def seconds(self) -> float:
        """Return the seconds since the waiting began."""
        return time.monotonic() - self._began

    @property
    def signal(self) -> int:
        """Return the number of the signal that has come; 0 if none has."""
        return self._flag.received if self._flag else 0

    def alone(self, awaited: Callable[[], str | None]) -> None:
        """Do as `look`, while no other rank is connected that a signal would have to reach too."""
        if self.signal:
            stop_before_start(self.signal)
        self.look(awaited)

    def look(self, awaited: Callable[[], str | None]) -> None:
        """Pause once, print a message when one is due, and raise MachineFault after the limit.

        Args:
            awaited: returns the missing ranks in words; None if another rank reports them.
        """
        if self.seconds > self._limit_s:
            raise MachineFault(
                f"{self._place.name} waited {self.seconds:.0f} s at {self._place.where} for {awaited() or 'the other ranks'}, "
                f"in vain. Look for ranks that have not started, and at firewalls between the nodes{_hint(self._place)}."
            )
        if self.seconds > self._next_message_s:
            self._next_message_s *= 2
            if missing := awaited():
                so_far = f"{self.seconds:.0f} s so far, {self._limit_s:,.0f} s at most"
                print(
                    f"{self._place.name} waits at {self._place.where} for {missing} ({so_far}){_hint(self._place)}",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(LOOK_EVERY_S)


class _Meeting:
    """The exchange of the ranks in the store."""

    def __init__(self, place: Place, store: dist.Store, waiting: _Waiting) -> None:
        self._place, self._store, self._waiting = place, store, waiting

    def hold(self) -> None:
        """Register this rank, and wait for the verdict."""
        try:
            self._arrive()
            while (verdict := self._verdict()) is None:
                if self._waiting.signal:
                    self._conclude(signal=self._waiting.signal)
                elif self._place.rank == 0 and self._all_here():
                    self._conclude(met=True)
                else:
                    self._waiting.look(self._awaited)
        except dist.DistError as error:
            gone = "the launcher" if self._place.hosted else "rank 0"
            raise MachineFault(
                f"{self._place.name} lost {gone} at {self._place.where} before all ranks had met ({first_line(error)})"
            ) from error
        self._obey(verdict)

    def _arrive(self) -> None:
        me = {"host": socket.gethostname(), "process": os.getpid()}
        size = self._once(_SIZE, [self._place.world_size, self._place.rank])
        if size[0] != self._place.world_size:
            self._refuse(
                f"rank {self._place.rank} ({_who(me)}) was started with WORLD_SIZE={self._place.world_size}, but rank "
                f"{size[1]} with WORLD_SIZE={size[0]}. Start all ranks with the same."
            )
        holder = self._once(self._key(self._place.rank), me)
        if holder != me and _is_gone(holder):
            self._store.set(self._key(self._place.rank), json.dumps(me))
        elif holder != me:
            self._refuse(
                f"two processes were started as RANK={self._place.rank}: {_who(holder)} and {_who(me)}. Give each "
                f"process a RANK of its own, from 0 to {self._place.world_size - 1}."
            )

    def _once(self, key: str, value: Any) -> Any:
        """Return `value` if no other has been put there before, else that one."""
        return json.loads(self._store.compare_set(key, "", json.dumps(value)))

    def _key(self, rank: int) -> str:
        return f"rank {rank}"

    def _is_here(self, rank: int) -> bool:
        return self._store.check([self._key(rank)])

    def _all_here(self) -> bool:
        return self._store.check([self._key(rank) for rank in range(self._place.world_size)])

    def _awaited(self) -> str | None:
        """Return the missing ranks in words. The lowest rank that has come reports for all; the others return None."""
        if any(map(self._is_here, range(self._place.rank))):
            return None
        return _ranks([rank for rank in range(self._place.world_size) if not self._is_here(rank)])

    def _verdict(self) -> dict | None:
        return json.loads(self._store.get(_VERDICT)) if self._store.check([_VERDICT]) else None

    def _conclude(self, **verdict: Any) -> None:
        self._once(_VERDICT, verdict | {"rank": self._place.rank})

    def _refuse(self, message: str) -> None:
        self._conclude(refusal=message)

    def _obey(self, verdict: dict) -> None:
        if verdict.get("met"):
            return
        mine = verdict["rank"] == self._place.rank
        if self._place.serves:
            time.sleep(_LINGER_S)
        if number := verdict.get("signal"):
            stop_before_start(number, "" if mine else f" at rank {verdict['rank']}")
        raise (UserError if mine else SharedUserError)(verdict["refusal"])


def _resolve(place: Place, waiting: _Waiting) -> None:
    while True:
        try:
            socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            if waiting.seconds > NAME_PATIENCE_S:
                raise UserError(
                    f"MASTER_ADDR={place.address} is unknown on {socket.gethostname()} ({error.strerror}). Set it to the "
                    "address of the machine of rank 0, or to a name that every machine of the run can resolve."
                ) from error
        waiting.alone(lambda: None)


def _serve(place: Place, waiting: _Waiting) -> dist.Store:
    """Return the store of rank 0, which this process opens."""
    while True:
        try:
            store = _store(place, "127.0.0.1", is_master=True)
            break
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise UserError(
                    f"rank 0 cannot listen at port {place.port} (MASTER_PORT) of {socket.gethostname()}: {first_line(error)}. "
                    "Choose another MASTER_PORT."
                ) from error
            if waiting.seconds > PORT_PATIENCE_S:
                raise _taken(place) from error
        waiting.alone(lambda: None)
    if not _is_here(place.address) and not _leads_here(place, store):
        raise UserError(
            f"MASTER_ADDR={place.address} is no address of {socket.gethostname()}, where rank 0 runs. Set it to one that "
            "every machine of the run can reach."
        )
    return store


def _reach(place: Place, waiting: _Waiting) -> dist.Store:
    """Return the store of rank 0 or of the launcher, once it is there."""
    whose = "the launcher" if place.hosted else "rank 0"
    while True:
        found: list[dist.Store] = []
        trouble = _trouble(place)
        if trouble is None:
            # In a thread: the listener may be no store, and then the library waits for its first byte for ever.
            attempt = threading.Thread(target=_try, args=(place, found), daemon=True)
            attempt.start()
            since = waiting.seconds
            while attempt.is_alive() and waiting.seconds - since < REACH_S:
                attempt.join(LOOK_EVERY_S)
                if waiting.signal:
                    break
            if found:
                return found[0]
            trouble = "what listens there does not answer as a store does"
        waiting.alone(partial(_report, place, f"{whose}: {trouble}"))


def _report(place: Place, awaited: str) -> str | None:
    return awaited if place.reports else None


def _trouble(place: Place) -> str | None:
    """Return the reason why nothing can be reached at the place; None if something listens there."""
    try:
        socket.create_connection((place.address, place.port), timeout=REACH_S).close()
    except ConnectionRefusedError:
        return "nothing listens there yet"
    except TimeoutError:
        return "no answer (a firewall?)"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _try(place: Place, found: list[dist.Store]) -> None:
    with suppress(RuntimeError):  # the next attempt reports it
        found.append(_store(place, place.address, is_master=False))


def _store(place: Place, host: str, *, is_master: bool) -> dist.TCPStore:
    # multi_tenant: the process group makes its own store at the same port of this process.
    return dist.TCPStore(
        host,
        place.port,
        place.world_size,
        is_master,
        timeout=timedelta(seconds=REACH_S),
        wait_for_workers=False,
        multi_tenant=not place.hosted,
    )


def _taken(place: Place) -> Exception:
    """Return the error for a port in use. In a Slurm job the next start takes another; elsewhere a person must choose."""
    message = f"port {place.port} of {socket.gethostname()}, where the ranks are to meet, {_holder(place.port)}. "
    if "SLURM_STEP_ID" in os.environ:
        return MachineFault(message + "The job takes another when it starts again.")
    return UserError(
        message
        + "End that process, or choose another port: MASTER_PORT=... (deepspeed --master_port, torchrun --master-port)."
    )


def _holder(port: int) -> str:
    """Return 'is in use by process N (COMMAND)', as far as the system shows it."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                command = " ".join(" ".join(psutil.Process(connection.pid).cmdline()).split())[:80]
                return f"is in use by process {connection.pid} ({command})"
    return "is in use by another process"


def _is_here(address: str) -> bool:
    """Return whether the name or number `address` stands for an address of this machine."""
    for family, kind, protocol, _, socket_address in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(socket_address)
            return True
    return False


def _leads_here(place: Place, store: dist.Store) -> bool:
    """Return whether the address, though not this machine's, forwards connections to `store`."""
    token = os.urandom(8).hex()
    found: list[dist.Store] = []
    store.set("token", token)
    if _trouble(place) is None:
        attempt = threading.Thread(target=_try, args=(place, found), daemon=True)
        attempt.start()
        attempt.join(REACH_S)
    return bool(found) and found[0].check(["token"]) and found[0].get("token").decode() == token


def _is_gone(record: dict) -> bool:
    """Return whether the process of `record` ran here and has ended: the launcher has started its rank again."""
    if record["host"] != socket.gethostname():
        return False
    return record["process"] == os.getpid() or not psutil.pid_exists(record["process"])


def _who(record: dict) -> str:
    return f"process {record['process']} on {record['host']}"


def _ranks(ranks: Sequence[int]) -> str:
    """Return 'rank 1', or 'ranks 1-7, 12', at most 20 spans."""
    noun, named = "ranks" if len(ranks) > 1 else "rank", spans(ranks)
    more = " ..." if len(named) > 20 else ""
    return f"{noun} {', '.join(named[:20])}{more}"


def _hint(place: Place) -> str:
    """Return advice where no launcher seems to have set the variables: they are probably left over."""
    if place.world_size == 1 or launcher() is not None:
        return ""
    return f"; WORLD_SIZE={place.world_size} comes from the environment: unset it to run alone"
