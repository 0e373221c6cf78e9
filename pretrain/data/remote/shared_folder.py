"""The cache folder that all processes of a node share: it records the files in use, and evicts others to make room.

A whole and checked file is named by its content's checksum (32 hexadecimal digits). `<checksum>.part` is one that is
being fetched, of the size that it will have, so that its room is taken. `*.claims` lists the files that one reader uses
and wants. All input of a decision is read and changed under one lock, `.lock`, which is held for milliseconds. Locks are
flocks, so a process that dies loses them, and with them its claims and parts. Files of other names are left alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.files import NO_LOCKS

SAY_AFTER_S = 30.0
_NEVER = float("inf")
_WHOLE = re.compile(r"[0-9a-f]{32}")
_ABANDONED_S = 86400  # a file of this age counts as abandoned where there are no locks
_PROCESS = f"{os.getpid()}-{secrets.token_hex(4)}"  # process ids alone may be those of another container

log = logging.getLogger("evenkeel")


@dataclass
class Claims:
    """The files that readers need, by checksum.

    Attributes:
        used: Those in use, which are never evicted.
        used_here: Those that this process uses.
        wanted: Those that are needed soon, with their place in the order (0: first).
    """

    used: set[str]
    used_here: set[str]
    wanted: dict[str, int]


class SharedFolder:
    """One reader's view of the folder; any number of them, in any number of processes, may be open.

    The limit holds for all whole files and parts in the folder together. On a file system without locks, a file may be
    fetched twice, two processes may take the same room, and the claims and parts of a killed one are kept for a day.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.limit_bytes = limit_bytes
        name = f"{_PROCESS}-{secrets.token_hex(4)}"
        with self._locked():  # or it would be taken for an abandoned one
            self._claims = open(folder / f"{name}.claims", "wb", buffering=0)  # noqa: SIM115 - its lock is held until this reader is gone
            _lock(self._claims.fileno(), fcntl.LOCK_EX)
        weakref.finalize(self, self._claims.close)
        self._claimed = b""
        self._unlocked_part = f"{name}.part"

    def path(self, key: str) -> Path:
        return self.folder / key

    def claim(self, used: Iterable[str], wanted: Sequence[str]) -> None:
        """Replace the files that this reader uses, which stay, and those that it wants next, in order."""
        claims = json.dumps({"process": _PROCESS, "used": sorted(used), "wanted": list(wanted)}).encode()
        with self._locked():
            claims = claims.ljust(len(self._claimed))  # never cut: earlier claims can always be written again
            if os.pwrite(self._claims.fileno(), claims, 0) < len(claims):
                self._claims.truncate(os.pwrite(self._claims.fileno(), self._claimed, 0))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._claimed = claims

    def touch(self, key: str) -> None:
        """Record a use of `key`: the access time, which is set only here, orders the evictions."""
        with suppress(FileNotFoundError, PermissionError):  # gone, or another user's
            path = self.path(key)
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    @contextmanager
    def part(self, key: str) -> Iterator[BinaryIO]:
        """Yield an empty file to fetch `key` into, for this thread alone: others wait here.

        It is removed at the end unless it was kept.
        """
        path = self.folder / f"{key}.part"
        while True:
            file = open(path, "r+b", opener=_create)  # noqa: SIM115
            if not _lock_patiently(file.fileno(), path):
                file.close()
                path = self.folder / f"{key}.{self._unlocked_part}"
                file = open(path, "w+b")  # noqa: SIM115
            if _is_at(file, path):
                break
            file.close()  # its holder has kept or removed it meanwhile
        with file:
            try:
                file.truncate(0)
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()

    def reserve(self, part: BinaryIO, key: str, size_bytes: int, *, urgent: bool) -> bool:
        """Give the part of `key` its final size, after evicting other files; return False, and do nothing, without room.

        Files in use stay. Unless this is urgent, so do files that any reader wants as soon as `key` or sooner. Files that
        no reader wants are evicted first, least recently used first, then those that are needed last.
        """
        with self._locked():
            claims = self._all_claims()
            files = self._whole_files()
            excess = sum(size for size, _ in files.values()) + self._parts_bytes() + size_bytes - self.limit_bytes
            needed_in = {each: claims.wanted.get(each, _NEVER) for each in (key, *files)}
            victims = []
            for other in sorted(files, key=lambda other: (-needed_in[other], files[other][1])):
                if excess <= 0:
                    break
                if other not in claims.used and (urgent or needed_in[other] > needed_in[key]):
                    victims.append(other)
                    excess -= files[other][0]
            if excess > 0:
                return False
            for victim in victims:
                self.path(victim).unlink(missing_ok=True)  # a process that found it damaged may have removed it
            part.truncate(size_bytes)
            return True

    def keep(self, part: BinaryIO, key: str) -> None:
        """Give `part`, which is whole and checked, its name."""
        part.flush()
        with self._locked():  # or a process that adds up the folder might see it under neither name
            os.replace(part.name, self.path(key))

    def claims(self) -> Claims:
        """Return the claims of all living readers together."""
        with self._locked():
            return self._all_claims()

    def _all_claims(self) -> Claims:
        together = Claims(set(), set(), {})
        for path in self.folder.glob("*.claims"):
            if path.name != os.path.basename(self._claims.name) and _is_abandoned(path):
                path.unlink(missing_ok=True)
            elif text := path.read_bytes():
                claims = json.loads(text)
                together.used.update(claims["used"])
                if claims["process"] == _PROCESS:
                    together.used_here.update(claims["used"])
                for place, key in enumerate(claims["wanted"]):
                    together.wanted[key] = min(place, together.wanted.get(key, place))
        return together

    def _whole_files(self) -> dict[str, tuple[int, int]]:
        """Return bytes and time of last use (ns) of each whole file, by checksum."""
        files: dict[str, tuple[int, int]] = {}
        for key in filter(_WHOLE.fullmatch, os.listdir(self.folder)):
            with suppress(FileNotFoundError):  # a process that found it damaged has removed it
                stat = self.path(key).stat()
                files[key] = (stat.st_size, stat.st_atime_ns)
        return files

    def _parts_bytes(self) -> int:
        """Return the bytes that parts reserve; remove parts of processes that are gone."""
        total = 0
        for path in self.folder.glob("*.part"):
            with suppress(FileNotFoundError):  # renamed or given up meanwhile
                if _is_abandoned(path):
                    path.unlink()
                else:
                    total += path.stat().st_size
        return total

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "a", encoding="utf-8") as file:
            _lock(file.fileno(), fcntl.LOCK_EX)
            yield


def _lock(descriptor: int, operation: int) -> bool:
    """Call flock; return False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _lock_patiently(descriptor: int, path: Path) -> bool:
    """Return `_lock` for this thread alone; log a wait that is longer than most fetches."""
    began, logged = time.monotonic(), False
    while True:
        try:
            return _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not logged and time.monotonic() - began > SAY_AFTER_S:
                logged = True
                log.warning(f"waiting for another process, which has been fetching {path} for {SAY_AFTER_S:.0f} s")
            time.sleep(0.05)


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _is_abandoned(path: Path) -> bool:
    """Return whether the process that holds this file's lock is gone."""
    with open(path, "rb+") as file:
        try:
            if _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                return True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            return False
        return time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED_S


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
