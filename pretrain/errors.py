"""The exceptions that mean "the user's input is wrong"."""

from __future__ import annotations

from pretrain.credentials import masked


class UserError(Exception):
    """Input that only the user can mend; the message is one paragraph that names what is wrong and what to do.

    Command lines print the message without a traceback and exit with code 2. What looks like a credential is masked.
    """

    def __str__(self) -> str:
        return masked(super().__str__())


class SharedUserError(UserError):
    """A UserError that every rank raises together, so that one of them can speak for all."""


class MachineFault(Exception):
    """A rank or a machine is at fault, not the input: the same command may go on from the newest checkpoint."""


class Diverged(Exception):
    """The run does not learn any more, and going back did not help: a person must look."""
