"""JSON content: read with errors that name the file, and hashed independently of its formatting."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from pretrain.errors import UserError


def read_json(path: Path) -> dict:
    """Return the JSON object in `path`; UserError when it cannot be read or is not one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}. Restore the file, or make its folder again.") from error
    return parse_json(content, str(path))


def parse_json(content: bytes, path: str) -> dict:
    """Return the JSON object in `content`, which came from `path` (a file or URL); UserError when it is not one."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}. Restore the file, or make its folder again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object and holds a {type(value).__name__}. Restore the file.")
    return value


def content_hash(value: object) -> str:
    """Return 32 hex digits that depend on the JSON content of `value` alone (XXH3-128)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(canonical.encode())
