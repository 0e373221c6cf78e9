"""Whose fault it is: the exceptions that say so, and the exit codes that follow from them."""

from __future__ import annotations

from pretrain.credentials import masked

# Of every command line here; 0 is done, or stopped after saving.
OTHER, USER_ERROR, MACHINE_FAULT, DIVERGED = 1, 2, 3, 4


class UserError(Exception):
    """Input that only the user can mend; the message is one paragraph that names what is wrong and what to do.

    Command lines print the message without a traceback and exit with USER_ERROR. What looks like a credential is masked.
    """

    def __str__(self) -> str:
        return masked(super().__str__())


class SharedUserError(UserError):
    """A UserError that every rank raises together, so that one of them can speak for all."""


class MachineFault(Exception):
    """A rank or a machine is at fault, not the input: the same command may go on from the newest checkpoint."""


class Diverged(Exception):
    """The run does not learn any more, and going back did not help: a person must look."""


def first_line(error: BaseException) -> str:
    """What a library's error says, to be quoted in one of ours: without its last full stop; its kind if it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
