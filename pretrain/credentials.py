"""Credentials belong in the environment, where storage libraries and wandb look for them: never in what is recorded.

Run files, command lines and manifests are copied into run folders and logs, so a URL that holds a password is refused,
and messages about the user's input show *** in place of one.
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
    """`text` with *** for what looks like a credential: user:password@ in a URL, the value after api_key= and the like."""
    return _NAMED.sub(r"\1***", _IN_URL.sub("***@", text))


def credential_in(location: str) -> str | None:
    """What is wrong with a URL that holds a credential, for a message; None: nothing."""
    if not _IN_URL.search(location):
        return None
    return (
        "a URL that holds credentials would be recorded with them; give them in the environment instead: AWS_* for s3://, "
        'HF_TOKEN for hf://, FSSPEC_HTTPS=\'{"client_kwargs": {"headers": {"Authorization": "..."}}}\' for https://'
    )
