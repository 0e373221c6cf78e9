"""What every test of a whole run starts from: a tiny tokenizer, token shards made with it, and a run file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, by the fork server too

from tests.support import runs
from tests.support.corpus import Corpus, documents_of, make_corpus, tiny


class Together(LoadScopeScheduling):
    """The tests of a file go to one process, as they share its runs; those of the methods share theirs all."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/methods" if file.startswith("tests/methods/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """There is one in a process, and the workers of the data path would start it with next to nothing loaded.

    Then each rank of each test would load the libraries by itself, for seconds and hundreds of megabytes.
    """
    runs.start_fork_server()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Shared by all tests: copy what you mean to damage."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), documents_of(400))


@pytest.fixture(scope="session")
def run_file(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds: LIR and TVR on ZeRO-3 in fp32, two micro-batches a rank on two ranks. Override with --set."""
    path = tmp_path_factory.mktemp("run_file") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny(corpus), sort_keys=False))
    return path
