"""The exceptions that separate faults of the user, the machine and the run, and their exit codes."""

from __future__ import annotations

from pretrain.credentials import masked

# Exit codes of every command line. 0: done, or stopped after saving.
OTHER, USER_ERROR, MACHINE_FAULT, DIVERGED = 1, 2, 3, 4


class UserError(Exception):
    """Input that only the user can mend. The message is one paragraph that names the fault and the remedy.

    Command lines print the message without a traceback and exit with USER_ERROR. Text that looks like a credential is
    masked.
    """

    def __str__(self) -> str:
        return masked(super().__str__())


class SharedUserError(UserError):
    """A UserError that every rank raises together, so that one rank can report it for all."""


class MachineFault(Exception):
    """A rank or a machine is at fault, not the input: the same command may resume from the newest checkpoint."""


class Diverged(Exception):
    """The run does not learn any more, and a rollback did not help: a person must look."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error without its last full stop, to be quoted; the error's class if it is empty."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
