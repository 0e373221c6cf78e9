"""What command lines here share: how they end on the user's mistakes, and how text is named."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from pretrain import startup, typed
from pretrain.errors import OTHER, USER_ERROR, UserError


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


def clean_up_on_signals() -> None:
    """From now on SIGTERM and SIGUSR1 end the program in order, with code 128 + their number: no half-written folder stays."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def add_source_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--source, --subset, --split, --text-field and --filter, for `pretrain.data.text.sources.open_source`."""
    parser.add_argument(
        "--source",
        nargs="+",
        type=typed.location,
        required=required,
        metavar="SOURCE",
        help="'stdlib', one hf://owner/dataset, or files, folders, globs and URLs (s3://, https://) of .txt .py "
        ".jsonl[.gz|.zst] .json.gz .json.zst .parquet .arrow",
    )
    parser.add_argument("--subset", help="configuration of the hf:// data set, for example sample-10BT")
    parser.add_argument("--split", default="train", help="split of the hf:// data set (default: train)")
    parser.add_argument("--text-field", default="text", help="field of a record that holds its text (default: text)")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        dest="filters",
        metavar="FIELD=VALUE",
        help="take only records of which this holds: = != < <= > >= against a field, for example 'language_score>=0.65'; "
        "may be given several times",
    )


def _exit_code(main: Callable[[], None]) -> int | str | None:
    """Call `main`; what `sys.exit` is to be told then."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:
        return ended.code
    return 0
