"""Access to the files of a remote corpus through a cache folder that all processes of a node share."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from pretrain.data.remote.shared_folder import SharedFolder
from pretrain.data.remote.storage import Storage
from pretrain.errors import UserError
from pretrain.files import checksum

FETCHES_OF_A_CORRUPT_FILE = 3
ROOM_WAIT_S = 300.0  # how long `path` waits for other processes to release files
ROOM_POLL_S = 1.0
SAY_AFTER_S = 5.0

log = logging.getLogger("evenkeel")


@dataclass(frozen=True)
class CacheSettings:
    """The settings of a cache.

    Attributes:
        folder: The folder, which the processes of a node share, and runs too.
        limit_bytes: The size of the whole folder, which is never exceeded.
        downloads: The number of files of a corpus that are fetched ahead at a time.
    """

    folder: Path
    limit_bytes: int
    downloads: int = 4


class CachedFiles:
    """`CorpusFiles` of a URL, with the sizes and checksums that its manifest gives.

    A file is in the cache whole and checked or not at all, and found there by its checksum. So it may come from another
    URL or run, and a corpus that changes at its URL is another corpus. One process of a node fetches a file, others wait
    for it. `path` fetches in the calling thread, independently of the threads that fetch ahead. It may evict files that
    these have fetched; they evict nothing that any process needs as soon or sooner.
    """

    def __init__(self, location: str, expected: dict[str, tuple[int, str]], settings: CacheSettings) -> None:
        """Open the cache.

        Args:
            location: The URL of the corpus.
            expected: (bytes, XXH3-128 in hexadecimal) of each file, by name.
            settings: The settings of the cache.

        Raises:
            UserError: The URL or the cache folder cannot be used.
        """
        self._storage = Storage(location)
        self._expected = expected
        self._settings = settings
        with self._explained():
            self._folder = SharedFolder(settings.folder, settings.limit_bytes)
        self._intact: dict[
            str, tuple[int, int]
        ] = {}  # inode and time of the files that this process verified, by checksum
        self._changed = threading.Condition()  # guards what follows
        self._used: dict[str, str] = {}  # checksums by name
        self._ahead: list[str] = []
        self._underway: set[str] = set()
        self._failed: set[str] = set()
        self._full_until = 0.0
        self._threads = 0

    def path(self, name: str) -> Path:
        """Return the file in the cache, where it stays until `release`.

        Raises:
            UserError: The file cannot be fetched or comes damaged each time, or the cache has no room for it. That is
                raised at once if it never will (the file is larger than the limit, or this process uses the rest),
                else after ROOM_WAIT_S.
        """
        size_bytes, key = self._expected[name]
        with self._explained():
            try:
                with self._changed:
                    self._used[name] = key
                    self._claim()
                began, logged = time.monotonic(), False
                while not self._fetch(name, urgent=True):
                    waited_s = time.monotonic() - began
                    self._check_room(name, size_bytes, waited_s > ROOM_WAIT_S)
                    if not logged and waited_s > SAY_AFTER_S:
                        logged = True
                        log.warning(
                            f"waiting for room in the cache {self._settings.folder}, which other processes use, for "
                            f"{self._storage.location}/{name} ({ROOM_WAIT_S:.0f} s at most)"
                        )
                    time.sleep(0.1)
            except BaseException:
                self.release(name)
                raise
            self._folder.touch(key)
            self._failed.discard(name)
        return self._folder.path(key)

    def release(self, name: str) -> None:
        """Allow the cache to evict the file."""
        with self._changed:
            if key := self._used.pop(name, None):
                self._folder.touch(key)
                self._claim()
                self._full_until = 0.0
                self._wake()

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """Begin to fetch files that are needed soon, in this order, and no others; return at once.

        A file that cannot be fetched is skipped, without an error, until `path` needs it.
        """
        with self._changed:
            if self._ahead == list(names):
                return
            self._ahead = list(names)
            with self._explained():
                self._claim()
            self._wake()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes start .. stop - 1 of a file, read from the URL and not kept."""
        return self._storage.read_bytes(name, start, min(stop, self._expected[name][0]))

    def _claim(self) -> None:
        self._folder.claim(self._used.values(), [self._expected[name][1] for name in self._ahead])

    def _fetch(self, name: str, *, urgent: bool) -> bool:
        """Bring the file into the cache, whole; return False when there is no room for it now."""
        size_bytes, key = self._expected[name]
        if self._is_intact(key, size_bytes):
            return True
        with self._folder.part(key) as part:
            if self._is_intact(key, size_bytes):  # fetched by the process that held the part
                return True
            self._folder.path(key).unlink(missing_ok=True)  # damaged on disk
            if not self._folder.reserve(part, key, size_bytes, urgent=urgent):
                return False
            self._download(name, part)
            self._folder.keep(part, key)
            self._intact[key] = _identity(part)
        return True

    def _is_intact(self, key: str, size_bytes: int) -> bool:
        """Return whether the cache has the file undamaged; its content is read once per process."""
        path = self._folder.path(key)
        try:
            with open(path, "rb") as file:
                identity = _identity(file)
                if os.fstat(file.fileno()).st_size != size_bytes:
                    return False
            if self._intact.get(key) != identity and checksum(path) != key:
                return False
        except FileNotFoundError:
            return False
        self._intact[key] = identity
        return True

    def _download(self, name: str, part: BinaryIO) -> None:
        size_bytes, expected = self._expected[name]
        for _ in range(FETCHES_OF_A_CORRUPT_FILE):
            digest = xxhash.xxh3_128()
            part.seek(0)
            for block in self._storage.read_blocks(name, size_bytes):
                digest.update(block)
                part.write(block)
            if digest.hexdigest() == expected:
                return
        raise UserError(
            f"{self._storage.location}/{name} came with the checksum {digest.hexdigest()} in each of "
            f"{FETCHES_OF_A_CORRUPT_FILE} downloads, and its manifest says {expected}. The object is corrupt, or not the "
            "one that the manifest describes: upload it again from where it was prepared."
        )

    def _check_room(self, name: str, size_bytes: int, too_late: bool) -> None:
        """Raise UserError when waiting for room is in vain."""
        limit = f"data.cache.limit_gb is {self._settings.limit_bytes / 1e9:g}"
        needs = f"no room in the cache {self._settings.folder} for {self._storage.location}/{name} ({_mb(size_bytes)})"
        if size_bytes > self._settings.limit_bytes:
            raise UserError(f"{needs}: {limit}. Raise it; it should hold all shards that are in use at a time.")
        claims = self._folder.claims()
        here = sum(self._bytes_of(key) for key in claims.used_here if key != self._expected[name][1])
        if here + size_bytes > self._settings.limit_bytes:
            raise UserError(f"{needs}: {limit}, and this process uses {_mb(here)} of it. Raise it.")
        if too_late:
            used = sum(self._bytes_of(key) for key in claims.used)
            raise UserError(
                f"{needs}: {limit}, and {_mb(used)} of it stayed in use for {ROOM_WAIT_S:.0f} s. Raise it; it "
                "should hold all shards that the runs on this node use at a time."
            )

    def _bytes_of(self, key: str) -> int:
        try:
            return self._folder.path(key).stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the operating system about the cache folder into UserErrors."""
        folder = self._settings.folder
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the cache folder {folder} (data.cache.folder) cannot be used: {error}.") from error
            raise UserError(
                f"the disk of the cache folder {folder} (data.cache.folder) is full: {_mb(shutil.disk_usage(folder).free)} "
                f"free, though data.cache.limit_gb allows {self._settings.limit_bytes / 1e9:g}. Lower the limit, name "
                "another folder, or make room on the disk."
            ) from error

    def _wake(self) -> None:
        """Make threads fetch the files that are wanted."""
        self._changed.notify_all()
        while self._ahead and self._threads < self._settings.downloads:
            self._threads += 1
            threading.Thread(target=self._fetch_in_order, name="fetch-ahead", daemon=True).start()

    def _fetch_in_order(self) -> None:
        """Fetch one wanted file after another as soon as there is room: the work of one thread.

        It ends when no file is left, since this object and its claims stay as long as it runs.
        """
        while name := self._take_next():
            try:
                if not self._fetch(name, urgent=False):
                    self._full_until = time.monotonic() + ROOM_POLL_S
            except Exception:  # `path` tries again, and raises
                self._failed.add(name)
            with self._changed:
                self._underway.discard(name)

    def _take_next(self) -> str | None:
        """Wait until there may be room; return the first wanted file that is neither here nor underway, None if there is none."""
        with self._changed:
            while self._ahead and (pause := self._full_until - time.monotonic()) > 0:
                self._changed.wait(pause)
            for name in self._ahead:
                if not (name in self._underway or name in self._failed or self._is_here(name)):
                    self._underway.add(name)
                    return name
            self._threads -= 1
            return None

    def _is_here(self, name: str) -> bool:
        return self._folder.path(self._expected[name][1]).exists()


def _identity(file: BinaryIO) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_mtime_ns


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
