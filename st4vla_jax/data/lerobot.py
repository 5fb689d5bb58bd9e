"""LeRobot sets as robot samples, and their annotations as grounding samples.

The index holds what a sample needs but its pixels: actions, state, texts and, for each view, the
video and the presentation time of the exact frame.  A sample then decodes one frame a view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st4vla_jax.data.answers import REGION
from st4vla_jax.data.chunks import PADS, action_chunk
from st4vla_jax.data.episode_table import Filters, pauses
from st4vla_jax.data.holdout import check_part, open_part, other_part
from st4vla_jax.data.index_folder import build_once, cache_root, digest, open_array, read_manifest
from st4vla_jax.data.lerobot_folder import LeRobotFolder
from st4vla_jax.data.lerobot_index import Annotations, build_grounding, build_robot
from st4vla_jax.data.prompts import IMAGE, TEMPLATES, PromptConfig, spatial_prompt
from st4vla_jax.data.robot_spec import RobotSpec, StandardEpisode
from st4vla_jax.data.source import BadRecordError, Lengths, Region, RobotStep, Sample, Turn
from st4vla_jax.data.source_files import SourceError, check_stamps, file_stamps, kept_lengths
from st4vla_jax.data.video import VideoReader

_FORMAT = 2  # of the indices; another one makes new ones


class _Frames:
    """Rows of an index, each with the frames of its views."""

    _arrays: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open()

    def _open(self) -> None:
        meta = read_manifest(self._folder)
        if meta is None:
            raise SourceError(f"{self._folder}: the index is gone; start again")
        check_stamps(meta["stamps"])
        self._meta = meta
        arrays = ("episode", "step", "text", "video", "pts", "content_episode", "content",
                  *self._arrays)  # fmt: skip
        self._index = {name: open_array(self._folder / f"{name}.npy") for name in arrays}
        self._reader = VideoReader()
        count, about = len(self._index["step"]), list(self._choice)
        self._part = open_part(self._folder, about, count, self._reasons)

    def _reasons(self) -> dict[str, np.ndarray]:
        """bool[N] of the index rows to leave out, by reason."""
        episode = np.searchsorted(self._index["content_episode"], self._index["episode"])
        other = other_part(self._index["content"], *self._choice[:2])
        return {f"{name} episode": holds[episode] for name, holds in other.items()}

    def __getstate__(self) -> dict[str, Any]:
        kept = {"name", "_folder", "_choice", "_chunk", "_pad", "_masked", "_template"}
        return {key: value for key, value in self.__dict__.items() if key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def bad(self) -> list[str]:
        """One line for each record that the index leaves out."""
        return self._meta["bad"]

    @property
    def left_out(self) -> dict[str, int]:
        """Steps that are no samples, by reason."""
        return {**self._meta["left_out"], **self._part.left_out}

    def __len__(self) -> int:
        return len(self._part.rows)

    def _row(self, index: int) -> int:
        """The index row of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} of {self.name}")
        return int(self._part.rows[index])

    def contents(self) -> np.ndarray:
        """u64[E] hash of each indexed episode's numbers and tasks, held out or not."""
        return self._index["content"]

    def image_sizes(self) -> np.ndarray:
        """i32[n,V,2] (height, width) of each sample's views."""
        sizes = np.array([size for _, size in self._meta["videos"]], np.int32)
        return sizes[self._index["video"]]

    def record_name(self, row: int) -> str:
        """Folder, episode and step of an index row."""
        episode, step = self._index["episode"][row], self._index["step"][row]
        return f"{self._meta['root']}: episode {episode} step {step}"

    def _images(self, row: int) -> tuple[np.ndarray, ...]:
        images = []
        for video, pts in zip(self._index["video"][row], self._index["pts"][row], strict=True):
            path, size = self._meta["videos"][video]
            try:
                images.append(self._reader.frame(Path(path), int(pts)))
            except BadRecordError as e:
                raise BadRecordError(f"{self.record_name(row)}: {e}") from e
            if list(images[-1].shape[:2]) != size:
                raise BadRecordError(
                    f"{self.record_name(row)}: a frame of another size than {size}"
                )
        return tuple(images)

    def fingerprint(self) -> str:
        """sha256 of the columns read, the frames' times, what is left out and the settings."""
        settings = [getattr(self, key, None) for key in ("_chunk", "_pad", "_masked", "_template")]
        about = self._meta.get("spec")
        return digest(_FORMAT, self._meta["content"], about, settings, self._part.digest)


class LeRobotSource(_Frames):
    """A LeRobot folder as robot samples, one a step.

    Attributes:
      name: of the data set.
    """

    _arrays = ("framed", "actions", "start")

    def __init__(
        self,
        root: Path | str,
        spec: RobotSpec,
        *,
        chunk: int,
        views: Sequence[str] = ("primary",),
        pad: str = "neutral",
        masked: bool = True,
        filters: Filters = Filters(),  # noqa: B008 (frozen)
        holdout: float = 0.0,
        part: str = "train",
        episodes: Sequence[int] | None = None,
        max_bad_records: int = 0,
        index_dir: Path | str | None = None,
    ) -> None:
        """Indexes the folder, or finds its index.

        Args:
          root: folder with meta/, data/ and videos/.
          spec: its columns are names of features; ``language="task"`` is the text of task_index.
          chunk: actions of a chunk (C).
          views: keys of ``spec.images``, in view order.
          pad: see `chunks.action_chunk`.
          masked: likewise.
          filters: steps that no sample starts at.
          holdout: share of the episodes to hold out, by a hash of their content (`data.holdout`).
          part: "train" or "held_out": the episodes to be.
          episodes: numbers of those to use; default: all.
          max_bad_records: episodes and frames that may be left out, named in the log.
          index_dir: see `index_folder.cache_root`.

        Raises:
          SourceError: missing videos or columns (all by name), or too many bad records.
        """
        if unknown := [view for view in views if view not in spec.images]:
            raise SourceError(
                f"{spec.name}: no views {', '.join(unknown)}; there are {', '.join(spec.images)}"
            )
        if spec.swap:
            raise SourceError(f"{spec.name}: swap is for RLDS folders; leave it out of the spec")
        if pad not in PADS or chunk < 1:
            raise ValueError(f"chunk {chunk} must be positive and pad {pad!r} one of {PADS}")
        check_part(holdout, part, spec.name)
        self.name, self._chunk, self._pad, self._masked = spec.name, chunk, pad, masked
        self._choice = (holdout, part, *dataclasses.astuple(filters))
        folder = LeRobotFolder(root)
        chosen = folder.select(episodes)
        features = [spec.images[view] for view in views]
        folder.check_videos(chosen, features)
        stamps = _stamps(folder, chosen, features)
        settings = [spec.to_dict(), list(views), max_bad_records]

        def build(work: Path) -> dict[str, Any]:
            found = build_robot(work, folder, chosen, spec, features, max_bad_records)
            return {**found, "stamps": stamps, "spec": spec.to_dict()}

        target = cache_root(folder.root, index_dir)
        target /= f"lerobot-{digest(_FORMAT, stamps, settings)[:16]}"
        build_once(target, build)
        super().__init__(target)

    def _open(self) -> None:
        super()._open()
        self._spec = RobotSpec.from_dict(self._meta["spec"])
        state = self._folder / "state.npy"
        self._state = open_array(state) if state.exists() else None

    def _reasons(self) -> dict[str, np.ndarray]:
        filters = Filters(*self._choice[2:])
        reasons = {**super()._reasons(), "no frame": ~self._index["framed"]}
        if filters.empty_language:
            empty = np.array([not text.strip() for text in self._meta["texts"]], bool)
            reasons["empty language"] = empty[self._index["text"]]
        if filters.pause is not None:
            spec = RobotSpec.from_dict(self._meta["spec"])
            starts = self._index["start"][:-1]
            reasons["pause"] = pauses(self._index["actions"], starts, spec, filters)
        return reasons

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of its samples."""
        return (self.name,)

    @property
    def spec(self) -> RobotSpec:
        """What its columns mean."""
        return self._spec

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        starts = self._index["start"]
        episode = int(np.searchsorted(starts, row, "right")) - 1
        first, stop = int(starts[episode]), int(starts[episode + 1])
        actions, mask = action_chunk(
            self._index["actions"][first:stop],
            row - first,
            self._chunk,
            self._pad,
            self._spec.absolute,
            self._masked,
        )
        state = None if self._state is None else np.array(self._state[row])
        return Sample(
            self._images(row),
            (Turn("user", self._meta["texts"][self._index["text"][row]]),),
            RobotStep(actions, mask, state, self._spec.embodiment),
            group=self.groups[0],
            record=self.record_name(row),
        )

    def episodes(self) -> np.ndarray:
        """i64[n] number of the episode that each sample is from."""
        return np.searchsorted(self._index["start"], self._part.rows, "right") - 1

    def standard_episodes(self) -> Iterator[StandardEpisode]:
        """The episodes with a sample, whole and image-free: what statistics are computed over."""
        starts = self._index["start"]
        for number in np.unique(self.episodes()):
            rows = slice(int(starts[number]), int(starts[number + 1]))
            state = None if self._state is None else self._state[rows]
            steps = self._index["step"][rows].astype(np.int64)
            yield StandardEpisode(self._index["actions"][rows], state, steps)

    def lengths(self, encoder: Any) -> Lengths:
        """Lengths under an encoder, kept beside the index."""
        rows = self._part.rows
        return kept_lengths(
            self._part.folder,
            encoder,
            lambda: encoder.robot_lengths(
                self._meta["texts"], self._index["text"][rows], self.image_sizes()[rows]
            ),
        )


class LeRobotGrounding(_Frames):
    """Boxes of the objects to pick and to place at, out of a simulator's annotation columns.

    One record a frame that shows at least one of them: the spatial prompt, answered by
    ``{"pick": {"bbox_2d": ...}, "place": {"bbox_2d": ...}}`` as InternVLA-M1 evaluates it (spec
    data.md section 6).
    """

    _arrays = ("boxes",)

    def __init__(
        self,
        root: Path | str,
        *,
        name: str,
        video: str,
        annotations: Annotations | None = None,
        template: str = TEMPLATES["upstream"],
        stride: int = 1,
        holdout: float = 0.0,
        part: str = "train",
        episodes: Sequence[int] | None = None,
        max_bad_records: int = 0,
        index_dir: Path | str | None = None,
    ) -> None:
        """Indexes the folder, or finds its index.

        Args:
          root: folder with meta/, data/ and videos/.
          name: of the data set.
          video: feature that the boxes are in the pixels of, as "video.ego_view".
          annotations: names of the columns; default: InternVLA-M1's for this view.
          template: prompt with ``{instruction}``.
          stride: every how many frames a record is taken.
          holdout: as in `LeRobotSource`: of one folder both hold out the same episodes.
          part: likewise.
          episodes: as in `LeRobotSource`.
          max_bad_records: likewise.
          index_dir: likewise.

        Raises:
          SourceError: missing videos or columns (all by name), or too many bad records.
        """
        check_part(holdout, part, name)
        self.name, self._template, self._choice = name, template, (holdout, part)
        PromptConfig(template)  # fails now if it has no place for the instruction
        columns = annotations or Annotations.of_view(video.rpartition(".")[2])
        folder = LeRobotFolder(root)
        chosen = folder.select(episodes)
        folder.check_videos(chosen, [video])
        stamps = _stamps(folder, chosen, [video])

        def build(work: Path) -> dict[str, Any]:
            found = build_grounding(work, folder, chosen, columns, video, stride, max_bad_records)
            return {**found, "stamps": stamps}

        settings = [list(columns), video, stride, max_bad_records]
        target = cache_root(folder.root, index_dir)
        target /= f"boxes-{digest(_FORMAT, stamps, settings)[:16]}"
        build_once(target, build)
        super().__init__(target)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of its samples."""
        return (f"{self.name}/box",)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """Prompt and answer; boxes in the video's pixels."""
        row = self._row(index)
        instruction = self._meta["texts"][self._index["text"][row]]
        prompt = spatial_prompt(instruction, PromptConfig(self._template))
        boxes = zip(("pick", "place"), self._index["boxes"][row], strict=True)
        shown = {key: box for key, box in boxes if np.isfinite(box).all()}
        answer = "{" + ", ".join(f'"{key}": {REGION}' for key in shown) + "}"
        regions = tuple(Region("box", np.array(b).reshape(2, 2)) for b in shown.values())
        return Turn("user", IMAGE + prompt), Turn("assistant", answer, regions)

    def __getitem__(self, index: int) -> Sample:
        turns, row = self.turns(index), self._row(index)
        return Sample(self._images(row), turns, group=self.groups[0], record=self.record_name(row))

    def lengths(self, encoder: Any) -> Lengths:
        """Lengths under an encoder, kept beside the index."""

        def compute() -> Lengths:
            rows = self.image_sizes()[self._part.rows]
            sizes = ([tuple(size) for size in row.tolist()] for row in rows)
            return encoder.conversation_lengths(map(self.turns, range(len(self))), sizes)

        # The prompt is not the encoder's here, so it is part of the key.
        place = self._part.folder / f"prompt-{digest(self._template)[:16]}"
        return kept_lengths(place, encoder, compute)


def _stamps(
    folder: LeRobotFolder, episodes: Sequence[Any], features: Sequence[str]
) -> list[list[Any]]:
    """Stamps of the meta files, of all data files and of all videos that are used."""
    paths = dict.fromkeys(folder.meta_files)
    for episode in episodes:
        paths[episode.data] = None
        paths.update({episode.videos[name].path: None for name in features})
    return file_stamps(paths)
