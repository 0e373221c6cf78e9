"""Sources that give no text: damage, and records that are not what was asked for; and how many of them are too many."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pretrain.errors import UserError

DAMAGE = "is damaged"  # of what holds an unknown number of records
SHOWN = 10  # of the records of one file that are bad in the same way; the others are counted
FEW = 10  # this many bad records are never too many, unless none may be
JUDGED_RECORDS = 10_000  # of fewer, no share is told before the end


class Fault(UserError):
    """A record or a place of a source that gives no text.

    place: where, for people; kind: what is wrong, in the words that all such faults share; reason: what is wrong with
    this one; records: how many it stands for; before: the good records that came before it, as far as is known.
    """

    before = 0

    def __init__(self, place: str, kind: str, reason: str, advice: str = "", records: int = 1) -> None:
        super().__init__(place, kind, reason, advice, records)  # of which pickle makes it again
        self.place = place
        self.kind = kind
        self.reason = reason
        self.advice = advice
        self.records = records

    def __str__(self) -> str:
        return f"{self.fault}. {self.advice}".rstrip()

    @property
    def fault(self) -> str:
        return f"{self.place}, {self.reason}"


class BadRecord(Fault):
    """A record that can be read and has no such field, or something else in it."""


class BadTable(BadRecord):
    """A whole file none of whose records has such a field."""

    @property
    def fault(self) -> str:
        return f"{self.place} {self.reason}"


class NullText(BadRecord):
    """A record that says that it has no text: it is left out without being asked, and counted."""


class Unreadable(Fault):
    """Damage at `place`; what comes after it may be whole."""

    def __init__(self, place: str, reason: str, kind: str = DAMAGE) -> None:
        super().__init__(place, kind, reason, "Mend or leave out the file.")
        self.args = (place, reason, kind)

    @property
    def fault(self) -> str:
        return f"cannot read {self.place}: {self.reason}"


@dataclass
class Tally:
    """A count of the records that gave no text.

    records: all that were looked at; empty: with a text of no characters; filtered: left out by --filter; faults:
    (number of the file, fault) in order, all DAMAGE and of each other kind the first SHOWN of a file; more: how many
    records were left out beyond those, by (number of the file, kind).
    """

    records: int = 0
    empty: int = 0
    filtered: int = 0
    faults: list[tuple[int, Fault]] = field(default_factory=list)
    more: Counter = field(default_factory=Counter)
    _seen: Counter = field(default_factory=Counter)

    def add(self, file: int, fault: Fault) -> None:
        """Count a fault of a record that is counted in `records`, or of a place."""
        self.records += fault.records - 1
        self._seen[file, fault.kind] += 1
        if fault.kind == DAMAGE or self._seen[file, fault.kind] <= SHOWN:
            self.faults.append((file, fault))
        else:
            self.more[file, fault.kind] += fault.records

    @property
    def bad(self) -> int:
        """The records that `faults` and `more` stand for."""
        return sum(fault.records for _, fault in self.faults) + self.more.total()


def is_too_many(bad: int, records: int, share: float, *, at_end: bool) -> bool:
    """Return whether `bad` of `records` records are more than `share` of them, as far as that can be said by now."""
    if not share:
        return bad > 0
    return (at_end or records >= JUDGED_RECORDS) and bad > FEW and bad > share * records


def too_many(bad: int, records: int, share: float, first: str) -> UserError:
    """Return the error for too many of them; `first` describes the first one."""
    return UserError(
        f"{bad:,} of the {records:,} records read so far give no text ({bad / max(records, 1):.1%}; the first: {first}), "
        f"and --max-bad-records {share:g} allows a share of {share:g}. Set --text-field or --source so that they are "
        "what was meant, or allow more with --max-bad-records."
    )


def advice_on(fault: Fault, records_before: int) -> UserError:
    """Return the error for a fault that was not to be left out, after so many good records."""
    if isinstance(fault, Unreadable):
        return UserError(
            f"{fault.fault}. Mend or leave out the file (the work then starts from the beginning), or go on without what is "
            "unreadable: --skip-unreadable."
        )
    if records_before:
        return UserError(
            f"{fault.fault}, although the {records_before:,} records before it have what is asked for. "
            "--skip-unreadable leaves such records out, and lists them."
        )
    return UserError(f"{fault} If other records are as they should be, --skip-unreadable leaves such ones out.")
