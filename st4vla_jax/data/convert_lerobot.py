"""LeRobot folders to RLDS episodes: video frames re-encoded as JPEG, columns as they are.

A feature's dots become slashes: ``observation.state`` is the step's ``observation/state``.
Importing this module needs the ``lerobot`` extra.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from st4vla_jax.data.conversion import Conversion, ConversionError, PlannedShard
from st4vla_jax.data.lerobot_folder import TASK, Episode, LeRobotFolder, column_array
from st4vla_jax.data.robot_spec import RobotSpec
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.tfds_write import (
    EpisodeError,
    check_columns,
    encode_episode,
    encode_image,
    episode_features,
)
from st4vla_jax.data.video import frame_table
from st4vla_jax.data.writer import FLAGS, LANGUAGE, demonstration_flags

_NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")
_ABOUT = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_METADATA = {"episode_index": Column("tensor", (), "int64")}
_TOLERANCE = 0.25  # of a frame's duration, as in data/lerobot_index.py


def lerobot_conversion(
    root: Path,
    *,
    images: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    spec: RobotSpec | None = None,
    episodes: Sequence[int] | None = None,
    shard_records: int = 32,
) -> Conversion:
    """Plans the conversion of a LeRobot folder.

    Args:
      root: folder with meta/, data/ and videos/.
      images: video features; default: those of ``spec``, or all.
      columns: features of numbers; default: those of ``spec``, or all.
      spec: of the LeRobot folder; robot_spec.json of the converted one is written beside it.
      episodes: numbers of those to convert; default: all.
      shard_records: episodes of a shard.

    Raises:
      SourceError: not such a folder, or videos are missing (all by name).
      ConversionError: features that are not there, or whose names collide.
    """
    folder = LeRobotFolder(root)
    chosen = folder.select(episodes)
    if spec is not None:
        images = images or tuple(dict.fromkeys(spec.images.values()))
        columns = columns or spec.columns
    numeric = [n for n, f in folder.features.items() if f["dtype"] in _NUMBERS and n not in _ABOUT]
    images, columns = list(images or folder.videos), list(columns or numeric)
    if unknown := [name for name in columns if name not in (*numeric, "timestamp")]:
        raise ConversionError(f"{root}: no columns of numbers {', '.join(unknown)}")
    folder.check_videos(chosen, images)
    reader = _Reader(folder, images, columns)
    groups = [chosen[i : i + shard_records] for i in range(0, len(chosen), shard_records)]
    return Conversion(
        source=Path(root),
        sources=tuple(_files(folder, chosen, images)),
        format="lerobot",
        name=Path(root).absolute().name,
        version="1.0.0",
        features=episode_features(reader.columns, _METADATA),
        shards=tuple(
            PlannedShard("train", i, len(group), functools.partial(reader.read, group))
            for i, group in enumerate(groups)
        ),
        settings={"images": images, "columns": columns, "control_hz": folder.fps},
        left_out=tuple(n for n in folder.features if n not in (*images, *columns, *_ABOUT)),
        files={} if spec is None else {"robot_spec.json": _converted_spec(spec)},
    )


def _files(
    folder: LeRobotFolder, episodes: Sequence[Episode], images: Sequence[str]
) -> Iterator[Path]:
    paths = dict.fromkeys(folder.meta_files)
    for episode in episodes:
        paths[episode.data] = None
        paths.update({episode.videos[name].path: None for name in images})
    return iter(paths)


def _path(feature: str) -> str:
    return feature.replace(".", "/")


def _converted_spec(spec: RobotSpec) -> bytes:
    """The spec with the columns' new names."""
    tree: dict[str, Any] = spec.to_dict()
    tree["images"] = {view: _path(name) for view, name in tree["images"].items()}
    tree["language"] = LANGUAGE
    tree["language_encoding"] = "text"
    for part in (*tree["action"], *tree["state"]):
        if part["column"] is not None:
            part["column"] = _path(part["column"])
    RobotSpec.from_dict(tree)
    return json.dumps(tree, indent=1).encode()


class _Reader:
    """Reads episodes and encodes them; used by several threads."""

    def __init__(
        self, folder: LeRobotFolder, images: Sequence[str], columns: Sequence[str]
    ) -> None:
        self._folder, self._images, self._columns = folder, images, columns
        # A video of format v3 holds many episodes; its table is read once.
        self._table = functools.lru_cache(maxsize=16)(frame_table)
        self._flags = {"reward": "next.reward", "is_terminal": "next.done"}
        self.columns: Mapping[str, Column] = {
            **{_path(name): _image_column(folder.features[name]) for name in images},
            **{_path(name): _number_column(folder.features[name]) for name in columns},
            LANGUAGE: Column("text"),
            **FLAGS,
        }
        if len(self.columns) < len(images) + len(columns) + len(FLAGS) + 1:
            raise ConversionError(f"{folder.root}: features with names of {(LANGUAGE, *FLAGS)}")
        try:
            check_columns(self.columns)
        except EpisodeError as error:
            raise ConversionError(f"{folder.root}: {error}\n  choose by --columns") from error

    def read(self, episodes: Sequence[Episode]) -> Iterator[tuple[bytes, int]]:
        """Yields each episode as a record, and its steps."""
        own = [name for name in self._flags.values() if name in self._folder.features]
        needed = dict.fromkeys([*self._columns, *own, "timestamp", "episode_index", "task_index"])
        for episode, table in self._folder.tables(episodes, list(needed)):
            try:
                data = {name: column_array(table[name], name) for name in needed}
                yield self._record(episode, data), table.num_rows
            except (BadRecordError, EpisodeError) as error:
                where = f"{self._folder.root}: episode {episode.index}"
                raise ConversionError(f"{where}: {error}") from error

    def _record(self, episode: Episode, data: Mapping[str, np.ndarray]) -> bytes:
        if set(data["episode_index"].tolist()) != {episode.index}:
            raise BadRecordError(f"{episode.data} holds rows of other episodes")
        steps: dict[str, Any] = dict(demonstration_flags(len(data["timestamp"])))
        for flag, name in self._flags.items():
            if name in data:
                steps[flag] = data[name].reshape(-1).astype(FLAGS[flag].dtype)
        for name in self._columns:
            path = _path(name)
            steps[path] = data[name].reshape(-1, *self.columns[path].shape)
        steps[LANGUAGE] = [self._text(number) for number in data["task_index"].tolist()]
        seconds = data["timestamp"].reshape(-1).astype(np.float64)
        for name in self._images:
            column = self.columns[_path(name)]
            span = episode.videos[name]
            pts, found = self._table(span.path).nearest(
                span.start + seconds, _TOLERANCE / self._folder.fps
            )
            if not found.all():
                first = seconds[np.argmin(found)]
                raise BadRecordError(
                    f"{span.path} has no frame at {(~found).sum()} times, first {first:.3f} s"
                )
            steps[_path(name)] = [encode_image(frame, column) for frame in _frames(span.path, pts)]
        return encode_episode(
            self.columns, steps, _METADATA, {"episode_index": np.int64(episode.index)}
        )

    def _text(self, number: int) -> str:
        if number not in self._folder.tasks:
            raise BadRecordError(f"no {TASK} has the number {number}")
        return self._folder.tasks[number]


def _image_column(feature: Mapping[str, Any]) -> Column:
    names = feature.get("names")
    shape = dict(zip(names, feature["shape"], strict=True)) if names else {}
    height, width = shape.get("height", -1), shape.get("width", -1)
    return Column("image", (height, width, 3), "uint8", "jpeg")


def _number_column(feature: Mapping[str, Any]) -> Column:
    # An Example's lists hold f32: f64 keeps its bits only when packed.
    encoding = "bytes" if feature["dtype"] == "float64" else "none"
    return Column("tensor", tuple(feature["shape"]), feature["dtype"], encoding)


def _frames(path: Path, pts: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the frame u8[h,w,3] at each of the ascending ``pts``, decoding each once.

    Raises:
      BadRecordError: a frame does not decode.
    """
    if (np.diff(pts) < 0).any():
        raise BadRecordError("its times do not ascend")
    try:
        with av.open(str(path)) as container:
            at = 0
            for frame in _decoded(container, int(pts[0])):
                while at < len(pts) and frame.pts == pts[at]:
                    yield frame.to_ndarray(format="rgb24")
                    at += 1
                if at == len(pts):
                    return
    except av.FFmpegError as error:
        raise BadRecordError(f"{path}: does not decode ({error})") from error
    raise BadRecordError(f"{path}: no frame at pts {pts[at]} decodes; is it truncated?")


def _decoded(container: Any, pts: int) -> Iterator[Any]:
    """Frames in order, from the one at ``pts`` or before."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    container.seek(pts, stream=stream, backward=True)
    first = next(container.decode(stream), None)
    # Seeking goes by decoding time: in an open group of pictures it may end past the frame.
    beginning = first is None or first.pts is None or first.pts > pts
    container.seek((stream.start_time or 0) if beginning else pts, stream=stream, backward=True)
    yield from container.decode(stream)
