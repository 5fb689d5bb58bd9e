"""Writers of robot episodes and grounding records, in the formats that this package reads.

`EpisodeWriter` writes an RLDS folder for `data.rlds.RldsSource` and tfds, `GroundingWriter` a JSONL
file and images for `data.grounding.GroundingSource`.  A folder appears when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from st4vla_jax.data.image import decode_image
from st4vla_jax.data.index_folder import sync
from st4vla_jax.data.llava import ROLES, check_turns, record_turns
from st4vla_jax.data.source import Region, Turn
from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.tfds_write import (
    ShardWriter,
    WrittenShard,
    check_columns,
    encode_episode,
    encode_image,
    episode_features,
    shard_name,
    write_description,
)

LANGUAGE = "language_instruction"
FLAGS: Mapping[str, Column] = {
    **{name: Column("tensor", (), "bool") for name in ("is_first", "is_last", "is_terminal")},
    **{name: Column("tensor", (), "float32") for name in ("reward", "discount")},
}
RECORDS = "records.jsonl"

_FOLDER_IMAGES = 4096  # files of one folder that file systems list quickly


def demonstration_flags(steps: int) -> dict[str, np.ndarray]:
    """FLAGS of a successful demonstration: ends in a terminal step with reward 1, discount 1."""
    last = np.arange(steps) == steps - 1
    return {
        "is_first": np.arange(steps) == 0,
        "is_last": last,
        "is_terminal": last,
        "reward": last.astype(np.float32),
        "discount": np.ones(steps, np.float32),
    }


class _NewFolder:
    """A folder written beside its name, which it takes when the block ends without an error."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).absolute()
        self._work = self.out.with_name(f".{self.out.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Self:
        if self.out.exists():
            raise FileExistsError(f"{self.out}: already there; give another folder")
        self._work.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(kind, error, trace)
            if kind is None:
                for path in self._work.rglob("*"):
                    sync(path)
                self._work.rename(self.out)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _close(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError


class EpisodeWriter(_NewFolder):
    """Writes episodes as a tfds-format (RLDS) folder of array_record shards.

    Args:
      out: folder of the version, as ``data/tabletop/1.0.0``.
      columns: of a step by "/"-joined path; images with encoding jpeg or png.  FLAGS and LANGUAGE
        are added.
      name: of the data set.
      version: of the data set.
      metadata: of an episode.
      shard_episodes: episodes of a shard.

    Raises:
      EpisodeError: columns that cannot be written, all of them.
    """

    def __init__(
        self,
        out: str | Path,
        columns: Mapping[str, Column],
        *,
        name: str,
        version: str = "1.0.0",
        metadata: Mapping[str, Column] | None = None,
        shard_episodes: int = 256,
    ) -> None:
        super().__init__(out)
        self.columns = {LANGUAGE: Column("text"), **FLAGS, **columns}
        self.metadata = dict(metadata or {})
        check_columns(self.columns)
        check_columns(self.metadata)
        self._name, self._version, self._shard_episodes = name, version, shard_episodes
        self._open: dict[str, ShardWriter] = {}
        self._written: dict[str, list[WrittenShard]] = {}

    def add(
        self,
        steps: Mapping[str, Any],
        *,
        split: str = "train",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one episode of T steps.

        Args:
          steps: by path: T encoded images or u8[T,h,w,3]; T texts, or one for all steps; [T,...].
            FLAGS that are not given are those of a demonstration.
          split: where it goes.
          metadata: by path, one value each.

        Raises:
          EpisodeError: values that are missing, unknown or not as declared; lists all.
          OSError: the shard cannot be written.
        """
        length = max((len(v) for v in steps.values() if not isinstance(v, str)), default=0)
        steps = {**demonstration_flags(length), **steps}
        record = encode_episode(self.columns, steps, self.metadata, metadata or {})
        written = self._written.setdefault(split, [])
        if split not in self._open:
            # The number of shards is known, and part of their names, only at the end.
            path = self._work / f"{split}-{len(written)}"
            self._open[split] = ShardWriter(path).__enter__()
        shard = self._open[split]
        shard.write(record)
        if shard.records == self._shard_episodes:
            self._finish(split)

    def _finish(self, split: str) -> None:
        shard = self._open.pop(split)
        shard.__exit__(None, None, None)
        self._written[split].append(shard.written)

    def _close(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for shard in self._open.values():
                shard.__exit__(kind, error, trace)
            return
        for split in list(self._open):
            self._finish(split)
        if not self._written:
            raise ValueError(f"{self.out}: no episode was added")
        for split, shards in self._written.items():
            for number, shard in enumerate(shards):
                name = shard_name(self._name, split, number, len(shards))
                (self._work / shard.name).rename(self._work / name)
        features = episode_features(self.columns, self.metadata)
        write_description(self._work, self._name, self._version, features, self._written)


class GroundingWriter(_NewFolder):
    """Writes grounding records as JSONL and a folder of images.

    The same image, in several records, is stored once.

    Args:
      out: folder to make; holds RECORDS and ``images``.
      encoding: jpeg or png, of images that are given as pixels.
    """

    def __init__(self, out: str | Path, *, encoding: str = "png") -> None:
        super().__init__(out)
        self._column = Column("image", (-1, -1, 3), "uint8", encoding)
        check_columns({"image": self._column})
        self._images: dict[bytes, str] = {}
        self.records = 0

    def __enter__(self) -> Self:
        super().__enter__()
        self._lines = (self._work / RECORDS).open("w", encoding="utf-8")
        return self

    def add(
        self,
        images: Sequence[bytes | np.ndarray],
        turns: Sequence[Turn],
        **more: Any,
    ) -> None:
        """Writes one record.

        Args:
          images: encoded (kept as they are) or u8[h,w,3].
          turns: a conversation; regions in pixels of these images.
          more: further keys of the record, as JSON.

        Raises:
          BadRecordError: `GroundingSource` would not read the record; says why.
          ImageError: bytes that are no image.
        """
        encoded = [i if isinstance(i, bytes) else encode_image(i, self._column) for i in images]
        sizes = [decode_image(image).shape[:2] for image in encoded]
        record = {**more, "images": [], "conversations": conversations(turns)}
        check_turns(record_turns(record, sizes), sizes)
        record["images"] = [self._store(image) for image in encoded]
        self._lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.records += 1

    def _store(self, image: bytes) -> str:
        """Relative path of an image, written if it is new."""
        key = hashlib.sha256(image).digest()
        if key not in self._images:
            number = len(self._images)
            suffix = Image.open(io.BytesIO(image)).format.lower()
            name = f"images/{number // _FOLDER_IMAGES:05d}/{number:08d}.{suffix}"
            path = self._work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
            self._images[key] = name
        return self._images[key]

    def _close(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        if kind is None and not self.records:
            raise ValueError(f"{self.out}: no record was added")


def conversations(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as a LLaVA record's conversations, regions in original pixels (see data/llava.py)."""
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"from": names[ROLES[turn.role]], "value": turn.text}
        | ({"regions": [_region(region) for region in turn.regions]} if turn.regions else {})
        for turn in turns
    ]


def _region(region: Region) -> dict[str, Any]:
    return {
        "kind": region.kind,
        "coordinates": np.asarray(region.coordinates, np.float64).tolist(),
        "image": region.image,
        "label": region.label,
    }
