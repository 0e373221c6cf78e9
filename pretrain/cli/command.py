"""Code that command lines share: the way in which they end, and the arguments that name text."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import psutil

from pretrain import startup
from pretrain.cli import argument_types
from pretrain.distributed.signal_listener import STOP_SIGNALS, SignalListener, is_ignored
from pretrain.errors import OTHER, USER_ERROR, UserError
from pretrain.files import remove_unfinished

PATIENCE_S = 10.0  # the time from a signal to the end of the process, whatever it is doing
CHILDREN_S = 5.0  # the part of it that the processes it has started get

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from pretrain.data.text import Source


def run(main: Callable[[], None]) -> None:
    """Call `main` and exit: with 0 when it returns, with 2 on a `UserError`. Other exceptions keep their traceback.

    SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP end it in order, with 128 + their number: half-written files are removed,
    and processes that `main` has started are terminated. A signal that is ignored from the start, as SIGHUP under
    `nohup`, stays ignored.

    If standard output takes no more, as on a full disk, `main` continues, and the exit code is 1 instead of 0. A reader
    that has closed it, as `head` does, is no fault.
    """
    code = _exit_code(main, _Stop())
    if why := startup.lost_output():
        print(f"error: standard output takes no more: {why}. What was printed is not complete.", file=sys.stderr)
        code = code or OTHER
    if code:
        sys.exit(code)


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """End on an exception that nothing else caught: Ctrl-C while a tool imports its libraries, or an error."""
    if issubclass(kind, KeyboardInterrupt):
        _end_by(signal.SIGINT)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report  # from the first import of a tool on


def add_source_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments that name text, for `open_source_of`, and those about records without text."""
    parser.add_argument(
        "--source",
        nargs="+",
        type=argument_types.location,
        required=required,
        metavar="SOURCE",
        help="'stdlib', one hf://owner/dataset, or files, folders, globs and URLs (s3://, https://) of .txt .jsonl "
        ".ndjson .json (also with .gz .zst .bz2 .xz) .py .parquet .arrow",
    )
    parser.add_argument("--subset", help="configuration of the hf:// data set, for example sample-10BT")
    parser.add_argument("--split", default="train", help="split of the hf:// data set (default: train)")
    parser.add_argument(
        "--text-field",
        default="text",
        help="field of a record that holds its text; meta.text is the field text within meta (default: text)",
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        dest="filters",
        metavar="FIELD=VALUE",
        help="take only records of which this holds: = != < <= > >= against a field, for example 'language_score>=0.65'; "
        "may be given several times",
    )
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out what is damaged, and records whose text or filtered field is missing or of another kind, and "
        "list them; also to go on where it stopped a preparation",
    )
    parser.add_argument(
        "--max-bad-records",
        type=argument_types.number(least=0),
        default=0.01,
        metavar="SHARE",
        help="end with an error if more than this share of the records (and more than 10, or with 0 any) give no text: "
        "left out by --skip-unreadable, or null (default: 0.01)",
    )


def open_source_of(options: argparse.Namespace, part: tuple[int, int] | None = None) -> Source:
    """Return the source that the arguments of `add_source_arguments` name.

    Args:
        part: (number, count) to take only one of `count` parts of the source.
    """
    from pretrain.data.text.sources import open_source

    if options.max_bad_records > 1:
        raise UserError(f"--max-bad-records {options.max_bad_records:g} is not a share: give at most 1.")
    return open_source(
        options.source,
        text_field=options.text_field,
        subset=options.subset,
        split=options.split,
        filters=options.filters,
        part=part,
    )


class _Stop:
    """Turns the signals that end this process into exceptions in its main thread.

    Attributes:
        number: that of the signal that came, 0 if none has.
    """

    def __init__(self) -> None:
        self.number = 0
        heard = [number for number in STOP_SIGNALS if not is_ignored(number)]
        for number in heard:
            signal.signal(number, self._end)
        # A library may keep the main thread to itself for minutes: then the ear's own thread cleans up.
        SignalListener(heard, PATIENCE_S, lambda number: remove_unfinished())

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            return  # the process is ending already
        self.number = number
        _end_children()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)


def _end_by(number: int) -> NoReturn:
    """Clean up and exit at once: a library's busy thread would abort an interpreter that shuts down in its own way."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)


def _end_children() -> None:
    """Terminate the processes that this one has started. `subprocess` would kill them, and theirs would be left."""
    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.Error):
            child.terminate()
    psutil.wait_procs(children, timeout=CHILDREN_S)


def _exit_code(main: Callable[[], None], stop: _Stop) -> int | str | None:
    """Call `main` and return the argument for `sys.exit`."""
    try:
        main()
    except BaseException as error:
        if stop.number:  # libraries may have turned its exception into another
            print(f"stopped by {signal.Signals(stop.number).name}", file=sys.stderr)
            _end_by(stop.number)
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR
        if isinstance(error, SystemExit):
            return error.code
        raise
    return 0
