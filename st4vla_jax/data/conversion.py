"""Runs a conversion shard by shard: resumable after a kill, complete under its name or not there.

``OUT`` appears when everything is written and counted.  Until then the work is in the hidden
sibling ``.OUT.converting``: finished shards, each with a note of its size and sha256.  The same
command goes on from there; it keeps shards that still fit their notes and makes the others anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from st4vla_jax.data.index_folder import digest, sync
from st4vla_jax.data.source_files import file_stamps
from st4vla_jax.data.tfds_write import (
    ShardWriter,
    WrittenShard,
    file_hash,
    shard_name,
    write_description,
    write_json,
)

MANIFEST = "conversion.json"

_FORMAT_VERSION = 1
_SOFTWARE = ("array_record", "pillow", "numpy")  # what the bytes of a shard depend on
_PROGRESS_SECONDS = 5.0
_LOG = logging.getLogger(__name__)


class ConversionError(ValueError):
    """Data that cannot be converted, or a folder in the way; says what to do."""


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """One shard to write.

    Attributes:
      split, number: its place; the number of shards of the split follows from the plan.
      records: how many the source says there are; None if it does not.
      read: yields (serialised record, its steps) from the start, the same every time.
    """

    split: str
    number: int
    records: int | None
    read: Callable[[], Iterator[tuple[bytes, int]]]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is read and written; an equal one gives equal shards, byte for byte.

    Attributes:
      source: the folder or file that is converted; sources: the files that are read.
      format: rlds, lerobot, hdf5 or grounding.
      name, version: of the data set; features: features.json.
      shards: in order.
      settings: JSON-able; what else decides the result.
      left_out: what of the source is not converted, by name.
      info: further keys of dataset_info.json; files: further files, name -> contents.
    """

    source: Path
    sources: tuple[Path, ...]
    format: str
    name: str
    version: str
    features: Mapping[str, Any]
    shards: tuple[PlannedShard, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def shard_name(self, shard: PlannedShard) -> str:
        """File name of a shard."""
        count = sum(other.split == shard.split for other in self.shards)
        return shard_name(self.name, shard.split, shard.number, count)

    def plan(self, stamps: Sequence[Sequence[Any]]) -> str:
        """sha256 of all that decides the result."""
        shards = [(self.shard_name(shard), shard.records) for shard in self.shards]
        about = [self.format, self.version, self.features, dict(self.settings), self.left_out]
        return digest(_FORMAT_VERSION, stamps, shards, about)


def run(conversion: Conversion, out: Path, threads: int = 2) -> dict[str, Any]:
    """Writes the converted folder, or finds it finished; returns its manifest.

    Args:
      conversion: what to do.
      out: folder to make.
      threads: shards written at the same time.

    Raises:
      ConversionError: the data are broken (all shards named), counts differ, ``out`` is taken, or
        another conversion is in the way.
      OSError: a file cannot be read or written; nothing is left that looks complete.
    """
    out = out.absolute()
    stamps = file_stamps(conversion.sources)
    plan = conversion.plan(stamps)
    work = out.with_name(f".{out.name}.converting")
    if out.exists():
        manifest = _finished(out, plan)
        shutil.rmtree(work, ignore_errors=True)
        return manifest
    (work / "data").mkdir(parents=True, exist_ok=True)
    with _alone(work):
        _check_plan(work, plan)
        hashes = _source_hashes(work, conversion, stamps, threads)
        written = _Shards(conversion, work, threads).write()
        if file_stamps(conversion.sources) != stamps:
            raise ConversionError(f"{conversion.source}: changed meanwhile; delete {work}")
        manifest = _manifest(conversion, plan, hashes, written)
        _complete(conversion, work, manifest)
        (work / "data").rename(out)
        sync(out.parent)
        shutil.rmtree(work, ignore_errors=True)
    _LOG.info("%s: complete, %s", out, _summary(manifest))
    return manifest


def _finished(out: Path, plan: str) -> dict[str, Any]:
    """The manifest of a finished conversion of the same plan, its files' sizes checked."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{out}: already there, and no conversion; give another") from None
    if manifest["plan"] != plan:
        raise ConversionError(
            f"{out}: converted from other data or with other settings; give another, or delete it"
        )
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    broken = [s["name"] for s in shards if not _has_size(out / s["name"], s["size"])]
    if broken:
        raise ConversionError(f"{out}: missing or of another size: {', '.join(broken)}; delete it")
    _LOG.info("%s: already complete, %s", out, _summary(manifest))
    return manifest


def _summary(manifest: Mapping[str, Any]) -> str:
    splits = manifest["splits"].items()
    return "; ".join(
        f"{name}: {split['records']} records of {split['steps']} steps in {len(split['shards'])} "
        "shards"
        for name, split in splits
    )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Holds the lock of a work folder; the kernel frees it when its holder dies."""
    with (work / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"{work}: another process converts there; wait for it") from None
        yield


def _check_plan(work: Path, plan: str) -> None:
    path = work / "plan.json"
    if not path.exists():
        write_json(path, plan)
    elif json.loads(path.read_text(encoding="utf-8")) != plan:
        raise ConversionError(
            f"{work}: an unfinished conversion of other data, or with other settings; finish it by "
            "its own command, or delete it"
        )


def _source_hashes(
    work: Path, conversion: Conversion, stamps: Sequence[Sequence[Any]], threads: int
) -> list[dict[str, Any]]:
    """Path, size and sha256 of each source file; from the last run where there was one."""
    path = work / "sources.json"
    if not path.exists():
        size = sum(stamp[1] for stamp in stamps)
        _LOG.info("hashing %d source files, %.2f GB", len(stamps), size / 1e9)
        root = conversion.source if conversion.source.is_dir() else conversion.source.parent
        with ThreadPoolExecutor(threads) as pool:
            hashes = list(pool.map(file_hash, conversion.sources))
        rows = [
            {"path": str(_relative(file, root)), "size": stamp[1], "sha256": value}
            for file, stamp, value in zip(conversion.sources, stamps, hashes, strict=True)
        ]
        write_json(path, rows)
    return json.loads(path.read_text(encoding="utf-8"))


def _relative(path: Path, root: Path) -> Path:
    path, root = path.absolute(), root.absolute()
    return path.relative_to(root) if path.is_relative_to(root) else path


class _Shards:
    """Writes the shards that are not there yet, several at a time."""

    def __init__(self, conversion: Conversion, work: Path, threads: int) -> None:
        self._conversion, self._work, self._threads = conversion, work, threads
        self._stop = threading.Event()
        self._progress = _Progress(len(conversion.shards))

    def write(self) -> list[dict[str, Any]]:
        """Rows of the manifest, in the plan's order."""
        (self._work / "notes").mkdir(exist_ok=True)
        with ThreadPoolExecutor(self._threads) as pool:
            futures = [pool.submit(self._shard, shard) for shard in self._conversion.shards]
            problems = self._wait(futures)
        if problems:
            raise ConversionError("\n  ".join([f"{self._conversion.source}:", *problems]))
        return [future.result() for future in futures]

    def _wait(self, futures: Sequence[Future[dict[str, Any]]]) -> list[str]:
        """What is wrong with the data of each shard; an I/O error ends all at once."""
        problems = []
        try:
            for future in futures:
                try:
                    future.result()
                except ValueError as error:
                    problems.append(str(error))
        except BaseException:
            self._stop.set()
            for future in futures:
                future.cancel()
            raise
        return problems

    def _shard(self, shard: PlannedShard) -> dict[str, Any]:
        """Writes one shard, or finds it finished; returns its row of the manifest."""
        path = self._work / "data" / self._conversion.shard_name(shard)
        note = self._work / "notes" / f"{path.name}.json"
        if (row := _kept(path, note)) is None:
            path.unlink(missing_ok=True)
            row = self._write(shard, path)
            write_json(note, row)
        self._progress.finished(row)
        return row

    def _write(self, shard: PlannedShard, path: Path) -> dict[str, Any]:
        steps = 0
        with ShardWriter(path) as writer:
            for record, count in shard.read():
                if self._stop.is_set():
                    raise ConversionError(f"{path.name}: stopped")
                writer.write(record)
                steps += count
                self._progress.wrote(len(record))
            if shard.records not in (None, writer.records):
                raise ConversionError(
                    f"{path.name}: the source says {shard.records} records, {writer.records} were "
                    "read"
                )
        written: WrittenShard = writer.written
        return {**dataclasses.asdict(written), "split": shard.split, "steps": steps}


def _kept(path: Path, note: Path) -> dict[str, Any] | None:
    """The row of a shard that is finished and as it was written."""
    try:
        row = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    sound = _has_size(path, row["size"]) and file_hash(path) == row["sha256"]
    return row if sound else None


class _Progress:
    """Says every few seconds how far it is; used by several threads."""

    def __init__(self, shards: int) -> None:
        self._lock = threading.Lock()
        self._shards, self._done, self._records, self._bytes = shards, 0, 0, 0
        self._start = self._said = time.monotonic()

    def wrote(self, size: int) -> None:
        """Counts a record."""
        with self._lock:
            self._records, self._bytes = self._records + 1, self._bytes + size
            self._say(False)

    def finished(self, row: Mapping[str, Any]) -> None:
        """Counts a shard."""
        with self._lock:
            self._done += 1
            self._say(self._done == self._shards)

    def _say(self, now: bool) -> None:
        moment = time.monotonic()
        if now or moment - self._said >= _PROGRESS_SECONDS:
            self._said = moment
            seconds = max(moment - self._start, 1e-3)
            _LOG.info(
                "%d of %d shards; %d records, %.2f GB written, %.1f MB/s",
                self._done, self._shards, self._records, self._bytes / 1e9,
                self._bytes / 1e6 / seconds,
            )  # fmt: skip


def _manifest(
    conversion: Conversion,
    plan: str,
    hashes: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    for row in rows:
        split = splits.setdefault(row["split"], {"records": 0, "steps": 0, "shards": []})
        split["records"] += row["records"]
        split["steps"] += row["steps"]
        split["shards"].append({key: value for key, value in row.items() if key != "split"})
    return {
        "format_version": _FORMAT_VERSION,
        "plan": plan,
        "name": conversion.name,
        "version": conversion.version,
        "format": conversion.format,
        "settings": dict(conversion.settings),
        "left_out": list(conversion.left_out),
        "sources": list(hashes),
        "splits": splits,
        "software": {name: importlib.metadata.version(name) for name in _SOFTWARE},
    }


def _complete(conversion: Conversion, work: Path, manifest: Mapping[str, Any]) -> None:
    """Writes what describes the shards, all of it on disk."""
    data = work / "data"
    for path in data.glob("*.part"):  # of a run that was killed
        path.unlink()
    fields = [field.name for field in dataclasses.fields(WrittenShard)]
    splits = {
        name: [WrittenShard(*(shard[field] for field in fields)) for shard in split["shards"]]
        for name, split in manifest["splits"].items()
    }
    for name, content in conversion.files.items():
        (data / name).write_bytes(content)
        sync(data / name)
    write_description(
        data, conversion.name, conversion.version, conversion.features, splits, conversion.info
    )
    write_json(data / MANIFEST, manifest)
    sync(data)
