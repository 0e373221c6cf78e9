"""The library that turns text into ids: `tokenizers`, or gigatoken if it gives the very same ids, some 50 times faster."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from pretrain.data.bpe import PROBE, WORDS
from pretrain.data.tokenizer import text_tokenizer
from pretrain.errors import first_line

SAMPLE_CHARACTERS = 200_000
RENEW_BYTES = 1 << 30


class Backend(Protocol):
    """A library that encodes text with one tokenizer."""

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of each text (UTF-8), (tokens,) uint32, without added ones; special tokens in a text are text."""


@dataclass(frozen=True)
class Choice:
    """The name of a backend, and the reason for it, for people."""

    name: str
    reason: str


@lru_cache(maxsize=2)
def open_backend(name: str, tokenizer: str) -> Backend:
    """Return the backend `name` for `tokenizer`, a `tokenizers` tokenizer as JSON."""
    return _BACKENDS[name](tokenizer)


def choose_backend(tokenizer: str, sample: Sequence[str]) -> Choice:
    """Choose gigatoken if it gives a probe text and the `sample` the ids that `tokenizers` gives, else `tokenizers`."""
    try:
        fast = open_backend("gigatoken", tokenizer)
    except ImportError:
        return Choice("tokenizers", "gigatoken, which is faster, is not installed")
    except BaseException as error:
        reraise_interrupts(error)
        return Choice("tokenizers", f"gigatoken cannot load this tokenizer ({first_line(error)})")
    special = [token.content for token in text_tokenizer(tokenizer).get_added_tokens_decoder().values()]
    contents = [
        text.encode("utf-8", "replace") for text in (PROBE, f"{' '.join(special)} {PROBE.join(special)}", *sample)
    ]
    expected = open_backend("tokenizers", tokenizer).encode(contents)
    try:
        found = fast.encode(contents)
    except BaseException as error:
        reraise_interrupts(error)
        return Choice("tokenizers", f"gigatoken fails on a sample ({first_line(error)})")
    for content, one, other in zip(contents, found, expected, strict=True):
        if not np.array_equal(one, other):
            return Choice(
                "tokenizers", f"gigatoken gives other ids on a sample, for {content[:60].decode('utf-8', 'replace')!r}"
            )
    size = sum(map(len, contents))
    return Choice("gigatoken", f"the ids of tokenizers on the first {size / 1000:,.0f} kB and on special tokens")


class HuggingFace:
    """The `tokenizers` library."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = text_tokenizer(tokenizer)

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        texts = [content.decode() for content in contents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


class Gigatoken:
    """The gigatoken library, on the calling thread."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = _for_gigatoken(tokenizer)
        self._open()

    def encode(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        if self._encoded_bytes > RENEW_BYTES:  # its cache of words only grows
            self._open()
        self._encoded_bytes += sum(map(len, contents))
        return list(map(self._encode, contents))

    def _open(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self._encode = load_hf_json(self._tokenizer).encode  # unlike its batches, needs no awkward arrays
        self._encoded_bytes = 0


_BACKENDS: dict[str, Callable[[str], Backend]] = {"tokenizers": HuggingFace, "gigatoken": Gigatoken}


def _for_gigatoken(tokenizer: str) -> str:
    """Return `tokenizer` without special tokens, which gigatoken would find in texts, and without our cut into words.

    `bpe` adds that cut where no piece goes across it, so only the speed of `tokenizers` depends on it.
    """
    head, key, model = tokenizer.partition('"model"')  # the model is long and last
    settings = json.loads(f"{head}{key}: null}}")
    if "added_tokens" not in settings:  # its order is not that of `tokenizers`
        return _for_gigatoken(text_tokenizer(tokenizer).to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if not token["special"]]
    if (settings["pre_tokenizer"] or {}).get("pattern") == {"Regex": WORDS}:
        settings["pre_tokenizer"] = None
    return json.dumps(settings).removesuffix("null}") + model.lstrip(" :")


def reraise_interrupts(error: BaseException) -> None:
    """Raise `error` again if it interrupts this process; a panic of gigatoken is a BaseException too, but does not."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
