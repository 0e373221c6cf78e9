"""Objects behind a URL, through fsspec: read in parts, tried again when it may help, and given up with a clear error.

Every read is a range of at most BLOCK_BYTES with its own time limit, so a connection that stalls or breaks costs one
block, on HTTP and on S3. Only this file retries: the retries of the drivers below are turned off where they can be.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.exceptions import FSTimeoutError
from fsspec.registry import known_implementations

from pretrain.credentials import credential_in
from pretrain.errors import UserError

BLOCK_BYTES = 8 << 20
ATTEMPTS = 10  # some four minutes: storage fails now and then in the weeks of a run
ATTEMPTS_AT_FIRST = 4  # before anything was read from there, when a wrong name is more likely
FIRST_WAIT_S = 1.0  # doubles from attempt to attempt
LONGEST_WAIT_S = 60.0
TIMEOUT_S = 30.0  # for the first attempt; the k-th has k times as long, for links that are slow and not dead

_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)*", re.ASCII)
_OVERLOADED = {408, 425, 429}  # the HTTP statuses below 500 that may pass: timeout, too early, too many requests
_OPTIONS = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}}}

log = logging.getLogger("evenkeel")
T = TypeVar("T")


def is_remote(location: str) -> bool:
    """Return whether `location` is a URL with any scheme but file://."""
    return bool(re.match(r"[a-zA-Z][a-zA-Z0-9+.\-]+://", location)) and not location.startswith("file://")


class Storage:
    """The objects below one URL, read only; safe to use from several threads.

    Every method raises UserError, naming the URL, when the object is not there or may not be read, or when ATTEMPTS
    attempts with growing pauses, each of which is logged, have failed.
    """

    def __init__(self, location: str) -> None:
        """Open `location`, from which nothing is read yet; UserError if it holds credentials or its scheme cannot be used."""
        if fault := credential_in(location):
            raise UserError(f"{location}: {fault}.")
        self.location = location.rstrip("/")
        self._files = _file_system(self.location)
        self._root = self._files._strip_protocol(self.location)
        self._reached = False
        self._jitter = random.Random()  # a separate one: the seeded generators are the run's

    def read_bytes(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return bytes start..stop-1 of the object; all of it without them."""
        url = self._url(name)

        def read(timeout_s: float) -> bytes:
            data = self._files.cat_file(self._path(name), start=start, end=stop, **self._limits(timeout_s))
            _check_length(data, start, stop, url)
            return data

        return self._patiently(url, read)

    def read_blocks(self, name: str, size_bytes: int) -> Iterator[bytes]:
        """Yield the first `size_bytes` bytes of the object, in blocks."""
        for start in range(0, size_bytes, BLOCK_BYTES):
            yield self.read_bytes(name, start, min(start + BLOCK_BYTES, size_bytes))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _url(self, name: str) -> str:
        if not _NAME.fullmatch(name) or ".." in name.split("/"):
            raise UserError(f"{self.location} has a file named {name!r} in its manifest, which is no name below it.")
        return f"{self.location}/{name}"

    def _limits(self, timeout_s: float) -> dict:
        """Return the limits of one read: a time limit where the driver takes one, else the driver's own and no read-ahead."""
        return {"timeout": timeout_s} if isinstance(self._files, AsyncFileSystem) else {"cache_type": "none"}

    def _patiently(self, url: str, read: Callable[[float], T]) -> T:
        """Return `read(time limit in seconds)`, tried again while that may help."""
        began, attempts = time.monotonic(), ATTEMPTS if self._reached else ATTEMPTS_AT_FIRST
        for attempt in range(1, attempts + 1):
            try:
                found = read(TIMEOUT_S * min(attempt, 6))
                self._reached = True
                return found
            except UserError:
                raise
            except Exception as error:
                if _is_permanent(error):
                    raise UserError(f"{url} cannot be read: {_seen(error)}. {_advice(error)}") from error
                failure = error
            if attempt < attempts:
                pause_s = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * self._jitter.uniform(0.5, 1)
                log.warning(f"{url}: {_seen(failure)}; attempt {attempt} of {attempts}, the next in {pause_s:.0f} s")
                time.sleep(pause_s)
        raise UserError(
            f"{url} cannot be read: {_seen(failure)}, at the last of {attempts} attempts in "
            f"{time.monotonic() - began:.0f} s. Check the network and the storage, then start again."
        ) from failure


class _Short(OSError):
    """An answer with fewer bytes than were asked for."""


def _check_length(data: bytes, start: int | None, stop: int | None, url: str) -> None:
    if stop is None:
        return
    asked = stop - (start or 0)
    if len(data) > asked:
        raise UserError(
            f"{url} came as a whole ({len(data)} bytes) when {asked} bytes of it were asked for. "
            "Serve it with a server that supports HTTP ranges, or copy the corpus to a local folder."
        )
    if len(data) < asked:
        raise _Short(f"{len(data)} bytes came of the {asked} from byte {start or 0} on")


def _file_system(location: str) -> fsspec.AbstractFileSystem:
    scheme = location.split("://")[0]
    try:
        # A new instance, since fsspec shares them and this one does not retry.
        files = fsspec.filesystem(scheme, skip_instance_cache=True, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        package = known_implementations[scheme]["class"].split(".")[0]
        package = f"'fsspec[{scheme}]'" if package == "fsspec" else package
        raise UserError(f"{location} needs a library that is not installed: pip install {package}") from error
    except (ValueError, TypeError) as error:  # TypeError: ftp, sftp and the like want a host, which no run file gives
        raise UserError(f"{location} cannot be opened: {error}. Known are s3://, gs://, hf://, https://.") from error
    if hasattr(files, "retries"):
        files.retries = 1
    return files


def _is_permanent(error: BaseException) -> bool:
    """Return whether the same request would fail again."""
    if (status := _status(error)) is not None:
        return status < 500 and status not in _OVERLOADED
    return isinstance(error, (FileNotFoundError, PermissionError, ValueError, TypeError)) or _lacks_credentials(error)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an exception of aiohttp, botocore, requests or httpx, or in its cause."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", getattr(error, "status", None))
    if isinstance(status, int):
        return status
    return _status(error.__cause__) if error.__cause__ else None


def _lacks_credentials(error: BaseException) -> bool:
    return "Credential" in type(error).__name__


def _seen(error: BaseException) -> str:
    if isinstance(error, FSTimeoutError):
        return "no answer in time"
    status = _status(error)
    seen = f"{type(error).__name__}: {error}".strip(": ").rstrip(".")
    return seen if status is None or str(status) in seen else f"{seen} (HTTP status {status})"


def _advice(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) or _status(error) == 404:
        return "Check the location; there is no such object."
    if isinstance(error, PermissionError) or _lacks_credentials(error) or _status(error) in (401, 403):
        return (
            "Check that the credentials in this environment may read it (for s3:// the AWS_* variables; "
            "FSSPEC_S3_ANON=true for a public bucket)."
        )
    return "Check the location."
