"""Writes what tfds reads, without TensorFlow: features.json, records, array_record shards.

A record is a tf.train.Example; nested features are flattened to "/"-joined names, and what has one
value a step is concatenated over the steps (tfds core/example_serializer.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from st4vla_jax.data.index_folder import sync
from st4vla_jax.data.shards import first_line, open_array_record
from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.tfrecord import ShardError, masked_crc32c

JPEG_QUALITY = 95  # what tfds and Open-X sets are written with

_FEATURES = "tensorflow_datasets.core.features"
_OPTIONS = "group_size:1"  # each record can be read alone; tfds writes the same
_IMAGE_ENCODINGS = ("jpeg", "png")


class EpisodeError(ValueError):
    """An episode that does not fit the declared columns; lists every problem by column."""


# --- Declarations -------------------------------------------------------------------------------


def check_columns(columns: Mapping[str, Column]) -> None:
    """Raises EpisodeError, listing every column that cannot be written."""
    problems = []
    for path, column in columns.items():
        if column.kind == "image" and column.encoding not in _IMAGE_ENCODINGS:
            problems.append(f"{path}: an image is encoded as {' or '.join(_IMAGE_ENCODINGS)}")
        elif column.kind == "tensor" and column.encoding not in ("none", "bytes"):
            problems.append(f"{path}: tensors are written with encoding none or bytes")
        elif column.kind == "tensor" and not _fits_list(column):
            problems.append(f"{path}: {column.dtype} is exact with encoding='bytes' only")
        elif column.kind not in ("image", "text", "tensor"):
            problems.append(f"{path}: a column of kind {column.kind} cannot be written")
        parents = ("/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 1))
        problems += [f"{path}: {parent} is a column too" for parent in parents if parent in columns]
    if problems:
        raise EpisodeError("columns:\n  " + "\n  ".join(problems))


def _fits_list(column: Column) -> bool:
    """Whether an Example's lists, of f32 and i64, hold every value of a dtype."""
    dtype = np.dtype(column.dtype)
    if column.encoding == "bytes":
        return True
    return np.can_cast(dtype, np.float32) if dtype.kind == "f" else np.can_cast(dtype, np.int64)


def episode_features(
    columns: Mapping[str, Column], metadata: Mapping[str, Column]
) -> dict[str, Any]:
    """features.json of an episodic data set.

    Args:
      columns: of a step, by "/"-joined path; an image's ``encoding`` is jpeg or png.
      metadata: of an episode, below ``episode_metadata``.
    """
    steps = {
        "pythonClassName": f"{_FEATURES}.dataset_feature.Dataset",
        "sequence": {"feature": _tree(columns), "length": "-1"},
    }
    top = {"steps": steps}
    if metadata:
        top["episode_metadata"] = _tree(metadata)
    return _features_dict(top)


def record_features(images: str, texts: Sequence[str]) -> dict[str, Any]:
    """features.json of records with a list of images and some texts."""
    image = _leaf(Column("image", (-1, -1, 3), "uint8", "png"))
    sequence = {
        "pythonClassName": f"{_FEATURES}.sequence_feature.Sequence",
        "sequence": {"feature": image, "length": "-1"},
    }
    return _features_dict({images: sequence} | {text: _leaf(Column("text")) for text in texts})


def _features_dict(features: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": f"{_FEATURES}.features_dict.FeaturesDict",
        "featuresDict": {"features": dict(features)},
    }


def _tree(columns: Mapping[str, Column]) -> dict[str, Any]:
    """Nested declaration of columns by "/"-joined path."""
    root = _features_dict({})
    for path, column in columns.items():
        *parents, leaf = path.split("/")
        node = root["featuresDict"]["features"]
        for name in parents:
            node = node.setdefault(name, _features_dict({}))["featuresDict"]["features"]
        node[leaf] = _leaf(column)
    return root


def _leaf(column: Column) -> dict[str, Any]:
    shape = {"dimensions": [str(n) for n in column.shape]} if column.shape else {}
    if column.kind == "text":
        return {"pythonClassName": f"{_FEATURES}.text_feature.Text", "text": {}}
    if column.kind == "image":
        image = {"shape": shape, "dtype": "uint8", "encodingFormat": column.encoding}
        return {"pythonClassName": f"{_FEATURES}.image_feature.Image", "image": image}
    # tfds forgets the encoding of a Scalar.
    scalar = not column.shape and column.encoding == "none"
    name = "scalar.Scalar" if scalar else "tensor_feature.Tensor"
    tensor = {"shape": shape, "dtype": column.dtype, "encoding": column.encoding}
    return {"pythonClassName": f"{_FEATURES}.{name}", "tensor": tensor}


def write_description(
    folder: Path,
    name: str,
    version: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Sequence[WrittenShard]],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes features.json and dataset_info.json, with ``more`` keys, beside the shards."""
    info = {
        **(more or {}),
        "name": name,
        "version": version,
        "fileFormat": "array_record",
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(shard.data_bytes for shard in shards)),
                "shardLengths": [str(shard.records) for shard in shards],
            }
            for split, shards in splits.items()
        ],
    }
    write_json(folder / "features.json", features)
    write_json(folder / "dataset_info.json", info)


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """File name of a shard as tfds expects it."""
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


# --- Records ------------------------------------------------------------------------------------


def encode_episode(
    columns: Mapping[str, Column],
    steps: Mapping[str, Any],
    metadata_columns: Mapping[str, Column],
    metadata: Mapping[str, Any],
) -> bytes:
    """One episode as a serialised tf.train.Example; the same input gives the same bytes.

    Args:
      columns: declaration of ``steps``.
      steps: by path: T encoded images or u8[T,h,w,c]; T texts, or one for all steps; [T,...].
      metadata_columns: declaration of ``metadata``.
      metadata: by path, one value each.

    Raises:
      EpisodeError: values that are missing, unknown, or not as declared; lists all.
    """
    problems = _name_problems("step", columns, steps) + _name_problems(
        "episode_metadata", metadata_columns, metadata
    )
    lengths = {
        path: len(values) for path, values in steps.items() if not isinstance(values, str | bytes)
    }
    length = max(lengths.values(), default=0)
    if len(set(lengths.values())) > 1 or not length:
        problems.append(f"columns must have the same length, at least 1: {lengths}")
    if problems:
        raise EpisodeError("\n  ".join(["an episode does not fit its columns:", *problems]))
    example = tf_example_pb2.Example()
    for prefix, declared, values in (
        ("steps/", columns, steps),
        ("episode_metadata/", metadata_columns, {k: [v] for k, v in metadata.items()}),
    ):
        for path, column in declared.items():
            try:
                _fill(example.features.feature[prefix + path], column, values[path], length)
            except (ValueError, TypeError) as error:
                problems.append(f"{prefix}{path}: {error}")
    if problems:
        raise EpisodeError("\n  ".join(["an episode does not fit its columns:", *problems]))
    return example.SerializeToString(deterministic=True)


def encode_record(features: Mapping[str, Sequence[bytes]]) -> bytes:
    """A serialised tf.train.Example of byte strings."""
    example = tf_example_pb2.Example()
    for name, values in features.items():
        example.features.feature[name].bytes_list.value.extend(values)
    return example.SerializeToString(deterministic=True)


def _name_problems(what: str, declared: Mapping[str, Column], given: Mapping[str, Any]) -> list:
    missing = [f"{what} {path}: missing" for path in declared if path not in given]
    return missing + [f"{what} {path}: not declared" for path in given if path not in declared]


def _fill(feature: tf_example_pb2.Feature, column: Column, values: Any, length: int) -> None:
    """Sets a feature's list; raises ValueError or TypeError where values are not as declared."""
    if column.kind == "text":
        texts = [values] * length if isinstance(values, str | bytes) else values
        feature.bytes_list.value.extend(
            text if isinstance(text, bytes) else text.encode() for text in texts
        )
    elif column.kind == "image":
        feature.bytes_list.value.extend(
            image if isinstance(image, bytes) else encode_image(_fitting(image, column), column)
            for image in values
        )
    else:
        rows = np.asarray(values)
        if not np.can_cast(rows.dtype, column.dtype, "same_kind"):
            raise ValueError(f"{rows.dtype} values, declared {column.dtype}")
        rows = np.stack([_fitting(row, column) for row in rows]).astype(column.dtype)
        if column.encoding == "bytes":
            little = rows.astype(rows.dtype.newbyteorder("<"))
            feature.bytes_list.value.extend(row.tobytes() for row in little)
        elif rows.dtype.kind == "f":
            feature.float_list.value.extend(rows.ravel().tolist())
        else:
            feature.int64_list.value.extend(rows.ravel().astype(np.int64).tolist())


def _fitting(row: Any, column: Column) -> np.ndarray:
    array = np.asarray(row)
    fits = [want in (-1, have) for want, have in zip(column.shape, array.shape, strict=False)]
    if array.ndim != len(column.shape) or not all(fits):
        raise ValueError(f"shape {list(array.shape)} of a step, declared {list(column.shape)}")
    return array


def encode_image(pixels: np.ndarray, column: Column) -> bytes:
    """u8[h,w,3] (or [h,w,1]) as JPEG of quality 95 or as PNG, as the column declares."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels of {pixels.dtype}, expected uint8")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    out = io.BytesIO()
    if column.encoding == "jpeg":
        image.save(out, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(out, "PNG")
    return out.getvalue()


# --- Shards -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """A finished shard: number of records, bytes of their data, size and sha256 of the file."""

    name: str
    records: int
    data_bytes: int
    size: int
    sha256: str


class ShardWriter:
    """Writes one array_record shard; the file has its name only once it is read back and whole.

    A context manager: leaving it by an exception deletes what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, None
        self.data_bytes = 0
        self._part = path.with_name(path.name + ".part")
        self._checksums: list[int] = []

    @property
    def records(self) -> int:
        """Records written so far."""
        return len(self._checksums)

    def __enter__(self) -> ShardWriter:
        # The library reports a file that cannot be made only when it is closed; Python at once.
        self._part.write_bytes(b"")
        self._writer = ArrayRecordWriter(str(self._part), _OPTIONS)
        return self

    def write(self, record: bytes) -> None:
        """Adds a record; raises OSError if the file cannot be written."""
        self._checksums.append(masked_crc32c(record))
        self.data_bytes += len(record)
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise self._failed(error) from None

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self._writer.close()
            except RuntimeError as problem:
                if kind is None:
                    raise self._failed(problem) from None
            if kind is None:
                self.written = self._finished()
        finally:
            self._part.unlink(missing_ok=True)

    def _finished(self) -> WrittenShard:
        """Reads the file back, so that a write that failed silently cannot pass."""
        sync(self._part)
        try:
            if list(checksums(self._part)) != self._checksums:
                raise ShardError("its records are not what was written")
        except ShardError as error:
            raise OSError(f"{self._part}: {error}; is the disk full or broken?") from None
        self._part.rename(self.path)
        return WrittenShard(
            self.path.name,
            len(self._checksums),
            self.data_bytes,
            self.path.stat().st_size,
            file_hash(self.path),
        )

    def _failed(self, error: RuntimeError) -> OSError:
        return OSError(f"{self._part}: cannot be written ({first_line(error)}); make room")


def checksums(path: Path) -> Iterator[int]:
    """Masked CRC-32C of each record of an array_record file.

    Raises:
      ShardError: it is broken.
    """
    reader = open_array_record(path)
    try:
        for number in range(reader.num_records()):
            yield masked_crc32c(reader.read([number])[0])
    except (RuntimeError, IndexError) as error:
        raise ShardError(f"{path}: {first_line(error)}") from None
    finally:
        reader.close()


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; the file appears whole, and is on disk when this returns."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(part)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
