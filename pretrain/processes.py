"""Processes of our own code, started so that neither TMPDIR nor what lies in the working directory can break them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerContext

from pretrain.errors import UserError
from pretrain.paths import REPOSITORY

_SOCKET = "listener-________"  # as long as the names that multiprocessing gives


def start_fork_server(modules: list[str]) -> ForkServerContext:
    """Start the server, unless it runs, and return what makes processes in it. It has `modules` loaded, and no threads.

    UserError if there is no folder for its socket.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    _choose_socket_folder()
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # or a file in the working directory called random.py is taken for Python's own
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
    return context


def own_package() -> dict[str, str]:
    """Environment variables for `python -m pretrain...`: of this very code, whatever lies in the working directory."""
    root = str(REPOSITORY)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "PYTHONSAFEPATH": "1",
    }


def _choose_socket_folder() -> None:
    """Have multiprocessing put its sockets, once per process, where one can be made.

    That is not so below every TMPDIR: a socket's path has 107 bytes at most, and some file systems take none.
    """
    before = tempfile.tempdir
    tried = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    for base in tried:
        if _takes_socket(base):
            tempfile.tempdir = base
            try:
                util.get_temp_dir()  # is made below `tempdir`, remembered by this process, and goes at its end
            finally:
                tempfile.tempdir = before
            return
    raise UserError(
        f"the processes that share the work need a folder for their socket, and none can be made in {', '.join(tried)}. "
        "Set TMPDIR to a short path on a local disk."
    )


def _takes_socket(base: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-", dir=base) as folder, socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{folder}/{_SOCKET}")
    except OSError:  # its path is too long, or the folder is not there, full, or on a file system without sockets
        return False
    return True
