"""Faults of sources: damage, records without the text that was asked for, and the share of them that is too large."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pretrain.errors import UserError

DAMAGE = "is damaged"  # the kind of a fault in a part with an unknown number of records
SHOWN = 10  # bad records of one kind in one file; the others are counted
FEW = 10  # this many bad records are never too many, unless none may be
JUDGED_RECORDS = 10_000  # a share of fewer is not judged before the end


class Fault(UserError):
    """A record or a place of a source that gives no text.

    Attributes:
        place: Its place, for people.
        kind: The words that all faults of this kind share.
        reason: The words on this one.
        advice: What to do about it.
        records: The number of records that it stands for.
        before: The good records that came before it, as far as is known.
    """

    before = 0

    def __init__(self, place: str, kind: str, reason: str, advice: str = "", records: int = 1) -> None:
        super().__init__(place, kind, reason, advice, records)  # from these, pickle makes it again
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
    """A record that can be read, but lacks the field or holds no text in it."""


class BadTable(BadRecord):
    """A whole file in which no record has the field."""

    @property
    def fault(self) -> str:
        return f"{self.place} {self.reason}"


class NullText(BadRecord):
    """A record whose text is null: it is always left out, and counted."""


class Unreadable(Fault):
    """Damage at `place`; the rest of the source may be whole."""

    def __init__(self, place: str, reason: str, kind: str = DAMAGE) -> None:
        super().__init__(place, kind, reason, "Mend or leave out the file.")
        self.args = (place, reason, kind)

    @property
    def fault(self) -> str:
        return f"cannot read {self.place}: {self.reason}"


@dataclass
class Tally:
    """A count of the records that gave no text.

    Attributes:
        records: All records.
        empty: Those whose text has no characters.
        filtered: Those left out by --filter.
        faults: (number of the file, fault) in order: all DAMAGE, and of each other kind the first SHOWN of a file.
        more: The number of records left out beyond those, by (number of the file, kind).
    """

    records: int = 0
    empty: int = 0
    filtered: int = 0
    faults: list[tuple[int, Fault]] = field(default_factory=list)
    more: Counter[tuple[int, str]] = field(default_factory=Counter)
    _seen: Counter[tuple[int, str]] = field(default_factory=Counter)

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
    """Return whether `bad` of `records` records are more than `share` of them, as far as that can be judged by now."""
    if not share:
        return bad > 0
    return (at_end or records >= JUDGED_RECORDS) and bad > FEW and bad > share * records


def too_many(bad: int, records: int, share: float, first: str) -> UserError:
    """Return the error for too many bad records; `first` describes the first one."""
    return UserError(
        f"{bad:,} of the {records:,} records read so far give no text ({bad / max(records, 1):.1%}; the first: {first}), "
        f"and --max-bad-records {share:g} allows a share of {share:g}. Set --text-field or --source so that they are "
        "what was meant, or allow more with --max-bad-records."
    )


def advice_on(fault: Fault, records_before: int) -> UserError:
    """Return the error for a fault that is not skipped, after `records_before` good records."""
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
