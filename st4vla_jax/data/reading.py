"""Reading one sample so that nothing fails or hangs in silence.

Three kinds of trouble (DESIGN.md D6): a bad record becomes padding in its scheduled slot, counted
and named; a transient I/O error is retried, then raised; a read that does not return is announced,
then given up.  None of them changes which samples a batch holds.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from st4vla_jax.data.source import BadRecordError, Sample, Source

_LOG = logging.getLogger(__name__)
_NAMED = 10  # bad records in an error message

T = TypeVar("T")


class ReadError(RuntimeError):
    """Data that cannot be read any more; names data set and record, and says what to do."""


@dataclasses.dataclass(frozen=True)
class ReadPolicy:
    """When to give up.

    Attributes:
      max_bad_records: distinct bad records that may become padding on this host.
      retries: after an OSError; backoff_s: before the first one, then doubled.
      warn_s, limit_s: a read of one sample is announced, then given up, after so many seconds.
    """

    max_bad_records: int = 100
    retries: int = 3
    backoff_s: float = 1.0
    warn_s: float = 60.0
    limit_s: float = 600.0


class BadRecords:
    """The bad records met so far, each counted once; thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._found: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()

    def add(self, source: str, index: int, error: BadRecordError) -> None:
        """Counts and names one; raises ReadError above the limit."""
        with self._lock:
            if (source, index) not in self._found:
                self._found[source, index] = str(error)
                _LOG.warning(
                    "%s[%d] becomes padding, bad record %d of at most %d: %s",
                    source, index, len(self._found), self._limit, error,
                )  # fmt: skip
            if len(self._found) > self._limit:
                shown = "\n  ".join(list(self._found.values())[-_NAMED:])
                raise ReadError(
                    f"{len(self._found)} bad records, max_bad_records is {self._limit}; the last:\n"
                    f"  {shown}\nmend the data and index it anew, or raise max_bad_records"
                ) from error

    def names(self) -> list[str]:
        """One message for each."""
        with self._lock:
            return list(self._found.values())


def read(source: Source, index: int, policy: ReadPolicy) -> Sample:
    """``source[index]``, tried again after an OSError.

    Raises:
      BadRecordError: as the source does.
      ReadError: the last OSError, named; it never becomes padding, since another run might read
        the record and so train on another batch.
    """
    pause = policy.backoff_s
    for _ in range(policy.retries):
        try:
            return source[index]
        except OSError as error:
            _LOG.warning("%s[%d]: %s; trying again", source.name, index, error)
        time.sleep(pause)
        pause *= 2
    try:
        return source[index]
    except OSError as error:
        raise ReadError(
            f"{source.name}[{index}]: {error} (tried {policy.retries + 1} times); check the disk "
            "or the mount, then run the same command again"
        ) from error


class Task:
    """What a reader works on: the name of the present read, and since when (monotonic seconds)."""

    def __init__(self, work: Callable[[Task], Any]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        self.name, self.since = "", time.monotonic()

    def starts(self, name: str) -> None:
        """Tells that a read begins; the watchdog counts from here."""
        self.name, self.since = name, time.monotonic()

    def run(self) -> None:
        try:
            self._result = self._work(self)
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        self._done.set()

    def wait(self, policy: ReadPolicy) -> Any:
        """The result or the error of the work; ReadError once a read is over its limit."""
        warned: tuple[str, float] | None = None
        while True:
            spent = time.monotonic() - self.since
            due = policy.warn_s if warned != (self.name, self.since) else policy.limit_s
            if self._done.wait(max(min(due - spent, policy.warn_s), 0.001)):
                if self._error is not None:
                    raise self._error
                return self._result
            name, since = self.name, self.since
            spent = time.monotonic() - since
            if spent >= policy.limit_s:
                raise ReadError(
                    f"reading {name} has not returned for {spent:.0f} s; check the disk or the "
                    "mount, then run the same command again"
                )
            if spent >= policy.warn_s and warned != (name, since):
                warned = (name, since)
                _LOG.warning(
                    "reading %s has not returned for %.0f s; giving up at %.0f s",
                    name, spent, policy.limit_s,
                )  # fmt: skip


class Readers:
    """Daemon threads that do the reads, so that one that hangs keeps nothing else from ending."""

    def __init__(self, count: int, policy: ReadPolicy) -> None:
        self._policy = policy
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._serve, name=f"reader-{number}", daemon=True).start()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.starts(task.name)
            task.run()

    def run(self, work: Callable[[Task], T]) -> T:
        """Runs ``work`` in a reader and waits under the policy's limits."""
        task = Task(work)
        self._tasks.put(task)
        return task.wait(self._policy)

    def close(self) -> None:
        """Lets the threads end once they are idle."""
        for _ in range(self._count):
            self._tasks.put(None)
