"""Encoding: every document once, in its split, the same in any process, and workers that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from tokenizers import Tokenizer

from pretrain.data.prepare import encoding, workers
from pretrain.data.prepare.backends import Choice
from pretrain.data.prepare.encoding import Encoded, Encoder, encode_in_order
from pretrain.data.text import open_source
from pretrain.data.tokenizer import TokenizerInfo
from pretrain.errors import UserError

pytestmark = pytest.mark.usefixtures("small_units")


@pytest.fixture(autouse=True)
def workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ALONE_CPU_S", 0.0)


def _encoder(tokenizer_info: TokenizerInfo, **options: object) -> Encoder:
    settings = {"val_fraction": 0.2, "held_out_fraction": 0.1} | options
    return Encoder(tokenizer_info.backend, tokenizer_info.eos_id, np.dtype("<u2"), **settings)


def _source(*spec: str):
    return open_source(spec, text_field="text", subset=None, split="train")


def _encode(encoder: Encoder, spec: str, count: int = 1) -> dict[str, Encoded]:
    """Return all units of a source joined."""
    joined = {split: [] for split in encoding.SPLITS}
    for _, parts, _ in encode_in_order(encoder, _source(spec), count):
        for split, encoded in parts.items():
            joined[split].append(encoded)
    return {split: _join(parts) for split, parts in joined.items()}


def _join(parts: list[Encoded]) -> Encoded:
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
    columns = [
        [part.tokens for part in parts],
        ends,
        [part.text_bytes for part in parts],
        [part.files for part in parts],
    ]
    return Encoded(*(np.concatenate(column) for column in columns))


def _as_lists(encoded: dict[str, Encoded]) -> dict[str, list]:
    return {
        split: [part.tokens.tolist(), part.ends.tolist(), part.text_bytes.tolist(), part.files.tolist()]
        for split, part in encoded.items()
    }


def test_documents_are_those_of_the_tokenizer_in_the_split_of_their_hash(
    corpus: str, texts: list[str], tokenizer_info: TokenizerInfo
) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_info.backend)
    tokenizer.encode_special_tokens = True
    expected = {split: [[], [], [], []] for split in ("train", "val", "held_out")}
    for number, text in enumerate(texts):
        content = text.encode("utf-8", "replace")
        u = xxhash.xxh3_64_intdigest(content) / 2**64
        tokens, ends, sizes, files = expected["val" if u < 0.2 else "held_out" if u >= 0.9 else "train"]
        if content:
            tokens += [*tokenizer.encode(content.decode(), add_special_tokens=False).ids, tokenizer_info.eos_id]
            ends.append(len(tokens))
            sizes.append(len(content))
            files.append(number // 50)
    found = _encode(_encoder(tokenizer_info), corpus)
    assert _as_lists(found) == expected
    assert all(part.tokens.dtype == np.uint16 and part.files.dtype == np.int32 for part in found.values())
    assert all(len(lists[1]) > 5 for lists in expected.values())


def test_changing_one_fraction_moves_no_document_of_the_other(corpus: str, tokenizer_info: TokenizerInfo) -> None:
    wide = _as_lists(_encode(_encoder(tokenizer_info, held_out_fraction=0.3), corpus))
    narrow = _as_lists(_encode(_encoder(tokenizer_info, held_out_fraction=0.1), corpus))
    assert wide["val"] == narrow["val"]
    assert len(wide["held_out"][1]) > len(narrow["held_out"][1])
    other = _as_lists(_encode(_encoder(tokenizer_info, val_fraction=0.4), corpus))
    assert other["held_out"] == narrow["held_out"]


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
@pytest.mark.parametrize("block_bytes", [300, 100_000])
def test_neither_backend_nor_block_borders_nor_workers_change_the_tokens(
    corpus: str, tokenizer_info: TokenizerInfo, monkeypatch: pytest.MonkeyPatch, backend: str, block_bytes: int
) -> None:
    expected = _as_lists(_encode(_encoder(tokenizer_info), corpus))
    monkeypatch.setattr("pretrain.data.text.readers.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(encoding, "UNIT_BYTES", block_bytes)
    monkeypatch.setattr(encoding, "choose_backend", lambda *_: Choice(backend, "asked for"))
    assert _as_lists(_encode(_encoder(tokenizer_info), corpus, 2)) == expected


def test_up_to_ends_with_the_document_that_reaches_it(corpus: str, tokenizer_info: TokenizerInfo) -> None:
    part = _encode(_encoder(tokenizer_info), corpus)["train"]
    for wanted in (1, int(part.ends[3]), int(part.ends[3]) + 1, len(part.tokens), len(part.tokens) + 1):
        first = part.up_to(wanted)
        assert (
            len(first.tokens)
            == first.ends[-1]
            == part.ends[min(np.searchsorted(part.ends, wanted), len(part.ends) - 1)]
        )
        assert len(first.ends) == len(first.files) == len(first.text_bytes)


def test_a_panic_of_the_fast_library_costs_speed_alone(
    corpus: str, tokenizer_info: TokenizerInfo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Panic(BaseException):
        """A panic like pyo3's, which is no Exception."""

    def fail(self: object, contents: list[bytes]) -> list:
        raise Panic("index out of bounds")

    expected = _as_lists(_encode(_encoder(tokenizer_info), corpus))
    monkeypatch.setattr("pretrain.data.prepare.backends.Gigatoken.encode", fail)
    monkeypatch.setattr(encoding, "choose_backend", lambda *_: Choice("gigatoken", "asked for"))
    assert _as_lists(_encode(_encoder(tokenizer_info), corpus)) == expected
    assert "gigatoken failed, so tokenizers takes its place: index out of bounds" in capsys.readouterr().err


def test_killed_workers_are_replaced_and_nothing_is_lost(corpus: str, tokenizer_info: TokenizerInfo) -> None:
    expected = _as_lists(_encode(_encoder(tokenizer_info), corpus))
    joined = {split: [] for split in encoding.SPLITS}
    killed = set()
    for number, (_, parts, _) in enumerate(encode_in_order(_encoder(tokenizer_info), _source(corpus), 2)):
        for split, encoded in parts.items():
            joined[split].append(encoded)
        if number % 3 == 1:
            victims = [process.pid for process in multiprocessing.active_children() if process.pid not in killed]
            for victim in victims[:1]:
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
    assert len(killed) > 3
    assert _as_lists({split: _join(parts) for split, parts in joined.items()}) == expected
    assert not multiprocessing.active_children()


def _die(one: tuple[str, str], attempt: int) -> str:
    """Kill this process for the input "bad", and at its first attempt for "shy"."""
    name, marks = one
    with open(marks, "a", encoding="utf-8") as file:
        file.write(f"{name} {attempt}\n")
    if name == "bad" or (name == "shy" and attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return name.upper()


def test_an_input_that_kills_its_workers_is_named_after_three(tmp_path: Path) -> None:
    names = ["a", "shy", "b", "bad", "c", "d"]
    inputs = [(name, str(tmp_path / "marks")) for name in names]
    results = workers.map_in_order(_die, inputs, 2, place_of=lambda one: f"the place of {one[0]}")
    assert [next(results)[1] for _ in range(3)] == ["A", "SHY", "B"]
    with pytest.raises(UserError, match=r"3 processes that encoded the place of bad were killed.*code -9"):
        list(results)
    marks = [mark for mark in (tmp_path / "marks").read_text().splitlines() if mark.startswith(("bad", "shy"))]
    assert sorted(marks) == ["bad 1", "bad 2", "bad 3", "shy 1", "shy 2"]
    assert not multiprocessing.active_children()


def test_the_place_of_a_unit_names_file_and_line(corpus: str) -> None:
    units = list(encoding.units(_source(corpus)))
    first = json.dumps(corpus.replace("*", "0"))[1:-1]
    assert units[0].place == f"{first}, from line 1"
    assert len(units) > 4


def test_workers_end_with_their_parent(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    """A parent that is killed takes its workers with it."""
    context = multiprocessing.get_context("spawn")
    pids = tmp_path / "pids"
    parent = context.Process(target=_hold_workers, args=(_encoder(tokenizer_info), corpus, pids))
    parent.start()
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(pid) for pid in pids.read_text().split()]
    assert len(children) == 2
    parent.kill()
    parent.join()
    while any(map(_is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_alive, children))


def _hold_workers(encoder: Encoder, corpus: str, pids: Path) -> None:
    workers.ALONE_CPU_S = 0.0
    encoding.UNIT_BYTES = 2000
    encoded = encode_in_order(encoder, _source(corpus), 2)
    for _ in range(3):
        next(encoded)
    aside = pids.with_suffix(".tmp")
    aside.write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
    aside.rename(pids)
    time.sleep(600)


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
