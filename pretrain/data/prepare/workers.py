"""Maps a function over many inputs in several processes, in order, even if some of the processes die.

`concurrent.futures` gives up when one process dies. Here another takes its place and its inputs. Starting the processes
costs as much as encoding tens of megabytes, so they start when there is more work than that.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from pretrain.errors import UserError
from pretrain.processes import start_fork_server

ALONE_CPU_S = 2.0  # this process works so long before it starts others
ATTEMPTS = 3
QUEUED = 2  # inputs that a process has at once: the one it works on and the next
HELD = 3  # inputs and results per process that are in memory at once

Function = Callable[[Any, int], Any]


def map_in_order(
    function: Function, inputs: Iterable, workers: int, *, place_of: Callable[[Any], str]
) -> Iterator[tuple[Any, Any]]:
    """Yield (input, function(input, attempt)) for each input, in order.

    Inputs and results are pickled, and at most HELD * workers of them are in memory. What `function` raises is raised
    here.

    Args:
        function: The function; `attempt` is 1 unless a process died of the input.
        inputs: The inputs.
        workers: The number of processes.
        place_of: Names an input in messages.

    Raises:
        UserError: ATTEMPTS processes died of one input.
    """
    inputs = iter(inputs)
    began = time.process_time()
    for one in inputs:
        yield one, function(one, 1)
        if workers > 1 and time.process_time() - began >= ALONE_CPU_S:
            break
    yield from _in_pool(_Pool(function, workers, place_of), workers, inputs)


def _in_pool(pool: _Pool, workers: int, inputs: Iterator) -> Iterator[tuple[Any, Any]]:
    numbered = enumerate(inputs)
    waiting: deque[int] = deque()
    try:
        while True:
            while len(waiting) < HELD * workers and pool.has_room() and (task := next(numbered, None)):
                pool.submit(*task)
                waiting.append(task[0])
            if not waiting:
                return
            while waiting[0] not in pool.results:
                pool.wait()
            yield pool.take(waiting.popleft())
    finally:
        pool.close()


class _Pool:
    """Processes, the inputs that each of them was given, and their results."""

    def __init__(self, function: Function, size: int, place_of: Callable[[Any], str]) -> None:
        self._function = function
        self._size = size
        self._place_of = place_of
        self._workers: list[_Worker] = []
        self._inputs: dict[int, Any] = {}
        self._attempts: dict[int, int] = {}
        self.results: dict[int, tuple[bool, Any]] = {}

    def has_room(self) -> bool:
        return len(self._workers) < self._size or any(len(worker.numbers) < QUEUED for worker in self._workers)

    def submit(self, number: int, one: Any) -> None:
        self._inputs[number] = one
        self._attempts[number] = 1
        idlest = min(self._workers, key=lambda worker: len(worker.numbers), default=None)
        if idlest is None or (idlest.numbers and len(self._workers) < self._size):
            idlest = _Worker(self._function)
            self._workers.append(idlest)
        self._give(idlest, number)

    def take(self, number: int) -> tuple[Any, Any]:
        """Return the input and its result; raise what the function raised."""
        succeeded, result = self.results.pop(number)
        if not succeeded:
            raise result
        del self._attempts[number]
        return self._inputs.pop(number), result

    def wait(self) -> None:
        """Wait until a process has a result or dies."""
        ready = wait([worker.connection for worker in self._workers])
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            try:
                number, *result = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            worker.numbers.remove(number)
            self.results[number] = tuple(result)

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()  # this ends it
        for worker in self._workers:
            worker.process.join()

    def _replace(self, dead: _Worker) -> None:
        """Start another process with the inputs of a dead one, which may have died of the first."""
        dead.connection.close()
        dead.process.join()
        if dead.numbers:
            suspect = dead.numbers[0]
            if self._attempts[suspect] == ATTEMPTS:
                raise UserError(
                    f"{ATTEMPTS} processes that encoded {self._place_of(self._inputs[suspect])} were killed, the last "
                    f"with exit code {dead.process.exitcode}. If there was too little memory (code -9), run the same "
                    "command with fewer --workers; otherwise leave out the file. What is done is kept."
                )
            self._attempts[suspect] += 1
        other = _Worker(self._function)
        self._workers[self._workers.index(dead)] = other
        for number in dead.numbers:
            self._give(other, number)

    def _give(self, worker: _Worker, number: int) -> None:
        worker.numbers.append(number)
        with contextlib.suppress(OSError):  # it died; `wait` will notice
            worker.connection.send((number, self._attempts[number], self._inputs[number]))


class _Worker:
    """A process and the numbers of the inputs that it has, the one it works on first."""

    def __init__(self, function: Function) -> None:
        # Forked from a server that has done the imports, but has neither threads nor this process's memory.
        context = start_fork_server(["__main__", __name__, function.__class__.__module__])
        self.connection, other_end = context.Pipe()
        self.numbers: list[int] = []
        self.process = context.Process(target=_work, args=(other_end, function), daemon=True)
        self.process.start()
        other_end.close()


def _work(connection: Connection, function: Function) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the connection
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while True:
        number, attempt, one = tasks.get()
        try:
            result = (True, function(one, attempt))
        except UserError as error:
            result = (False, error)
        except Exception:  # others may not survive pickling
            result = (False, RuntimeError(traceback.format_exc()))
        connection.send((number, *result))


def _receive(connection: Connection, tasks: queue.SimpleQueue) -> None:
    """Receive inputs while others are worked on, so that the parent never waits; end with the parent."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
