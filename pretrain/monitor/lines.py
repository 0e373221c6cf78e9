"""Files that grow by whole lines, on disks that may be full: what is not taken now is kept, and written when it is."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path

KEPT_BYTES = 64 << 20  # of lines that wait for room

log = logging.getLogger("evenkeel")


class Lines:
    """Appends lines to the file at `path`, which no other process writes to. A half-written last line is dropped first.

    fault: why the last line could not be written; None if the disk has all. lost: lines given up because too many waited.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: OSError | None = None
        self.lost = 0
        self._descriptor: int | None = None
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._cut_at: int | None = None  # where a line begins that is on the disk in part

    @property
    def waiting(self) -> int:
        """Lines that are kept in memory."""
        return len(self._waiting)

    def append(self, line: str) -> None:
        """Write `line` and a line break after what waits. (A log record of several lines counts as one.)"""
        self._waiting.append(line.encode(errors="backslashreplace") + b"\n")
        self._waiting_bytes += len(self._waiting[-1])
        self.flush()
        while self._waiting_bytes > KEPT_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.lost += 1

    def flush(self) -> None:
        """Write what waits, as far as the disk takes it."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            self.fault = error
        else:
            self.fault = None

    def close(self) -> None:
        """Write what waits, for the last time."""
        self.flush()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        """The whole line, or nothing of it."""
        if self._descriptor is None:
            end_last_line(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if self._cut_at is not None:
            os.ftruncate(self._descriptor, self._cut_at)
        self._cut_at = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, self._cut_at)
            self._cut_at = None
            raise
        self._cut_at = None


def end_last_line(path: Path) -> None:
    """Drop the half-written line that a killed run may have left at the end."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept = end
        while kept:
            start = max(0, kept - (1 << 16))
            file.seek(start)
            found = file.read(kept - start).rfind(b"\n")
            if found >= 0:
                kept = start + found + 1
                break
            kept = start
        if kept < end:
            file.truncate(kept)


class LogFile(logging.Handler):
    """Log records as lines of a file. That the disk does not take them is said to the other handlers, once each time."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._lines, self._said = Lines(path), False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record))
        except Exception:  # of the record: logging's own way is to print it
            self.handleError(record)
        if bool(self._lines.fault) != self._said:
            self._said = not self._said
            if self._said:
                log.warning(f"cannot write to {self._lines.path} ({self._lines.fault.strerror}); its lines are kept")

    def close(self) -> None:
        self._lines.close()
        super().close()
