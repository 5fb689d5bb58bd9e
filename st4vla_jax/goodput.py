"""Where a run's time goes: seconds lost by cause over all restarts, time of a step, memory."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

STATE_FILE = "goodput.json"
# startup: before the first step; restart: from the last sign of life of the process before this
# one; redo: steps done a second time, since the last checkpoint was older.
KINDS = ("startup", "compile", "data", "save", "evaluate", "restart", "redo")
_MARKS = 512  # heartbeats kept: a checkpoint older than that many is dated too late
_GIB = 2**30
_LOG = logging.getLogger(__name__)


class Goodput:
    """Seconds of a run by what they went to; what is not lost is productive.

    The account is kept in ``workdir/goodput.json`` by process 0, so that it goes on after a
    restart; other processes count since their own start.
    """

    def __init__(
        self,
        workdir: Path | str,
        *,
        process_index: int,
        first_step: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the account; time since its last `heartbeat` is lost to the restart.

        Args:
          workdir: folder of the run; must exist.
          process_index: of this process.
          first_step: the next step; those after it that were done before are lost as "redo".
          clock: seconds that go on while no process runs.
        """
        self._path = None if process_index else Path(workdir) / STATE_FILE
        self._clock = clock
        now = clock()
        self.lost = dict.fromkeys(KINDS, 0.0)
        self._started = now
        self._marks: list[list[float]] = []  # [step, productive seconds up to it]
        self._open: list[float] = []  # seconds lost inside each open `losing`
        state = self._read()
        if state is not None:
            self._resume(state, first_step, now)

    def _resume(self, state: dict[str, Any], first_step: int, now: float) -> None:
        self._started = state["started"]
        self.lost |= {kind: state["lost"].get(kind, 0.0) for kind in KINDS}
        self.lost["restart"] += max(now - state["last"], 0.0)
        marks = state["marks"]
        self._marks = [mark for mark in marks if mark[0] <= first_step]
        if marks:
            kept = self._marks[-1][1] if self._marks else 0.0
            self.lost["redo"] += max(marks[-1][1] - kept, 0.0)

    def _read(self) -> dict[str, Any] | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
            if {"started", "last", "lost", "marks"} <= state.keys():
                return state
        except (ValueError, AttributeError):
            pass
        _LOG.warning("%s: not readable; goodput is counted from now on", self._path)
        return None

    @contextlib.contextmanager
    def losing(self, kind: str) -> Iterator[None]:
        """Books the time inside to one of KINDS; inside another one, to the inner one alone."""
        if kind not in self.lost:
            raise ValueError(f"unknown kind of lost time {kind!r}: one of {', '.join(KINDS)}")
        start = self._clock()
        self._open.append(0.0)
        try:
            yield
        finally:
            inner, spent = self._open.pop(), self._clock() - start
            self.lost[kind] += spent - inner
            if self._open:
                self._open[-1] += spent

    def heartbeat(self, step: int) -> None:
        """Notes that ``step`` updates are done; at every log step and before every save."""
        if self._path is None:
            return
        now = self._clock()
        productive = now - self._started - sum(self.lost.values())
        self._marks = [*self._marks, [int(step), productive]][-_MARKS:]
        state = {"started": self._started, "last": now, "lost": self.lost, "marks": self._marks}
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.replace(self._path)

    def metrics(self) -> dict[str, float]:
        """``goodput/ratio`` (productive over all), ``goodput/total`` and a second count a kind."""
        total = max(self._clock() - self._started, 1e-9)
        lost = sum(self.lost.values())
        return {
            "goodput/ratio": max(0.0, 1 - lost / total),
            "goodput/total": total,
            **{f"goodput/{kind}": seconds for kind, seconds in self.lost.items()},
        }


class StepTimer:
    """Time of a step and rates since the last report.

    Steps are dispatched ahead of the device, so only the mean over the steps between two points
    where the host waited for results means anything: call `report` there.
    """

    def __init__(self, goodput: Goodput, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts counting; compiling, saving and evaluating come from ``goodput``."""
        self._goodput, self._clock = goodput, clock
        self._begin()

    def _begin(self) -> None:
        self._start, self._steps = self._clock(), 0
        self._counts: dict[str, float] = {}
        self._before = dict(self._goodput.lost)

    def step(self, **counts: float) -> None:
        """One update is dispatched, of so many samples, tokens, flops and so on."""
        self._steps += 1
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + count

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report, then counts anew.

        Returns:
          ``time/step`` seconds a step with its wait for data, without compiling, saving and
          evaluating; ``data/wait`` seconds of it; ``rate/NAME`` counts a second.  Nothing if there
          was no step.
        """
        steps, counts = self._steps, self._counts
        lost = {kind: s - self._before[kind] for kind, s in self._goodput.lost.items()}
        elapsed = self._clock() - self._start
        self._begin()
        if not steps:
            return {}
        wait = lost.pop("data")
        elapsed = max(elapsed - sum(lost.values()), 1e-9)
        return {
            "time/step": elapsed / steps,
            "data/wait": wait / steps,
            **{f"rate/{name}": count / elapsed for name, count in counts.items()},
        }


def memory_metrics(devices: Sequence[Any] | None = None) -> dict[str, float]:
    """Memory in GiB: ``memory/device``, ``device_peak`` and ``device_limit``, and of the host.

    Args:
      devices: default: this process's.  The fullest one is reported; CPUs keep no count.

    Returns:
      the device numbers where there are any, ``memory/host`` (resident now; Linux only) and
      ``memory/host_peak``.
    """
    devices = jax.local_devices() if devices is None else devices
    found = [stats for stats in (device.memory_stats() for device in devices) if stats]
    names = {"device": "bytes_in_use", "device_peak": "peak_bytes_in_use",
             "device_limit": "bytes_limit"}  # fmt: skip
    metrics = {
        f"memory/{name}": max(stats[key] for stats in found) / _GIB
        for name, key in names.items()
        if found and all(key in stats for stats in found)
    }
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        metrics["memory/host"] = pages * resource.getpagesize() / _GIB
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    metrics["memory/host_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
    return metrics
