"""Starts processes of our own code that neither TMPDIR nor files in the working directory can break."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerContext

from pretrain.errors import UserError
from pretrain.paths import REPOSITORY

_SOCKET = "listener-________"  # as long as multiprocessing's names


def start_fork_server(modules: list[str]) -> ForkServerContext:
    """Start multiprocessing's fork server, unless it runs, and return its context. It has `modules` loaded, and no threads.

    Raises:
        UserError: there is no folder for its socket.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    _choose_socket_folder()
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # else a file random.py in the working directory hides Python's own
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
    return context


def own_package() -> dict[str, str]:
    """Return environment variables with which `python -m pretrain...` runs this code from any working directory."""
    root = str(REPOSITORY)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "PYTHONSAFEPATH": "1",
    }


def _choose_socket_folder() -> None:
    """Choose the folder of multiprocessing's sockets, once per process, such that one can be made there.

    Some TMPDIR do not work: a socket's path has at most 107 bytes, and some file systems have no sockets.
    """
    before = tempfile.tempdir
    tried = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    for base in tried:
        if _takes_socket(base):
            tempfile.tempdir = base
            try:
                util.get_temp_dir()  # made below `tempdir`, kept by this process, and deleted at its end
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
