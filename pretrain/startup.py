"""Prepares the process of a command line before any library loads: module path, standard streams, encoding, home.

It imports no library. A library that loads before `begin` may import foreign modules, or open a file with the number of a
closed standard stream.
"""

from __future__ import annotations

import atexit
import codecs
import errno
import io
import locale
import os
import select
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

_PACKAGE = Path(__file__).resolve().parent
_OF_SCRIPTS = (_PACKAGE, _PACKAGE.parent / "tools")
_made_home: str | None = None


class Console(io.FileIO):
    """A standard stream that may go away: a pipe without a reader, a terminal that is gone, a full disk.

    Output that it does not take is lost, and the program continues: its work is worth more than its output.

    Attributes:
        failure: the first failure, None if all was written.
    """

    failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Write all of `content`, waiting where the stream is in non-blocking mode, or as much as it takes."""
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while len(left):
                written = super().write(left)
                if written is None:
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            self.failure = self.failure or error
        return size


def begin() -> None:
    """Prepare this process for a script's work. Call it once, before everything else."""
    _take_text_as_utf8()
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("default")  # a library's warning is printed, and ends nothing
    # Python looks for modules beside the script first. Libraries that import `config` or `distributed` would get ours.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() not in _OF_SCRIPTS]
    for descriptor in range(3):
        _open(descriptor)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _console(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _console(2, sys.stderr)
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # Python takes an empty one for /
    if not os.path.isabs(os.path.expanduser("~")):
        _make_home()


def has_home() -> bool:
    """Return whether `~` and $HOME stand for a folder that outlasts this process."""
    return _made_home is None or os.environ.get("HOME") != _made_home


def lost_output() -> str | None:
    """Return why some of standard output was lost; None if it was not, or if its reader has closed it."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    failure = getattr(getattr(buffer, "raw", buffer), "failure", None)
    return None if failure is None or failure.errno == errno.EPIPE else failure.strerror


def _take_text_as_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale has another encoding.

    Libraries read their own files in the locale's encoding, which also decodes file names and arguments. Output stays in the
    encoding of the terminal.
    """
    if sys.flags.utf8_mode or codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8":
        return
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _make_home() -> None:
    """Give libraries a home for their caches, for as long as this process lasts.

    Without HOME, and for a user without an entry, as in containers, `~` stays `~`, and libraries make a folder of this name
    in the working directory.
    """
    global _made_home
    os.environ["HOME"] = _made_home = tempfile.mkdtemp(prefix="evenkeel-home-")
    atexit.register(shutil.rmtree, _made_home, ignore_errors=True)


def _open(descriptor: int) -> None:
    """Open a closed standard stream on /dev/null: the next file opened would get its number, and the output."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        os.set_inheritable(descriptor, True)


def _console(descriptor: int, stream: object) -> io.TextIOWrapper:
    """Return a text stream over a `Console`, buffered like `stream`. It escapes characters that its encoding lacks."""
    console = Console(descriptor, "w", closefd=False)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(console), "utf-8", "backslashreplace")
    own = cast(io.TextIOWrapper, stream)  # which Python makes at its start
    return io.TextIOWrapper(
        console if own.write_through else io.BufferedWriter(console),
        own.encoding,
        "backslashreplace",
        line_buffering=own.line_buffering,
        write_through=own.write_through,
    )
