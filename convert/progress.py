"""How long work shows itself: a bar on a terminal, plain lines in a file, nothing when asked."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LINE_EVERY_S = 10.0  # seconds between plain lines


class Progress:
    """Counts work done out of a total.

    Args:
        total: how much there is, in units.
        what: what is being done, a few words.
        unit: what is counted.
        done: what was done before, by a run that is gone on with.
        quiet: show nothing.
    """

    def __init__(
        self, total: int, what: str, unit: str = "image", done: int = 0, *, quiet: bool = False
    ) -> None:
        self.total = total
        self.what = what
        self.unit = unit
        self.done = self._first = done
        self._started = self._last_line = time.monotonic()
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit=f" {unit}s",
            initial=done,
            disable=quiet or self._lines,
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._bar.close()

    def add(self, count: int, note: str = "") -> None:
        """Count more work as done.

        Args:
            count: units.
            note: what to show beside the count, such as the loss.
        """
        self.done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._lines and (now - self._last_line >= LINE_EVERY_S or self.done == self.total):
            self._last_line = now
            print(self._line(now, note), file=sys.stderr, flush=True)

    def _line(self, now: float, note: str) -> str:
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        note = f", {note}" if note else ""
        counted = f"{self.what}: {self.done}/{self.total} {self.unit}s"
        return f"{counted}, {rate:.1f} {self.unit}s/s, {left:.0f} s left{note}"


def progress(
    items: Iterable[Item], total: int, what: str, unit: str = "image", *, quiet: bool = False
) -> Iterator[Item]:
    """Go through items and show how far: the short form, where each item counts as one."""
    with Progress(total, what, unit, quiet=quiet) as shown:
        for item in items:
            yield item
            shown.add(1)
