"""What every test of a whole run starts from: a tiny tokenizer, token shards made with it, and a run file."""

from __future__ import annotations

import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, by the fork server too

import runs  # noqa: F401  (says what the fork server loads)
from corpus import Corpus, documents_of, make_corpus, tiny

# There is one of it in a process, and the workers of the data path would start it with next to nothing loaded: then each
# rank of each test would load the libraries by itself, for seconds and hundreds of megabytes.
forkserver.ensure_running()


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
