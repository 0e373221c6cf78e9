"""Parts of a source that are left out: printed when they are met, and added up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from pretrain.data.text.faults import DAMAGE, SHOWN, Tally, is_too_many, too_many

SUMS = ("records", "empty", "filtered", "bad")
_WORDS = {"empty": "empty texts", "filtered": "by --filter", "bad": "without text or unreadable"}


def in_words(sums: Mapping[str, int]) -> str:
    """Return a sentence on what was left out; empty if nothing was."""
    gone = [f"{sums[name]:,} {words}" for name, words in _WORDS.items() if sums.get(name)]
    return f"left out, of {sums['records']:,} records: {', '.join(gone)}" if gone else ""


class Omissions:
    """The sums of many tallies, in the order of the source.

    Attributes:
        state: JSON, from which another process continues.
    """

    def __init__(
        self,
        files: Sequence[dict],
        max_bad_share: float,
        state: dict | None = None,
        note: Callable[[str], None] = lambda place: None,
    ) -> None:
        """Begin, or continue from `state`.

        Args:
            files: {"path", ...} of each file of the source.
            max_bad_share: The share of records that may be bad.
            state: The `state` of an earlier process.
            note: A function that takes each place that is left out.
        """
        self.state = {} if state is None else state
        if not self.state:
            self.state |= dict.fromkeys(SUMS, 0) | {"first": "", "file": 0, "kinds": {}}
        self._files = files
        self._max_bad_share = max_bad_share
        self._note = note

    @property
    def sums(self) -> dict[str, int]:
        """The number of records, and of those that gave no text: empty, filtered, bad."""
        return {name: self.state[name] for name in SUMS}

    @property
    def good(self) -> int:
        """The records that were not bad."""
        return self.state["records"] - self.state["bad"]

    def why_nothing(self, filters: Sequence[str]) -> str:
        """Explain why a source gave no document at all."""
        if not (records := self.state["records"]):
            return ""
        kinds = {f"left out by --filter {', '.join(filters)}": "filtered", "empty": "empty", "without text": "bad"}
        counts = [f"{self.state[name]:,} {kind}" for kind, name in kinds.items() if self.state[name]]
        first = f"; the first: {self.state['first']}" if self.state["first"] else ""
        return f" (of {records:,} records: {', '.join(counts)}{first})"

    def add(self, tally: Tally) -> None:
        """Add the tally of the part of the source that comes next; UserError if the bad records are too many."""
        for name in SUMS:
            self.state[name] += getattr(tally, name)
        for number in sorted({file for file, _ in (*tally.faults, *tally.more)}):
            self._go_to(number)
            kinds = self.state["kinds"]  # kind: [faults that were printed, other records]
            for fault in (fault for file, fault in tally.faults if file == number):
                counts = kinds.setdefault(fault.kind, [0, 0])
                if fault.kind == DAMAGE or counts[0] < SHOWN:
                    counts[0] += 1
                    self._report(fault.fault, fault.place)
                else:
                    counts[1] += fault.records
            for (file, kind), records in tally.more.items():
                if file == number:
                    kinds[kind][1] += records
        self._judge(at_end=False)

    def close(self) -> None:
        """Finish after the whole source was added; UserError if the bad records are too many."""
        self._go_to(None)
        self._judge(at_end=True)

    def _go_to(self, number: int | None) -> None:
        """Begin another file, and print how many more records of the one before were left out."""
        if number != self.state["file"]:
            for kind, (_, records) in self.state["kinds"].items():
                if records:
                    place = f"{self._files[self.state['file']]['path']}, {records:,} more records: {kind}"
                    self._report(place, place)
            self.state |= {"file": number, "kinds": {}}

    def _report(self, fault: str, place: str) -> None:
        self.state["first"] = self.state["first"] or fault
        print(f"left out: {fault}", file=sys.stderr, flush=True)
        self._note(place)

    def _judge(self, at_end: bool) -> None:
        bad, records = self.state["bad"], self.state["records"]
        if is_too_many(bad, records, self._max_bad_share, at_end=at_end):
            raise too_many(bad, records, self._max_bad_share, self.state["first"])
