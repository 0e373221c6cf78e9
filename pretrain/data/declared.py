"""Compares the special tokens that the files of a tokenizer declare with those that the libraries load.

`tokenizers` and `transformers` give an added token the next free id, whatever id its file names, and `transformers`
adds a token that is named and in no vocabulary. Other tools use the ids in the files, so the ids would differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pretrain.data.json_files import read_json
from pretrain.errors import UserError

_VOCABULARY, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_NAMED = "special_tokens_map.json"  # older versions name tokens here that the settings do not


def check_declared(folder: Path, ids: Mapping[str, int]) -> None:
    """Raise UserError unless the tokens that the files in `folder` declare have their `ids`.

    The tokens around documents must be among them. Folders without a tokenizer.json declare nothing to compare.
    """
    if not (folder / _VOCABULARY).is_file():
        return
    vocabulary = read_json(folder / _VOCABULARY)
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    declared = list(_declared(folder, vocabulary, settings))
    for file, token, number in declared:
        if ids.get(token) != number:
            raise UserError(
                f"{folder / file} gives the token '{token}' the id {number}, and the libraries give it {ids.get(token)}: "
                "they leave no gaps between the ids of added tokens. Number them without gaps after the vocabulary, "
                "with unused tokens in between if a model was trained with these ids."
            )
    around = {"eos_token": "ends"} | ({"bos_token": "begins"} if settings.get("add_bos_token") is True else {})
    for name, does in around.items():
        file, named = _named(folder, settings, name)
        if named is not None and not _holds(vocabulary, named) and named not in {token for _, token, _ in declared}:
            raise UserError(
                f"{folder / file} names '{named}' as {name}, which {does} every document, and {folder / _VOCABULARY} "
                "has no such token. Name one of its tokens, or add this one to its added_tokens."
            )


def _named(folder: Path, settings: dict, name: str) -> tuple[str, str | None]:
    """Return the file that names the token `name`, and its content."""
    file, token = _SETTINGS, settings.get(name)
    if token is None and (folder / _NAMED).is_file():
        file, token = _NAMED, read_json(folder / _NAMED).get(name)
    return file, token["content"] if isinstance(token, dict) else token


def _declared(folder: Path, vocabulary: dict, settings: dict) -> Iterator[tuple[str, str, int]]:
    """Yield (file, token, id) of each declared token."""
    for token in vocabulary.get("added_tokens") or []:
        yield _VOCABULARY, token["content"], token["id"]
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        yield _SETTINGS, token["content"], int(number)
    if (folder / _ADDED).is_file():
        for token, number in read_json(folder / _ADDED).items():
            yield _ADDED, token, number


def _holds(vocabulary: dict, token: str) -> bool:
    pieces = (vocabulary.get("model") or {}).get("vocab") or {}
    added = (entry["content"] for entry in vocabulary.get("added_tokens") or [])
    listed = pieces if isinstance(pieces, dict) else {piece for piece, _ in pieces}
    return token in listed or token in added
