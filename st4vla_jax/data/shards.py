"""Random reads from shards: byte ranges of TFRecords, records of array_record; thread-safe."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from st4vla_jax.data.tfrecord import ShardError

# Seconds between tries of a failed read: NFS and FUSE mounts recover in seconds, a lost disk never.
RETRY_DELAYS = (0.1, 0.5, 2.0)

_MAX_OPEN = 128  # shards held open; a mixture has thousands, a process may open 1024 files
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True)
class ShardState:
    """What an index knows of a shard: ``digest`` is a sha256 over its records' checksums."""

    name: str
    format: str
    size: int
    mtime_ns: int
    records: int = 0
    digest: str = ""

    @classmethod
    def of(cls, path: Path, file_format: str) -> ShardState:
        """State of a file now."""
        stat = path.stat()
        return cls(path.name, file_format, stat.st_size, stat.st_mtime_ns)


def open_array_record(path: Path) -> ArrayRecordReader:
    """Opens an array_record shard.

    Raises:
      ShardError: it is truncated, or not an array_record file.
      OSError: it cannot be read.
    """
    with path.open("rb"):  # the reader says "not found" and "broken" by the same exception
        pass
    reader = ArrayRecordReader(str(path), _RANDOM_ACCESS)
    if not reader.ok():  # a broken footer raises nothing: the file just seems to be empty
        raise ShardError(f"{path}: not a whole array_record file; fetch the file again")
    return reader


class _TfRecord:
    """An open TFRecord shard, closed when its last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.path, self._fd = path, -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, record: int, offset: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        del record
        return [self._range(offset + start, size) for start, size in ranges]

    def _range(self, start: int, size: int) -> bytes:
        data = os.pread(self._fd, size, start)
        while len(data) < size:  # signals and network mounts may cut a read short
            more = os.pread(self._fd, size - len(data), start + len(data))
            if not more:
                raise ShardError(f"{self.path}: ends before byte {start + size}; it was shortened")
            data += more
        return data

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class _ArrayRecord:
    """An open array_record shard; a record is read whole."""

    def __init__(self, path: Path) -> None:
        self.path, self._reader = path, open_array_record(path)

    def read(self, record: int, offset: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        del offset
        try:
            (data,) = self._reader.read([record])
        except (RuntimeError, ValueError, IndexError) as error:
            if "orrupted" in str(error):  # Riegeli's word for bytes that fail their checksum
                return [b"" for _ in ranges]
            raise OSError(f"{self.path} record {record}: {first_line(error)}") from None
        return [data[start : start + size] for start, size in ranges]


class ShardReader:
    """Reads from the shards of one data set, with retries; may be used by many threads.

    Args:
      root: folder of the shards.
      shards: as they were when indexed.
      delays: seconds to wait before each further try of a read that failed.
    """

    def __init__(
        self, root: Path, shards: Sequence[ShardState], delays: Sequence[float] = RETRY_DELAYS
    ) -> None:
        self._root, self._shards, self._delays = root, shards, tuple(delays)
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(
        self,
        shard: int,
        record: int,
        offset: int,
        ranges: Sequence[tuple[int, int]],
        check: Callable[[Sequence[bytes]], bool],
    ) -> list[bytes] | None:
        """Reads byte ranges of one record.

        Args:
          shard: its number.
          record: number in the shard.
          offset: where a TFRecord's data starts in the file.
          ranges: (first byte in the record, bytes) of each range.
          check: whether the bytes are as they were when indexed.

        Returns:
          The bytes; None if they fail ``check`` again and again while the file is unchanged.

        Raises:
          OSError: the last try failed too.
          ShardError: the shard changed since it was indexed.
        """
        failure: OSError | None = None
        for delay in (0.0, *self._delays):
            if delay:  # even sleep(0) would hand the interpreter to another thread
                time.sleep(delay)
            try:
                found = self._handle(shard).read(record, offset, ranges)
            except OSError as error:
                failure = error
            else:
                if check(found):
                    return found
                failure = None
            # A stale handle must not decide the next try; opening looks at size and mtime again.
            with self._lock:
                self._open.pop(shard, None)
        if failure is None:
            return None
        path = self._root / self._shards[shard].name
        raise OSError(
            failure.errno,
            f"{path}: record {record} cannot be read after {len(self._delays) + 1} tries "
            f"({failure})",
        ) from failure

    def _handle(self, shard: int) -> Any:
        """The open shard; evicted ones close when their last reader is done with them."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = self._checked(shard)
        with self._lock:
            handle = self._open.setdefault(shard, opened)
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return handle

    def _checked(self, shard: int) -> Any:
        state = self._shards[shard]
        path = self._root / state.name
        now = ShardState.of(path, state.format)
        if (now.size, now.mtime_ns) != (state.size, state.mtime_ns):
            raise ShardError(
                f"{path}: changed since it was indexed ({state.size} -> {now.size} bytes, mtime "
                f"{state.mtime_ns} -> {now.mtime_ns} ns); start again, so that it is indexed again"
            )
        return _TfRecord(path) if state.format == "tfrecord" else _ArrayRecord(path)


def first_line(error: Exception) -> str:
    """Short text of an error: array_record's quote pages of internals."""
    return str(error).splitlines()[0][:200] if str(error) else repr(error)
