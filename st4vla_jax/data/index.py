"""Sidecar index of episodes over existing shards: byte ranges of images, columns as .npy files.

One pass over the shards checks every record's checksum and keeps about 80 bytes a step, memory-
mapped by all who read (spec data.md section 2.3).  Its folder's name tells the shards' sizes and
times and the columns, so that what has changed is never read through an old index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st4vla_jax.data.episode_scan import IMAGE, Episode, Plan, is_packed, make_plan, scan_episode
from st4vla_jax.data.index_folder import (
    ArrayWriter,
    build_once,
    cache_root,
    digest,
    open_array,
    read_manifest,
)
from st4vla_jax.data.shards import ShardState, first_line, open_array_record
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.tfds_folder import Shard, TfdsFolder, record_count_problem
from st4vla_jax.data.tfrecord import ExampleError, ShardError, masked_crc32c, read_records

FORMAT_VERSION = 1  # of the index's files; part of every folder's name

EPISODE = np.dtype(
    [
        ("shard", "<i4"),
        ("record", "<i4"),  # number in the shard
        ("offset", "<i8"),  # where the record's data starts in a TFRecord file
        ("start", "<i8"),  # first step, counted over the whole index
        ("steps", "<i4"),
        ("content", "<u8"),  # hash of the steps' numbers and texts
    ]
)

_PROGRESS_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that the index leaves out, and why."""

    shard: str
    record: int
    reason: str

    def __str__(self) -> str:
        return f"{self.shard} record {self.record}: {self.reason}"


class StepIndex:
    """Opened index: E episodes of N steps together.

    Attributes:
      folder: where it is; shards: as they were when indexed; bad: records left out.
      episodes: EPISODE[E]; language: i32[N] index into `instructions`.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise FileNotFoundError(f"{folder}: no complete index; open the data set again")
        self.folder = folder
        self.shards = tuple(ShardState(**shard) for shard in manifest["shards"])
        self.bad = tuple(BadRecord(**bad) for bad in manifest["bad"])
        self._columns: dict[str, bool] = manifest["columns"]  # path -> packed
        self._images: list[str] = manifest["images"]
        self.episodes = open_array(folder / "episodes.npy")
        self.language = open_array(folder / "language.npy")

    @functools.cached_property
    def instructions(self) -> list[str]:
        """The distinct instructions."""
        return json.loads((self.folder / "instructions.json").read_text(encoding="utf-8"))

    def images(self, path: str) -> np.ndarray:
        """IMAGE[N] of a camera's column path."""
        return open_array(self.folder / f"image.{self._images.index(path)}.npy")

    def columns(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields {path: [T,...]} episode by episode; packed columns are object[T] of bytes."""
        arrays, blobs = {}, {}
        for i, (path, packed) in enumerate(self._columns.items()):
            arrays[path] = open_array(self.folder / f"column.{i}.npy")
            if packed:
                blobs[path] = open_array(self.folder / f"column.{i}.bytes.npy")
        for episode in self.episodes:
            rows = slice(int(episode["start"]), int(episode["start"] + episode["steps"]))
            yield {
                path: _unpacked(array[rows], blobs[path]) if path in blobs else array[rows]
                for path, array in arrays.items()
            }

    def record_name(self, episode: int) -> str:
        """File and record of an episode, for messages."""
        row = self.episodes[episode]
        return f"{self.shards[row['shard']].name} record {row['record']}"


def open_index(
    folder: TfdsFolder,
    split: str,
    *,
    images: Sequence[str],
    columns: Sequence[str],
    language: str,
    language_encoding: str = "text",
    index_dir: str | Path | None = None,
) -> StepIndex:
    """Opens the index of a split, building it first if there is none for its shards as they are.

    Args:
      folder: the data set.
      split: a split's name, or `tfds_folder.ALL_SPLITS`.
      images: column paths of cameras.
      columns: paths of low-dimensional columns.
      language: path of the instruction.
      language_encoding: see `primitives.decode_instruction`.
      index_dir: see `index_folder.cache_root`.

    Raises:
      FolderError: no such split or columns.
      ShardError: shards that are truncated or broken (all named), or changed meanwhile.
      OSError: a shard cannot be read, or the index cannot be written.
    """
    plan = make_plan(folder, images, columns, language, language_encoding)
    shards = folder.shards(split)
    states = [ShardState.of(shard.path, shard.format) for shard in shards]
    key = digest(
        FORMAT_VERSION,
        [dataclasses.astuple(state) for state in states],
        [plan.images, list(plan.columns), language, language_encoding],
        [dataclasses.astuple(c) for c in (*plan.columns.values(), plan.language[1])],
        list(plan.hashed),
    )
    target = cache_root(folder.root, index_dir) / f"{split}-{key[:16]}"
    build_once(target, functools.partial(_build, shards=shards, states=states, plan=plan))
    return StepIndex(target)


# --- Building -----------------------------------------------------------------------------------


def _build(
    work: Path, shards: Sequence[Shard], states: Sequence[ShardState], plan: Plan
) -> dict[str, Any]:
    """Scans the shards into files below ``work``; returns the manifest."""
    problems: list[ShardError] = []
    done: list[ShardState] = []
    bad: list[BadRecord] = []
    with contextlib.ExitStack() as stack:
        writer = _Writer(work, plan, stack)
        progress = _Progress(states)
        for number, (shard, state) in enumerate(zip(shards, states, strict=True)):
            try:
                done.append(_scan_shard(shard, number, state, plan, writer, bad))
            except ShardError as error:
                problems.append(error)
            progress.finished(state)
    if problems:
        raise ShardError("\n".join(map(str, problems)))
    text = json.dumps(list(writer.instructions), ensure_ascii=False)
    (work / "instructions.json").write_text(text, encoding="utf-8")
    return {
        "format_version": FORMAT_VERSION,
        "shards": [dataclasses.asdict(state) for state in done],
        "images": list(plan.images),
        "columns": {path: is_packed(column) for path, column in plan.columns.items()},
        "language": plan.language[0],
        "bad": [dataclasses.asdict(record) for record in bad],
    }


def _scan_shard(
    shard: Shard,
    number: int,
    state: ShardState,
    plan: Plan,
    writer: _Writer,
    bad: list[BadRecord],
) -> ShardState:
    """Indexes one shard; returns its state with the number of records and their digest."""
    checksums = []
    for record, (offset, data, crc) in enumerate(_records(shard)):
        checksums.append(crc)
        try:
            if data is None:
                raise ExampleError("fails its checksum")
            writer.append(scan_episode(data, plan), number, record, offset)
        except (ExampleError, BadRecordError) as error:
            bad.append(BadRecord(state.name, record, str(error)))
    if problem := record_count_problem(shard, len(checksums)):
        raise problem
    now = ShardState.of(shard.path, shard.format)
    if now != state:
        raise ShardError(f"{shard.path}: changed while it was indexed; start again when it is done")
    return dataclasses.replace(
        state, records=len(checksums), digest=digest(np.array(checksums, np.uint32))
    )


def _records(shard: Shard) -> Iterator[tuple[int, bytes | None, int]]:
    """Yields (offset, data or None where it is corrupted, masked CRC-32C) of each record."""
    if shard.format == "tfrecord":
        for offset, data, crc, sound in read_records(shard.path):
            yield offset, data if sound else None, crc
        return
    reader = open_array_record(shard.path)
    for record in range(reader.num_records()):
        try:
            (data,) = reader.read([record])
        except RuntimeError as error:
            if "orrupted" not in str(error):
                raise OSError(f"{shard.path} record {record}: {first_line(error)}") from None
            yield 0, None, 0
        else:
            yield 0, data, masked_crc32c(data)


class _Writer:
    """Appends episodes to the index's files."""

    def __init__(self, work: Path, plan: Plan, stack: contextlib.ExitStack) -> None:
        def grow(name: str, dtype: Any, shape: tuple[int, ...] = ()) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(work / name, dtype, shape))

        self.instructions: dict[str, int] = {}
        self._steps = 0
        self._episodes = grow("episodes.npy", EPISODE)
        self._language = grow("language.npy", np.int32)
        self._images = {path: grow(f"image.{i}.npy", IMAGE) for i, path in enumerate(plan.images)}
        self._columns: dict[str, ArrayWriter] = {}
        self._blobs: dict[str, ArrayWriter] = {}
        for i, (path, column) in enumerate(plan.columns.items()):
            if is_packed(column):
                self._columns[path] = grow(f"column.{i}.npy", np.int64, (2,))
                self._blobs[path] = grow(f"column.{i}.bytes.npy", np.uint8)
            else:
                self._columns[path] = grow(f"column.{i}.npy", column.dtype, column.shape)

    def append(self, episode: Episode, shard: int, record: int, offset: int) -> None:
        """Adds one episode."""
        steps = len(episode.instructions)
        row = (shard, record, offset, self._steps, steps, episode.content)
        self._episodes.append(np.array([row], EPISODE))
        known = self.instructions
        ids = [known.setdefault(text, len(known)) for text in episode.instructions]
        self._language.append(np.array(ids, np.int32))
        for path, rows in episode.images.items():
            self._images[path].append(rows)
        for path, values in episode.columns.items():
            if path in self._blobs:
                base = self._blobs[path].rows
                ends = base + np.cumsum([len(value) for value in values], dtype=np.int64)
                starts = np.concatenate([[base], ends[:-1]])[: len(ends)]
                self._blobs[path].append(np.frombuffer(b"".join(values), np.uint8))
                values = np.stack([starts, ends], axis=1)
            self._columns[path].append(values)
        self._steps += steps


class _Progress:
    """Says every few seconds how far the scan is."""

    def __init__(self, states: Sequence[ShardState]) -> None:
        self._total = sum(state.size for state in states)
        self._shards, self._done, self._read = len(states), 0, 0
        self._start = self._said = time.monotonic()

    def finished(self, state: ShardState) -> None:
        """Counts a shard."""
        self._done, self._read = self._done + 1, self._read + state.size
        now = time.monotonic()
        if now - self._said >= _PROGRESS_SECONDS or self._done == self._shards:
            self._said = now
            _LOG.info(
                "indexed %d of %d shards, %.2f of %.2f GB, %.0f MB/s",
                self._done, self._shards, self._read / 1e9, self._total / 1e9,
                self._read / 1e6 / max(now - self._start, 1e-3),
            )  # fmt: skip


def _unpacked(spans: np.ndarray, blob: np.ndarray) -> np.ndarray:
    values = np.empty(len(spans), object)
    values[:] = [blob[start:end].tobytes() for start, end in spans]
    return values
