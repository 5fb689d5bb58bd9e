"""An orderly end on signals: SystemExit, so that ``with`` and ``finally`` clean up.

By default SIGTERM ends a process on the spot, and unfinished folders stay behind.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGTERM, signal.SIGINT)
_AGAIN_S = 0.05
_SAME_S = 1.0


@contextlib.contextmanager
def orderly_end(code: int | None = None) -> Iterator[None]:
    """SIGTERM and SIGINT raise SystemExit here; what follows within a second is the same signal.

    (``timeout`` signals both the process and its group; the second one would end the cleaning.)

    Python drops what is raised within a callback of the garbage collector (JAX has one) or a
    ``__del__``; then the exit is raised again a moment later.

    Args:
      code: exit status; default: 128 + the signal's number, as shells count it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it gets signals
        return
    asked: SystemExit | None = None
    until = 0.0
    hook = sys.unraisablehook

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked, until
        if time.monotonic() >= until:
            until = time.monotonic() + _SAME_S
            asked = SystemExit(128 + number if code is None else code)
            raise asked

    def again(number: int, frame: FrameType | None) -> None:
        raise asked

    def dropped(unraisable: Any) -> None:
        if unraisable.exc_value is asked is not None:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            hook(unraisable)

    before = {number: signal.signal(number, end) for number in NUMBERS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
