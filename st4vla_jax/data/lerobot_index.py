"""Builds the indices of data/lerobot.py: columns, texts, and which frame belongs to which step."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from st4vla_jax.data.index_folder import digest, write_array
from st4vla_jax.data.lerobot_folder import TASK, Episode, LeRobotFolder, column_array
from st4vla_jax.data.robot_spec import RobotSpec
from st4vla_jax.data.safe_pickle import UnsafePickleError, load
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.source_files import SourceError, check_problems
from st4vla_jax.data.video import FrameTable, frame_table

# A frame belongs to a time if it lies within this part of a frame's duration: wide enough for f32
# timestamps and rounded offsets, too narrow for the neighbour.
_TOLERANCE = 0.25
_META = ("timestamp", "episode_index", "frame_index", "task_index")


class Annotations(NamedTuple):
    """Columns of pickled annotations: boxes (structured array), {id: {"class": uid}}, two uids."""

    boxes: str
    labels: str
    pick: str
    place: str

    @classmethod
    def of_view(cls, view: str) -> Annotations:
        """InternVLA-M1's names for a view, as "ego_view"."""
        boxes = f"annotation.{view}.bbox2d_tight"
        ends = "annotation.pick_obj_uid", "annotation.place_obj_uid"
        return cls(boxes, f"{boxes}_id2labels", *ends)


class _Rows:
    """What every index holds: episode, step, text, and the frame of each view."""

    def __init__(self, folder: LeRobotFolder, features: Sequence[str]) -> None:
        self.folder, self.features = folder, features
        self.bad: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.texts: dict[str, int] = {}
        self.contents: dict[int, int] = {}
        self.videos: dict[Path, tuple[int, FrameTable]] = {}
        self.columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("episode", "step", "text", "video", "pts")
        }

    def add(
        self, episode: Episode, steps: np.ndarray, texts: Sequence[str], pts: np.ndarray
    ) -> None:
        """Adds rows of one episode; pts is i64[n,V]."""
        ids = [self.texts.setdefault(text, len(self.texts)) for text in texts]
        video = [self.videos[episode.videos[name].path][0] for name in self.features]
        shape = (len(steps), len(video))
        self.columns["episode"].append(np.full(len(steps), episode.index, np.int32))
        self.columns["step"].append(steps.astype(np.int64))
        self.columns["text"].append(np.array(ids, np.int32))
        self.columns["video"].append(np.broadcast_to(np.array(video, np.int32), shape))
        self.columns["pts"].append(pts.reshape(shape))

    def frames(self, episode: Episode, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """i64[n,V] pts of each view's frame at these times of an episode, bool[n,V] found."""
        pts, found = [], []
        for name in self.features:
            span = episode.videos[name]
            if span.path not in self.videos:
                self.videos[span.path] = len(self.videos), frame_table(span.path)
            table = self.videos[span.path][1]
            tolerance = _TOLERANCE / self.folder.fps
            for values, value in zip(
                (pts, found), table.nearest(span.start + seconds, tolerance), strict=True
            ):
                values.append(value)
        return np.stack(pts, 1), np.stack(found, 1)

    def write(self, work: Path, allowed: int, **more: np.ndarray) -> dict[str, Any]:
        """Writes all arrays; returns the manifest's content."""
        check_problems(str(self.folder.root), self.bad, allowed)
        if not sum(map(len, self.columns["step"])):
            raise SourceError(f"{self.folder.root}: no step can be used: {dict(self.left_out)}")
        arrays = {name: np.concatenate(column) for name, column in self.columns.items()} | more
        contents = sorted(self.contents.items())
        arrays["content_episode"] = np.array([number for number, _ in contents], np.int64)
        arrays["content"] = np.array([content for _, content in contents], np.uint64)
        for name, array in arrays.items():
            write_array(work / f"{name}.npy", array)
        sizes = [list(table.size) for _, table in self.videos.values()]
        texts = list(self.texts)
        return {
            "root": str(self.folder.root.absolute()),
            "videos": [
                [str(path.absolute()), s] for path, s in zip(self.videos, sizes, strict=True)
            ],
            "texts": texts,
            "bad": self.bad,
            "left_out": dict(self.left_out),
            "content": digest(texts, sizes, *(arrays[name] for name in sorted(arrays))),
        }


def build_robot(
    work: Path,
    folder: LeRobotFolder,
    episodes: Sequence[Episode],
    spec: RobotSpec,
    features: Sequence[str],
    allowed: int,
) -> dict[str, Any]:
    """Writes the index of `LeRobotSource`: standardised actions and state, framed = has images."""
    rows = _Rows(folder, features)
    actions, states, framed, starts = [], [], [], [0]
    language = [] if spec.language == TASK else [spec.language]
    columns = list(dict.fromkeys([*_META, *spec.columns, *language, *folder.numbers]))
    for episode, table in folder.tables(episodes, columns):
        try:
            data = {name: column_array(table[name], name) for name in spec.columns}
            _check_rows(episode, table)
            standard = spec.standardize(data)
            texts = np.array(_texts(folder, spec, table))[standard.steps].tolist()
            times = table["timestamp"].to_numpy().astype(np.float64)[standard.steps]
            pts, found = rows.frames(episode, times)
            rows.contents[episode.index] = episode_content(folder, table)
        except BadRecordError as e:
            rows.bad.append(f"{folder.root}: episode {episode.index}: {e}")
            continue
        found = found.all(1)
        if not found.all():
            rows.bad.append(_frames_missing(folder, episode, features, times[~found]))
        framed.append(found)
        rows.add(episode, standard.steps, texts, pts)
        actions.append(standard.actions)
        states.append(standard.state)
        starts.append(starts[-1] + len(standard.steps))
    more = {}
    if actions:
        more = {"actions": np.concatenate(actions), "framed": np.concatenate(framed)}
        if spec.state:
            more["state"] = np.concatenate(states)
    return rows.write(work, allowed, start=np.array(starts, np.int64), **more)


def build_grounding(
    work: Path,
    folder: LeRobotFolder,
    episodes: Sequence[Episode],
    columns: Annotations,
    video: str,
    stride: int,
    allowed: int,
) -> dict[str, Any]:
    """Writes the index of `LeRobotGrounding`: boxes f32[n,2,4], NaN where an object is hidden."""
    rows, boxes = _Rows(folder, [video]), []
    for episode, table in folder.tables(episodes, [*_META, *columns, *folder.numbers]):
        steps = np.arange(0, table.num_rows, stride)
        try:
            _check_rows(episode, table)
            times = table["timestamp"].to_numpy().astype(np.float64)[steps]
            pts, found = rows.frames(episode, times)
            size = rows.videos[episode.videos[video].path][1].size
            picked = [table[name].take(steps).to_pylist() for name in columns]
            own = np.stack([_objects(*cells, size) for cells in zip(*picked, strict=True)])
            rows.contents[episode.index] = episode_content(folder, table)
        except (BadRecordError, UnsafePickleError) as e:
            rows.bad.append(f"{folder.root}: episode {episode.index}: {e}")
            continue
        found = found.all(1)
        if not found.all():
            rows.bad.append(_frames_missing(folder, episode, [video], times[~found]))
        shown = np.isfinite(own).all(2).any(1)
        texts = np.array(
            [folder.tasks.get(i, "") for i in table["task_index"].take(steps).to_pylist()]
        )
        worded = np.array([bool(text.strip()) for text in texts])
        rows.left_out["no frame"] += int((~found).sum())
        rows.left_out["no object in view"] += int((~shown).sum())
        rows.left_out["empty language"] += int((~worded).sum())
        kept = found & shown & worded
        rows.add(episode, steps[kept], texts[kept].tolist(), pts[kept])
        boxes.append(own[kept])
    more = {"boxes": np.concatenate(boxes)} if boxes else {}
    return rows.write(work, allowed, **more)


def _objects(
    boxes: bytes, labels: bytes, pick: bytes, place: bytes, size: tuple[int, int]
) -> np.ndarray:
    """f32[2,4] (x1, y1, x2, y2) of the two objects in one frame; NaN = hidden.

    Raises:
      UnsafePickleError: a cell that is not plain data.
      BadRecordError: cells of another form, or a box outside the frame.
    """
    found = np.full((2, 4), np.nan, np.float32)
    values = [load(cell) for cell in (boxes, labels, pick, place)]
    try:
        table, names, *uids = values
        ids = {entry["class"]: int(number) for number, entry in names.items()}
        for box, uid in zip(found, uids, strict=True):
            of_object = table[table["semanticId"] == ids.get(uid, -1)]
            if len(of_object):
                box[:] = [of_object[0][k] for k in ("x_min", "y_min", "x_max", "y_max")]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        raise BadRecordError(f"annotations of another form than expected ({e!r})") from e
    low, high = found[:, :2], found[:, 2:]
    if (low < 0).any() or (high > (size[1], size[0])).any() or (high < low).any():
        raise BadRecordError(f"boxes {found.tolist()} outside {size} pixels or with x2 < x1")
    found[(high <= low).any(1)] = np.nan  # a sliver at the border, less than a pixel wide
    return found


def episode_content(folder: LeRobotFolder, table: pa.Table) -> int:
    """u64 hash of an episode's numbers and tasks, the same under any number in any folder.

    Args:
      folder: says which features these are.
      table: the episode's rows, with `LeRobotFolder.numbers` and task_index.
    """
    result = hashlib.blake2b(digest_size=8)
    tasks = [folder.tasks.get(number, "") for number in table["task_index"].to_pylist()]
    result.update(digest(tasks).encode())
    for name in folder.numbers:
        result.update(digest(name, column_array(table[name], name)).encode())
    return int.from_bytes(result.digest(), "little")


def _check_rows(episode: Episode, table: pa.Table) -> None:
    """The rows must be those of the episode, in order."""
    numbers = np.unique(table["episode_index"].to_numpy())
    if numbers.tolist() != [episode.index]:
        raise BadRecordError(f"{episode.data} holds rows of episodes {numbers.tolist()[:5]}")
    if not (np.diff(table["frame_index"].to_numpy()) == 1).all():
        raise BadRecordError(f"{episode.data}: frames are missing or out of order")


def _texts(folder: LeRobotFolder, spec: RobotSpec, table: pa.Table) -> list[str]:
    """The instruction at each row."""
    if spec.language == TASK:
        return [folder.tasks.get(number, "") for number in table["task_index"].to_pylist()]
    return [spec.instruction(value or "") for value in table[spec.language].to_pylist()]


def _frames_missing(
    folder: LeRobotFolder, episode: Episode, features: Sequence[str], seconds: np.ndarray
) -> str:
    videos = ", ".join(str(episode.videos[name].path) for name in features)
    return (
        f"{folder.root}: episode {episode.index}: {videos} has no frame at {len(seconds)} of its "
        f"times, first {seconds[0]:.3f} s"
    )
