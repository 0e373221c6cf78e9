"""What command lines here share: how they end on the user's mistakes, and how text is named."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrain import startup, typed
from pretrain.errors import OTHER, USER_ERROR, UserError

if TYPE_CHECKING:
    from types import TracebackType

    from pretrain.data.text import Source


def run(main: Callable[[], None]) -> None:
    """Call `main` and exit: 0 when it returns, 2 on a `UserError`, 130 on Ctrl-C; other exceptions keep their traceback.

    Where standard output takes no more, as on a full disk, `main` goes on, and the exit code is 1 instead of 0. A reader
    that has closed it, as `head` does, has what it wanted.
    """
    code = _exit_code(main)
    if why := startup.lost_output():
        print(f"error: standard output takes no more: {why}. What was printed is not complete.", file=sys.stderr)
        code = code or OTHER
    if code:
        sys.exit(code)


def _end_on_ctrl_c() -> None:
    """End with 130, at once: an interpreter that winds down is aborted by a library's thread that still works."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What is uncaught: Ctrl-C while a tool still imports its libraries, or an error with its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        _end_on_ctrl_c()
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _tell  # from the first import of a tool on


def clean_up_on_signals() -> None:
    """From now on SIGTERM and SIGUSR1 end the program in order, with code 128 + their number: no half-written folder stays."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def add_source_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What names text, for `open_source_of`, and what to do about records that give none."""
    parser.add_argument(
        "--source",
        nargs="+",
        type=typed.location,
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
        type=typed.number(least=0),
        default=0.01,
        metavar="SHARE",
        help="end with an error if more than this share of the records (and more than 10) give no text: left out by "
        "--skip-unreadable, or null (default: 0.01)",
    )


def open_source_of(options: argparse.Namespace, part: tuple[int, int] | None = None) -> Source:
    """The source that the arguments of `add_source_arguments` name, or a part of it."""
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


def _exit_code(main: Callable[[], None]) -> int | str | None:
    """Call `main`; what `sys.exit` is to be told then."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        _end_on_ctrl_c()
    except SystemExit as ended:
        return ended.code
    return 0
