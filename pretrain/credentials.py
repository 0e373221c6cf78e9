"""Finds credentials in URLs and messages. They belong in the environment, where storage libraries and wandb look for them.

Run files, command lines and manifests are copied into run folders and logs. So a URL that holds a password is refused, and
messages about the user's input show *** instead of one.
"""

from __future__ import annotations

import re

# AWS's secrets hold slashes; the @ of hf://datasets/owner/name@revision has no colon before it.
_IN_URL = re.compile(r"(?<=://)[^/?#\s@]*:[^?#\s@]*@|(?<=https://)[^/?#\s]+@")
_NAMED = re.compile(
    r"(?i)((?:api_?key|access_?key|secret|passw(?:or)?d|\b(?:(?:hf|auth|access|api|session|bearer)_)?token|credentials?"
    r"|signature|\bsig)=)[^\s&]+"
)


def masked(text: str) -> str:
    """Return `text` with *** for what looks like a credential: user:password@ in a URL, or the value after api_key= etc."""
    return _NAMED.sub(r"\1***", _IN_URL.sub("***@", text))


def credential_in(location: str) -> str | None:
    """Return a message about the credential in a URL; None if it holds none."""
    if not _IN_URL.search(location):
        return None
    return (
        "a URL that holds credentials would be recorded with them; give them in the environment instead: AWS_* for s3://, "
        'HF_TOKEN for hf://, FSSPEC_HTTPS=\'{"client_kwargs": {"headers": {"Authorization": "..."}}}\' for https://'
    )
