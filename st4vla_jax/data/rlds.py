"""Robot episodes in a tfds-format folder (RLDS, Open-X) as a random-access source of steps.

TFRecord and array_record shards are read where they are, through a sidecar index: one sample reads
the bytes of its own images and nothing else (spec data.md section 2).  No TensorFlow.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from st4vla_jax.data.chunks import PADS, action_chunk
from st4vla_jax.data.episode_table import (
    EpisodeTable,
    Filters,
    Selection,
    drop,
    kept_episodes,
    open_selection,
    open_table,
    standard_episodes,
    step_name,
)
from st4vla_jax.data.holdout import part_problems
from st4vla_jax.data.image import ImageError, decode_image
from st4vla_jax.data.index import StepIndex, open_index
from st4vla_jax.data.index_folder import digest
from st4vla_jax.data.robot_spec import RobotSpec, StandardEpisode, nearest
from st4vla_jax.data.shards import ShardReader
from st4vla_jax.data.shuffle import mixed
from st4vla_jax.data.source import BadRecordError, Lengths, RobotStep, Sample, Turn
from st4vla_jax.data.source_files import SourceError, check_problems, kept_lengths
from st4vla_jax.data.tfds_folder import read_folder, shard_split


class _Place(NamedTuple):
    """All that a pickled source holds: where its files are, and what a sample is."""

    root: str
    index: str
    table: str
    kept: str
    views: tuple[str, ...]
    chunk: int
    pad: str
    masked: bool


class RldsSource:
    """Steps of a tfds-format data set, by index; a `source.Source`.

    Opening it builds the index if there is none for the shards as they are (minutes for the
    largest sets, with progress in the log) and is fast from then on.

    Args:
      root: folder of one version (features.json), or of the data set with one version below.
      spec: what its columns mean.
      split: name of a split, or "all".
      chunk: actions of a chunk (C).
      views: of ``spec.images``, in the order of a sample's images.
      pad, masked: of chunks at an episode's end, see `chunks.action_chunk`.
      filters: steps that no sample starts at.
      holdout: share of the episodes to hold out, by a hash of their content (`data.holdout`).
      part: "train" or "held_out": the episodes to be.
      index_dir: where to keep the index; default: ``.st4vla_index`` in ``root``, or the user's
        cache folder where that cannot be written.
      max_bad_records: unusable records (checksum, columns, values not finite) that may be left
        out, named in the log.

    Raises:
      FolderError, ShardError, SpecError, SourceError: the data or the settings do not fit; each
        lists every problem by file or key.
      OSError: a shard cannot be read, or the index cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        spec: RobotSpec,
        split: str = "train",
        *,
        chunk: int = 16,
        views: Sequence[str] = ("primary",),
        pad: str = "neutral",
        masked: bool = True,
        filters: Filters = Filters(),  # noqa: B008 (frozen)
        holdout: float = 0.0,
        part: str = "train",
        index_dir: str | Path | None = None,
        max_bad_records: int = 0,
    ) -> None:
        _check_settings(spec, chunk, views, pad, holdout, part)
        folder = read_folder(root)
        index = open_index(
            folder,
            split,
            images=tuple(dict.fromkeys(spec.images.values())),
            columns=spec.columns,
            language=spec.language,
            language_encoding=spec.language_encoding,
            index_dir=index_dir,
        )
        table = open_table(index, spec)
        bad = [str(record) for record in (*index.bad, *table.bad)]
        check_problems(str(folder.root), bad, max_bad_records)
        shown = dict.fromkeys((*views, *map(spec.partner, views)))
        images = [spec.images[view] for view in shown]
        kept = open_selection(index, table, images, filters, holdout, part)
        place = _Place(
            str(folder.root), str(index.folder), table.folder.name, kept.folder.name,
            tuple(views), chunk, pad, masked,
        )  # fmt: skip
        self._open(place, index, table, kept)

    def _open(self, place: _Place, index: StepIndex, table: EpisodeTable, kept: Selection) -> None:
        self._place, self._index, self._table, self._selection = place, index, table, kept
        self.spec = table.spec
        self.name = table.spec.name
        spec = table.spec
        columns = [[spec.images[v], spec.images[spec.partner(v)]] for v in place.views]
        self._columns = np.array(columns).T.tolist()  # as they are, and swapped
        self._images = [[index.images(path) for path in paths] for paths in self._columns]
        self._instructions = index.instructions
        self._reader = ShardReader(Path(place.root), index.shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, tuple(self._place)

    def __len__(self) -> int:
        return len(self._selection.kept)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of its samples."""
        return (f"{self.name}/action",)

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample.

        Raises:
          BadRecordError: an image does not decode, or its bytes are not as they were indexed.
          OSError: the shard cannot be read, after retries.
          ShardError: the shard changed since it was indexed.
        """
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"{self.name}: sample {number} of {len(self)}")
        table = self._table
        row = int(self._selection.kept[number])
        episode = int(np.searchsorted(table.starts, row, "right")) - 1
        indexed = self._index.episodes[table.episodes[episode]["episode"]]
        step = int(indexed["start"]) + int(table.steps[row])
        record = step_name(self._index, table, row)
        rows = table.rows(episode)
        actions, mask = action_chunk(
            table.actions[rows],
            row - rows.start,
            self._place.chunk,
            self._place.pad,
            self.spec.absolute,
            self._place.masked,
        )
        state = None if table.states is None else np.array(table.states[row])
        return Sample(
            images=self._read_images(indexed, step, record),
            turns=(Turn("user", self._instructions[self._index.language[step]]),),
            robot=RobotStep(actions, mask, state, self.spec.embodiment),
            group=self.groups[0],
            record=record,
        )

    def _read_images(self, indexed: np.void, step: int, record: str) -> tuple[np.ndarray, ...]:
        """Reads and decodes u8[h,w,3] of each view."""
        own = int(self._swapped(indexed["content"], step - int(indexed["start"])))
        data = self._read(indexed, [images[step] for images in self._images[own]], record)
        try:
            return tuple(
                decode_image(encoded, f"{record} {path}")
                for encoded, path in zip(data, self._columns[own], strict=True)
            )
        except ImageError as error:
            raise BadRecordError(str(error)) from error

    def _swapped(self, content: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Whether a step's views change places (`RobotSpec.swap`); content: u64 of its episode."""
        if not self.spec.swap:
            return np.zeros(np.shape(step), bool)
        return (mixed(content, step) & np.uint64(1)).astype(bool)

    def _read(self, indexed: np.void, wanted: Sequence[np.void], record: str) -> list[bytes]:
        """The encoded images, byte for byte as they were indexed."""
        ranges = [(int(image["start"]), int(image["size"])) for image in wanted]
        checksums = [int(image["crc"]) for image in wanted]
        data = self._reader.read(
            int(indexed["shard"]),
            int(indexed["record"]),
            int(indexed["offset"]),
            ranges,
            lambda found: [google_crc32c.value(part) for part in found] == checksums,
        )
        if data is None:
            raise BadRecordError(
                f"{record}: images are not as they were when indexed, though the file's size and "
                "time are; fetch the file again"
            )
        return data

    def drop(self, samples: np.ndarray, reason: str) -> RldsSource:
        """The source without some samples, e.g. those too long for any sequence.

        Args:
          samples: indices of this source.
          reason: what the log and `left_out` call them.

        Raises:
          SourceError: nothing would be left.
        """
        kept = drop(self._index, self._table, self._selection, samples, reason)
        place = self._place._replace(kept=kept.folder.name)
        return _opened(place, self._index, self._table, kept)

    def lengths(self, encoder: Any) -> Lengths:
        """Lengths of all samples under a `SampleEncoder`, kept beside the index."""

        def compute() -> Lengths:
            rows = self._table.index_rows(self._index)[self._selection.kept]
            sizes = np.zeros((len(rows), len(self._place.views), 2), np.int32)
            steps = self._table.steps[self._selection.kept]
            swapped = self._swapped(self.contents()[self.episodes()], steps)
            for view, pair in enumerate(zip(*self._images, strict=True)):
                for axis, name in enumerate(("height", "width")):
                    own, other = (images[name][rows] for images in pair)
                    sizes[:, view, axis] = np.where(swapped, other, own)
            return encoder.robot_lengths(self._instructions, self._index.language[rows], sizes)

        return kept_lengths(self._selection.folder, encoder, compute)

    def fingerprint(self) -> str:
        """sha256 of what decides the samples; a copy of the data elsewhere has the same."""
        shards = [(s.name, s.size, s.records, s.digest) for s in self._index.shards]
        spec = self.spec
        return digest(
            shards, self._table.digest, self._selection.digest, self._columns[0], spec.swap,
            [spec.name, spec.embodiment, spec.absolute, spec.language, spec.language_encoding],
            [self._place.chunk, self._place.pad, self._place.masked],
        )  # fmt: skip

    def episodes(self) -> np.ndarray:
        """i64[n] number of the episode that each sample is from."""
        return kept_episodes(self._table, self._selection)

    def episode_contents(self) -> list[tuple[str, int]]:
        """(split, hash of the steps' numbers and texts) of every indexed episode."""
        names = [shard_split(shard.name) for shard in self._index.shards]
        episodes = self._index.episodes
        return [(names[e["shard"]], int(e["content"])) for e in episodes]

    def contents(self) -> np.ndarray:
        """u64[E] hash of each usable episode, held out or not."""
        return self._index.episodes["content"][self._table.episodes["episode"]]

    def standard_episodes(self) -> Iterator[StandardEpisode]:
        """Standardised episodes, image-free: what statistics are computed over."""
        return standard_episodes(self._table, self._selection)

    def left_out(self) -> dict[str, int]:
        """How many records (bad, too short) and steps (by reason) are no samples."""
        counts = {
            "bad records": len(self._index.bad) + len(self._table.bad),
            "records too short": len(self._table.short),
        }
        steps = {reason: entry["steps"] for reason, entry in self._selection.left_out.items()}
        return {reason: count for reason, count in {**counts, **steps}.items() if count}


def _opened(place: _Place, index: StepIndex, table: EpisodeTable, kept: Selection) -> RldsSource:
    source = RldsSource.__new__(RldsSource)
    source._open(place, index, table, kept)
    return source


def _reopen(*place: Any) -> RldsSource:
    """Unpickles a source: opens the folders that are named."""
    at = _Place(*place)
    folder = Path(at.index)
    return _opened(
        at,
        StepIndex(folder),
        EpisodeTable(folder.with_name(at.table)),
        Selection(folder.with_name(at.kept)),
    )


def _check_settings(
    spec: RobotSpec,
    chunk: int,
    views: Sequence[str],
    pad: str,
    holdout: float,
    part: str,
) -> None:
    problems = [
        f"views: {spec.name} has no view {view!r}{nearest(view, spec.images)}"
        for view in views
        if view not in spec.images
    ]
    if not views or len(set(views)) < len(views):
        problems.append(f"views: {tuple(views)} must name one or more views, each once")
    if chunk < 1:
        problems.append(f"chunk: {chunk} must be positive")
    if pad not in PADS:
        problems.append(f"pad: {pad!r}{nearest(pad, PADS)}")
    problems += part_problems(holdout, part)
    if problems:
        raise SourceError(f"{spec.name}:\n  " + "\n  ".join(problems))
