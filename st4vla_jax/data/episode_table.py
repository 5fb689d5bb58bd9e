"""Standardised episodes of an index, and which of their steps are kept; both cached beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st4vla_jax.data import primitives, robot_spec
from st4vla_jax.data.holdout import other_part
from st4vla_jax.data.index import BadRecord, StepIndex
from st4vla_jax.data.index_folder import (
    ArrayWriter,
    build_once,
    digest,
    open_array,
    read_manifest,
    write_array,
)
from st4vla_jax.data.robot_spec import RobotSpec, StandardEpisode
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.source_files import SourceError

# Rows of an episode: its number in the index, its first row here and how many there are.
TABLE_EPISODE = np.dtype([("episode", "<i4"), ("start", "<i8"), ("steps", "<i4")])

_NAMED = 10  # left-out steps named for each reason
_LOG = logging.getLogger(__name__)


class EpisodeTable:
    """Opened table: actions f32[N',A], states f32[N',S] or None, steps i32[N'] original numbers.

    ``bad`` and ``short`` name the records that it leaves out: unusable ones, and those with fewer
    steps than the spec needs.
    """

    def __init__(self, folder: Path) -> None:
        manifest = _manifest(folder)
        self.folder, self.digest = folder, manifest["digest"]
        self.spec = RobotSpec.from_dict(manifest["spec"])
        self.bad = tuple(BadRecord(**bad) for bad in manifest["bad"])
        self.short = tuple(BadRecord(**bad) for bad in manifest["short"])
        self.episodes = open_array(folder / "episodes.npy")
        self.starts = np.ascontiguousarray(self.episodes["start"])  # searched once a sample
        self.steps = open_array(folder / "steps.npy")
        self.actions = open_array(folder / "actions.npy")
        self.states = open_array(folder / "states.npy") if self.spec.state else None

    def rows(self, number: int) -> slice:
        """Rows of an episode of the table."""
        row = self.episodes[number]
        return slice(int(row["start"]), int(row["start"] + row["steps"]))

    def episode(self, number: int) -> StandardEpisode:
        """An episode of the table."""
        rows = self.rows(number)
        state = None if self.states is None else self.states[rows]
        return StandardEpisode(self.actions[rows], state, self.steps[rows].astype(np.int64))

    def index_rows(self, index: StepIndex) -> np.ndarray:
        """i64[N'] the index's row of each step here."""
        starts = index.episodes["start"][self.episodes["episode"]]
        return np.repeat(starts, self.episodes["steps"]) + self.steps


def open_table(index: StepIndex, spec: RobotSpec) -> EpisodeTable:
    """Opens the standardised episodes of an index, computing them first if need be.

    Raises:
      SpecError: the spec does not fit the columns.
      OSError: the table cannot be written.
    """
    # The recipes' code decides the values too.
    code = [
        hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
        for module in (robot_spec, primitives)
    ]
    key = digest(index.folder.name, spec.to_dict(), code)
    target = index.folder.parent / f"{index.folder.name}-table-{key[:16]}"
    build_once(target, functools.partial(_build_table, index=index, spec=spec))
    return EpisodeTable(target)


def _build_table(work: Path, index: StepIndex, spec: RobotSpec) -> dict[str, Any]:
    bad: list[BadRecord] = []
    short: list[BadRecord] = []
    content = hashlib.sha256()
    need = spec.skip_first + spec.skip_last + 1
    with contextlib.ExitStack() as stack:
        writers: dict[str, ArrayWriter] = {}

        def append(name: str, rows: np.ndarray) -> int:
            if name not in writers:
                writer = ArrayWriter(work / f"{name}.npy", rows.dtype, rows.shape[1:])
                writers[name] = stack.enter_context(writer)
            writers[name].append(rows)
            content.update(rows.tobytes())
            return writers[name].rows

        done = 0
        for number, columns in enumerate(index.columns()):
            row = index.episodes[number]
            name = index.shards[row["shard"]].name, int(row["record"])
            if row["steps"] < need:
                short.append(BadRecord(*name, f"{row['steps']} steps, {spec.name} needs {need}"))
                continue
            try:
                episode = spec.standardize(columns)
            except BadRecordError as error:
                bad.append(BadRecord(*name, str(error)))
                continue
            append("episodes", np.array([(number, done, len(episode.steps))], TABLE_EPISODE))
            append("steps", episode.steps.astype(np.int32))
            if episode.state is not None:
                append("states", episode.state.astype(np.float32))
            done = append("actions", episode.actions.astype(np.float32))
    if not done:
        reasons = "\n  ".join(map(str, (*index.bad, *bad, *short)[:_NAMED]))
        raise SourceError(f"{spec.name}: no episode can be used:\n  {reasons}")
    return {
        "spec": spec.to_dict(),
        "digest": content.hexdigest(),
        "bad": [dataclasses.asdict(record) for record in bad],
        "short": [dataclasses.asdict(record) for record in short],
    }


# --- Which steps are kept -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Filters:
    """Steps that no sample starts at; chunks of others still run over them.

    Attributes:
      empty_language: leave out steps without an instruction.
      pause: leave out steps that move no more than this along each of ``pause_dims`` while the
        gripper stays as it was (InternVLA-M1: 5e-4 m of x, y and z); None keeps them.
      pause_dims: action dimensions of the movement; None: x, y and z where these come first, else
        all but the gripper.
    """

    empty_language: bool = True
    pause: float | None = None
    pause_dims: tuple[int, ...] | None = None


class Selection:
    """Opened selection: kept i64[K] rows of the table; left_out: {reason: {"steps", "first"}}."""

    def __init__(self, folder: Path) -> None:
        manifest = _manifest(folder)
        self.folder, self.digest = folder, manifest["digest"]
        self.left_out: dict[str, dict[str, Any]] = manifest["left_out"]
        self.kept = open_array(folder / "kept.npy")


def open_selection(
    index: StepIndex,
    table: EpisodeTable,
    images: Sequence[str],
    filters: Filters,
    holdout: float,
    part: str,
) -> Selection:
    """Opens the kept steps, choosing them first if need be.

    Args:
      index: images and instructions.
      table: actions of the same data.
      images: column paths of the views that a sample has.
      filters: steps to leave out.
      holdout: share of the episodes to hold out, see `holdout.is_held_out`.
      part: "train" or "held_out".

    Raises:
      SourceError: nothing is kept.
    """
    key = digest(list(images), dataclasses.asdict(filters), holdout, part)
    target = table.folder.with_name(f"{table.folder.name}-kept-{key[:16]}")

    def build(work: Path) -> dict[str, Any]:
        reasons = _reasons(index, table, images, filters, holdout, part)
        return _choose(work, index, table, np.arange(len(table.steps)), reasons, {})

    build_once(target, build)
    return Selection(target)


def drop(
    index: StepIndex, table: EpisodeTable, selection: Selection, samples: np.ndarray, reason: str
) -> Selection:
    """The selection without some of its samples; see `RldsSource.drop`."""
    samples = np.unique(np.asarray(samples, np.int64))
    if len(samples) and not 0 <= samples[0] <= samples[-1] < len(selection.kept):
        raise IndexError(f"samples to drop must lie in 0..{len(selection.kept) - 1}")
    gone = np.zeros(len(selection.kept), bool)
    gone[samples] = True
    key = digest(selection.folder.name, samples, reason)
    target = table.folder.with_name(f"{table.folder.name}-kept-{key[:16]}")

    def build(work: Path) -> dict[str, Any]:
        return _choose(work, index, table, selection.kept, {reason: gone}, selection.left_out)

    build_once(target, build)
    return Selection(target)


def _reasons(
    index: StepIndex,
    table: EpisodeTable,
    images: Sequence[str],
    filters: Filters,
    holdout: float,
    part: str,
) -> dict[str, np.ndarray]:
    """bool[N'] of the steps to leave out, by reason; the first that holds counts."""
    reasons = {}
    rows = table.index_rows(index)
    content = index.episodes["content"][table.episodes["episode"]]
    for name, holds in other_part(content, holdout, part).items():
        reasons[f"{name} episode"] = np.repeat(holds, table.episodes["steps"])
    for path in images:
        reasons[f"no readable image in {path}"] = index.images(path)["height"][rows] == 0
    if filters.empty_language:
        empty = np.array([not text for text in index.instructions], bool)
        reasons["empty language"] = empty[index.language[rows]]
    if filters.pause is not None:
        reasons["pause"] = pauses(table.actions, table.starts, table.spec, filters)
    return reasons


def pauses(
    actions: np.ndarray, starts: np.ndarray, spec: RobotSpec, filters: Filters
) -> np.ndarray:
    """Steps that move nothing.

    Args:
      actions: f32[N,A] of all episodes.
      starts: i64[E] first row of each.
      spec: which dimensions are absolute, and which are grippers.
      filters: how far is nothing.

    Returns:
      bool[N].
    """
    dims = filters.pause_dims
    if dims is None:
        moving = tuple(i for i in range(len(spec.names)) if i not in spec.gripper)
        dims = moving[:3] if spec.names[:3] == ("x", "y", "z") else moving
    change = np.diff(actions, axis=0, prepend=actions[:1])
    change[starts] = 0
    # An absolute dimension rests where it was; nothing says whether its first value moves it.
    move = np.where(np.isin(np.arange(len(spec.names)), spec.absolute), change, actions)
    move[starts[:, None], [i for i in dims if i in spec.absolute]] = np.inf
    still = (np.abs(move[:, list(dims)]) <= filters.pause).all(axis=1)
    return still & (change[:, list(spec.gripper)] == 0).all(axis=1)


def _choose(
    work: Path,
    index: StepIndex,
    table: EpisodeTable,
    candidates: np.ndarray,
    reasons: Mapping[str, np.ndarray],
    left_out: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Writes the candidates that no reason leaves out; returns the manifest."""
    left_out = dict(left_out)
    keep = np.ones(len(candidates), bool)
    for reason, holds in reasons.items():
        rows = candidates[holds & keep]
        keep &= ~holds
        if len(rows):
            first = [step_name(index, table, int(row)) for row in rows[:_NAMED]]
            left_out[reason] = {"steps": len(rows), "first": first}
            _LOG.info("left out %d steps: %s, first %s", len(rows), reason, first[0])
    kept = candidates[keep].astype(np.int64)
    if not len(kept):
        counts = ", ".join(f"{reason} {entry['steps']}" for reason, entry in left_out.items())
        raise SourceError(f"{table.spec.name}: no step is kept of {len(table.steps)} ({counts})")
    write_array(work / "kept.npy", kept)
    return {"digest": digest(kept), "left_out": left_out}


def step_name(index: StepIndex, table: EpisodeTable, row: int) -> str:
    """File, record and step of a row of the table, for messages."""
    number = int(np.searchsorted(table.starts, row, "right")) - 1
    episode = int(table.episodes[number]["episode"])
    return f"{index.record_name(episode)} step {table.steps[row]}"


def kept_episodes(table: EpisodeTable, selection: Selection) -> np.ndarray:
    """i64[K] the table's episode of each kept step."""
    return np.searchsorted(table.starts, selection.kept, "right") - 1


def standard_episodes(table: EpisodeTable, selection: Selection) -> Iterator[StandardEpisode]:
    """The episodes with a kept step, whole: what statistics are computed over."""
    for number in np.unique(kept_episodes(table, selection)):
        yield table.episode(int(number))


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder}: not complete; open the data set again")
    return manifest
