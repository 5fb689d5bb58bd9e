"""RLDS in TFRecord shards to array_record: the records' bytes are copied unchanged."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from st4vla_jax.data.conversion import Conversion, ConversionError, PlannedShard
from st4vla_jax.data.tfds_folder import Column, Shard, TfdsFolder, read_folder
from st4vla_jax.data.tfrecord import (
    ExampleError,
    bytes_spans,
    feature_spans,
    numbers,
    read_records,
)


def rlds_conversion(root: Path) -> Conversion:
    """Plans the copy of a tfds-format folder; shard i of a split becomes shard i.

    Raises:
      FolderError: not such a folder, or shards are missing.
      ConversionError: the shards are array_record already.
    """
    folder = read_folder(root)
    done = [s.path.name for s in folder.shards("all") if s.format != "tfrecord"]
    if done:
        raise ConversionError(f"{root}: {done[0]} is no TFRecord shard; nothing to convert")
    path, column = _counted(folder)
    features, info = (_json(folder.root / n) for n in ("features.json", "dataset_info.json"))
    shards = [
        PlannedShard(
            split, number, shard.records, functools.partial(_read, shard, f"steps/{path}", column)
        )
        for split, parts in folder.splits.items()
        for number, shard in enumerate(parts)
    ]
    first_split, (first, *_) = next(iter(folder.splits.items()))
    descriptions = [p for p in (folder.root / "dataset_info.json",) if p.exists()]
    return Conversion(
        source=folder.root,
        sources=(
            folder.root / "features.json",
            *descriptions,
            *(shard.path for parts in folder.splits.values() for shard in parts),
        ),
        format="rlds",
        name=first.path.name.partition(f"-{first_split}.")[0],
        version=info.get("version") or folder.root.name,
        features=features,
        shards=tuple(shards),
        info=info,
        # Names of classes, which tfds keeps beside the shards.
        files={path.name: path.read_bytes() for path in folder.root.glob("*.labels.txt")},
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _counted(folder: TfdsFolder) -> tuple[str, Column]:
    """A column whose values tell how many steps a record has."""
    columns: Mapping[str, Column] = folder.columns
    for kinds in (("text", "image"), ("tensor",)):
        for path, column in columns.items():
            if column.kind in kinds and min(column.shape, default=0) >= 0:
                return path, column
    raise ConversionError(f"{folder.root}/features.json: no column by which steps can be counted")


def _read(shard: Shard, feature: str, column: Column) -> Iterator[tuple[bytes, int]]:
    """Yields each record and its number of steps.

    Raises:
      ShardError: the file is truncated.
      ConversionError: a record fails its checksum, or is no episode.
    """
    for number, (_, data, _, sound) in enumerate(read_records(shard.path)):
        if not sound:
            raise ConversionError(
                f"{shard.path} record {number}: fails its checksum; fetch the file again"
            )
        try:
            span = feature_spans(data)[feature]
            if column.kind == "tensor" and column.encoding == "none":
                steps = len(numbers(data, span)) // math.prod(column.shape)
            else:
                steps = len(bytes_spans(data, span))
        except (ExampleError, KeyError) as error:
            raise ConversionError(f"{shard.path} record {number}: {error!r}") from error
        yield data, steps
