"""How far a run is: a bar with its remaining time on a terminal, plain lines in a log."""

from __future__ import annotations

import collections
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

_BAR = 24  # characters
_REDRAW = 0.1  # seconds
_RECENT = 200  # steps that the rate is measured over


class Progress:
    """Progress of steps ``first_step`` .. ``num_steps`` - 1."""

    def __init__(
        self,
        first_step: int,
        num_steps: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock; ``stream`` defaults to stderr, on which a terminal gets the bar."""
        self._stream = sys.stderr if stream is None else stream
        self._terminal, self._clock = self._stream.isatty(), clock
        self._done, self._total = first_step, num_steps
        self._times: collections.deque = collections.deque(maxlen=_RECENT)
        self._drawn, self._shown = -1.0, ""

    def advance(self, done: int) -> None:
        """``done`` updates of the run are done; draws on terminals only, and not too often."""
        now = self._clock()
        self._done = done
        self._times.append((done, now))
        if self._terminal and (now - self._drawn >= _REDRAW or done >= self._total):
            self._draw(now)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Shows numbers: from now on behind the bar, or as one line of a log."""
        self._shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self._terminal:
            self._draw(self._clock())
        else:
            share = self._done / max(self._total, 1)
            self._print(f"step {self._done}/{self._total} ({share:.1%}, {self._left()})"
                        f"  {self._shown}\n")  # fmt: skip

    def line(self, text: str) -> None:
        """A message of its own line, above the bar if there is one."""
        self._print(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        if self._terminal:
            self._draw(self._clock())

    def close(self) -> None:
        """Leaves the bar behind; safe to call twice."""
        if self._terminal and self._drawn >= 0:
            self._print("\n")
            self._drawn = -1.0

    def remaining(self) -> float | None:
        """Seconds to the end at the recent rate; None before two steps are done."""
        if len(self._times) < 2:
            return None
        (first, start), (last, end) = self._times[0], self._times[-1]
        return (self._total - last) * (end - start) / max(last - first, 1)

    def _left(self) -> str:
        seconds = self.remaining()
        return "ETA ?" if seconds is None else f"ETA {duration(seconds)}"

    def _draw(self, now: float) -> None:
        share = min(1.0, self._done / max(self._total, 1))
        bar = ("#" * round(share * _BAR)).ljust(_BAR, ".")
        text = f"[{bar}] {self._done}/{self._total} {self._left()}  {self._shown}"
        # A line that wraps could not be drawn over.
        self._print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        self._drawn = now

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as ``3 d 4 h``, ``2 h 05 min``, ``1 min 20 s`` or ``12 s``."""
    seconds = max(0, round(seconds))
    days, hours, minutes = seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds % 60:02} s" if minutes else f"{seconds} s"
