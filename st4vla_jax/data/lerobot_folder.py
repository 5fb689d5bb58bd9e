"""LeRobot folders of formats v2.0, v2.1 and v3.0, read without lerobot: parquet and JSON only.

v2: one parquet and one mp4 a camera for each episode, ``meta/episodes.jsonl`` and ``tasks.jsonl``.
v3: several episodes in one parquet and one mp4; ``meta/episodes/*/*.parquet`` says which rows and
from which second.  Importing this module needs the ``lerobot`` extra (pyarrow).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.source_files import SourceError

VERSIONS = ("v2.0", "v2.1", "v3.0")
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
TASK = "task"  # as a language column: the text of the step's task_index


@dataclasses.dataclass(frozen=True)
class VideoSpan:
    """Where an episode lies in a video: `start` seconds after the video's first frame."""

    path: Path
    start: float


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode.

    Attributes:
      index: its number in the data set.
      rows: (first, past the last) of its rows in `data`.
      data: parquet file.
      videos: by feature name.
    """

    index: int
    rows: tuple[int, int]
    data: Path
    videos: dict[str, VideoSpan]


class LeRobotFolder:
    """What a folder's meta files say.

    Attributes:
      root: the folder.
      version: "v2.0", "v2.1" or "v3.0".
      fps: frames (and control steps) a second.
      features: name -> {"dtype", "shape", ...}.
      meta_files: what was read from meta/.
      tasks: text by task_index.
      episodes: in the order of their numbers.
    """

    def __init__(self, root: Path | str) -> None:
        """Reads the meta files.

        Raises:
          SourceError: not a LeRobot folder, or of a format that is not known.
        """
        self.root = Path(root)
        info = _json(self.root / "meta/info.json")
        version = str(info.get("codebase_version") if isinstance(info, dict) else None)
        if version not in VERSIONS:
            raise SourceError(
                f"{self.root}: LeRobot format {version}; {', '.join(VERSIONS)} are read"
            )
        try:
            self.version = version
            self.fps = float(info["fps"])
            self.features: dict[str, dict[str, Any]] = info["features"]
            self._data_path, self._video_path = info["data_path"], info.get("video_path")
            self._chunk = int(info.get("chunks_size", 1000))
            meta = self.root / "meta"
            if self.version.startswith("v3."):
                listed = sorted((meta / "episodes").glob("*/*.parquet"))
                self.meta_files = [meta / "info.json", meta / "tasks.parquet", *listed]
                self.tasks = self._tasks_v3(meta / "tasks.parquet")
                self.episodes = self._episodes_v3(listed)
            else:
                self.meta_files = [meta / n for n in ("info.json", "tasks.jsonl", "episodes.jsonl")]
                self.tasks = {row["task_index"]: row["task"] for row in _lines(self.meta_files[1])}
                rows = _lines(self.meta_files[2])
                self.episodes = [self._episode_v2(r["episode_index"], r["length"]) for r in rows]
        except SourceError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, pa.ArrowException) as e:
            raise SourceError(f"{self.root}/meta: not a LeRobot folder ({e!r})") from e
        if not self.episodes:
            raise SourceError(f"{self.root}/meta: it lists no episodes")

    @property
    def videos(self) -> tuple[str, ...]:
        """Names of the video features."""
        return tuple(k for k, f in self.features.items() if f["dtype"] == "video")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the features that say what an episode is: all numbers but its bookkeeping."""
        kinds = ("bool", "int", "uint", "float")
        return tuple(
            sorted(
                name
                for name, feature in self.features.items()
                if feature["dtype"].startswith(kinds) and name not in BOOKKEEPING
            )
        )

    def select(self, episodes: Sequence[int] | None) -> list[Episode]:
        """Episodes by number (all if None); raises SourceError naming those that are not there."""
        if episodes is None:
            return self.episodes
        by_index = {episode.index: episode for episode in self.episodes}
        if unknown := [i for i in episodes if i not in by_index]:
            raise SourceError(f"{self.root}: there are no episodes {unknown}")
        return [by_index[i] for i in episodes]

    def check_videos(self, episodes: Sequence[Episode], features: Sequence[str]) -> None:
        """Raises SourceError unless every video of these features is there; names all missing."""
        if unknown := [name for name in features if name not in self.videos]:
            raise SourceError(
                f"{self.root}: no video features {', '.join(unknown)}; there are "
                f"{', '.join(self.videos) or 'none'} (images inside parquet are not read: encode "
                "them as videos)"
            )
        missing: list[Path] = []
        complete = []
        for episode in episodes:
            paths = [episode.videos[name].path for name in features]
            absent = [path for path in paths if not path.is_file()]
            missing += absent
            if not absent:
                complete.append(episode.index)
        if missing:
            names = "\n  ".join(str(path) for path in dict.fromkeys(missing))
            raise SourceError(
                f"{self.root}: {len(set(missing))} videos are missing:\n  {names}\nfetch them, or "
                f"pass episodes={complete}, which have all of {', '.join(features)}"
            )

    def tables(
        self, episodes: Sequence[Episode], columns: Sequence[str]
    ) -> Iterator[tuple[Episode, pa.Table]]:
        """The rows of each episode; a file that holds several is read once if they follow.

        Raises:
          SourceError: a file is missing or broken, or lacks columns.
        """
        path, table = None, None
        for episode in episodes:
            if episode.data != path:
                path, table = episode.data, self._read(episode.data, columns)
            first, stop = episode.rows
            if stop > table.num_rows:
                raise SourceError(
                    f"{path}: {table.num_rows} rows, episode {episode.index} ends at row {stop}"
                )
            yield episode, table.slice(first, stop - first)

    def _read(self, path: Path, columns: Sequence[str]) -> pa.Table:
        try:
            file = pq.ParquetFile(path)
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise SourceError(
                    f"{path}: no columns {', '.join(missing)}; there are "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            return file.read(columns=list(columns))
        except (FileNotFoundError, pa.ArrowInvalid) as e:
            raise SourceError(f"{path}: not a readable parquet file ({e})") from e

    def _tasks_v3(self, path: Path) -> dict[int, str]:
        numbers = self._read(path, ["task_index"])["task_index"].to_pylist()
        # pandas writes the text as the frame's index, under a name that depends on the writer.
        whole = pq.read_table(path)
        (text,) = (name for name in whole.column_names if name != "task_index")
        return dict(zip(numbers, whole[text].to_pylist(), strict=True))

    def _episode_v2(self, index: int, length: int) -> Episode:
        place = {"episode_chunk": index // self._chunk, "episode_index": index}
        videos = {
            key: VideoSpan(self.root / self._video_path.format(video_key=key, **place), 0.0)
            for key in self.videos
        }
        return Episode(index, (0, length), self.root / self._data_path.format(**place), videos)

    def _episodes_v3(self, paths: Sequence[Path]) -> list[Episode]:
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
        rows.sort(key=lambda row: row["episode_index"])
        # Row numbers are of the whole data set; a file starts at its first episode's.
        files = [(row["data/chunk_index"], row["data/file_index"]) for row in rows]
        starts: dict[tuple[int, int], int] = {}
        for row, file in zip(rows, files, strict=True):
            first = row["dataset_from_index"]
            starts[file] = min(first, starts.get(file, first))
        return [
            self._episode_v3(row, file, starts[file]) for row, file in zip(rows, files, strict=True)
        ]

    def _episode_v3(self, row: dict[str, Any], file: tuple[int, int], start: int) -> Episode:
        path = self._data_path.format(chunk_index=file[0], file_index=file[1])
        videos = {}
        for key in self.videos:
            place = {n: row[f"videos/{key}/{n}"] for n in ("chunk_index", "file_index")}
            video = self.root / self._video_path.format(video_key=key, **place)
            videos[key] = VideoSpan(video, row[f"videos/{key}/from_timestamp"])
        rows = row["dataset_from_index"] - start, row["dataset_to_index"] - start
        return Episode(row["episode_index"], rows, self.root / path, videos)


def column_array(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """[T] or [T,d] of a column of numbers, lists of numbers, text or bytes (object).

    Raises:
      BadRecordError: lists of different lengths.
    """
    values = column.combine_chunks()
    rows = len(values)
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = set(pc.list_value_length(values).to_pylist())
        if len(lengths) != 1 or None in lengths:
            found = ", ".join(sorted(map(str, lengths)))
            raise BadRecordError(f"column {name}: lists of different lengths ({found})")
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    return flat if len(flat) == rows else flat.reshape(rows, -1)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise SourceError(f"{path}: no such file; is this a LeRobot folder?") from e
    except ValueError as e:
        raise SourceError(f"{path}: not JSON ({e})") from e


def _lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (FileNotFoundError, NotADirectoryError) as e:
        raise SourceError(f"{path}: no such file; is this a LeRobot folder?") from e
    except ValueError as e:
        raise SourceError(f"{path}: not JSON lines ({e})") from e
