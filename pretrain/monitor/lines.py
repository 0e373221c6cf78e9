"""Files that grow by whole lines, on disks that may be full: a line that cannot be written is kept and written later."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path

KEPT_BYTES = 64 << 20  # the most that waiting lines take in memory

log = logging.getLogger("evenkeel")


class Lines:
    """Appends lines to a file that no other process writes to. A half-written last line is dropped first.

    Attributes:
        path: the file.
        fault: the error at the last line. None if the disk has all lines.
        lost: lines given up because too many waited.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault: OSError | None = None
        self.lost = 0
        self._descriptor: int | None = None
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._cut_at: int | None = None  # the start of a line of which the disk has a part

    @property
    def waiting(self) -> int:
        """The number of lines that are kept in memory."""
        return len(self._waiting)

    def append(self, line: str) -> None:
        """Write `line` and a line break after the lines that wait. A log record of several lines counts as one."""
        self._waiting.append(line.encode(errors="backslashreplace") + b"\n")
        self._waiting_bytes += len(self._waiting[-1])
        self.flush()
        while self._waiting_bytes > KEPT_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.lost += 1

    def flush(self) -> None:
        """Write the lines that wait, as far as the disk takes them."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            self.fault = error
        else:
            self.fault = None

    def close(self) -> None:
        """Write the lines that wait, for the last time."""
        self.flush()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        """Write the whole line, or nothing of it."""
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
    """A handler that writes log records as lines of a file.

    When the disk stops taking them, the other handlers get one warning.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._lines, self._fault_logged = Lines(path), False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record))
        except Exception:  # from the record itself, which logging reports by printing it
            self.handleError(record)
        fault, was_logged = self._lines.fault, self._fault_logged
        self._fault_logged = fault is not None  # set before the warning below, which comes back to this handler
        if fault is not None and not was_logged:
            log.warning(f"cannot write to {self._lines.path} ({fault.strerror}); its lines are kept")

    def close(self) -> None:
        self._lines.close()
        super().close()
