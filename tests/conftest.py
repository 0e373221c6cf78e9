"""Fixtures for tests of whole runs: a tiny tokenizer, token shards made with it, and a run file."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Both are read when torch is first imported, by the fork server too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
)  # no CPU has fp16, so that Muon is as exact on all of them

from tests.support import runs
from tests.support.corpus import Corpus, documents_of, make_corpus, tiny


class Together(LoadScopeScheduling):
    """A schedule that keeps the tests of a file in one process, as they share its runs; all tests of methods share theirs."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/methods" if file.startswith("tests/methods/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> None:
    """Let the processes of tests hear SIGHUP under nohup and SIGINT in the background, which this process goes on ignoring.

    They would inherit that a signal is ignored. They do not inherit a handler.
    """
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def fork_server(heard_signals: None) -> None:
    """Start this process's fork server with the libraries loaded.

    Otherwise the workers of the data path would start it with almost nothing loaded, and each rank of each test would load
    the libraries itself, for seconds and hundreds of megabytes.
    """
    runs.start_fork_server()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return a corpus that all tests share: copy it before you damage it."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), documents_of(400))


@pytest.fixture(scope="session")
def run_file(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a run of seconds: LIR and TVR on ZeRO-3 in fp32, two micro-batches on each of two ranks."""
    path = tmp_path_factory.mktemp("run_file") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(corpus), sort_keys=False))
    return path
