"""The exceptions that mean "the user's input is wrong"."""

from __future__ import annotations


class UserError(Exception):
    """Input that only the user can mend; the message is one paragraph that names what is wrong and what to do.

    Command lines print the message without a traceback and exit with code 2.
    """


class SharedUserError(UserError):
    """A UserError that every rank raises together, so that one of them can speak for all."""
