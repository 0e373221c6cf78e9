"""The progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_INTERVAL_S = 10.0


class Progress:
    """Shows the bytes, documents and tokens so far, their rates since this object was made, and the time left."""

    def __init__(self, verb: str, total_bytes: int, done: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Begin.

        Args:
            verb: The word for the work, like "verified".
            total_bytes: The bytes of all the work.
            done: The (bytes, documents, tokens) that earlier runs of the same work made.
        """
        self._on_terminal = sys.stderr.isatty()
        self._verb = verb
        self._bar = tqdm(
            desc=verb, total=total_bytes, initial=done[0], unit="B", unit_scale=True, disable=not self._on_terminal
        )
        self._total_bytes = total_bytes
        self._done_before = done
        self._began = self._line_printed = time.monotonic()

    def update(self, done: tuple[int, int, int]) -> None:
        """Show the (bytes, documents, tokens) so far."""
        now = time.monotonic()
        seconds = max(now - self._began, 1e-3)
        bytes_per_s, documents_per_s, tokens_per_s = (
            (current - before) / seconds for current, before in zip(done, self._done_before, strict=True)
        )
        rates = f"{documents_per_s:,.0f} documents/s, {tokens_per_s:,.0f} tokens/s"
        if self._on_terminal:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(done[0] - self._bar.n)
        elif now - self._line_printed >= LINE_INTERVAL_S:
            self._line_printed = now
            print(f"{self._verb} {self._how_far(done[0], bytes_per_s)}, {rates}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _how_far(self, done_bytes: int, bytes_per_s: float) -> str:
        speed = f"{bytes_per_s / 1e6:.2f} MB/s"
        left = tqdm.format_interval((self._total_bytes - done_bytes) / max(bytes_per_s, 1e-3))
        return f"{done_bytes / 1e6:,.1f} of {self._total_bytes / 1e6:,.1f} MB, {speed}, {left} left"
