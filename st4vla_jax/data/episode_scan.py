"""One episode record to index rows: where its images lie, its low-dimensional columns, its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import struct
from collections.abc import Mapping, Sequence

import google_crc32c
import numpy as np
from PIL import Image

from st4vla_jax.data.primitives import decode_instruction
from st4vla_jax.data.robot_spec import nearest
from st4vla_jax.data.tfds_folder import Column, FolderError, TfdsFolder
from st4vla_jax.data.tfrecord import ExampleError, Span, bytes_spans, feature_spans, numbers

# Where an image lies in its record, its plain CRC-32C and its size in pixels by its header; a size
# of (0, 0) means that there is no readable image.
IMAGE = np.dtype(
    [("start", "<i4"), ("size", "<i4"), ("crc", "<u4"), ("height", "<u2"), ("width", "<u2")]
)

_PREFIX = "steps/"
_DTYPES = ("bool", *(f"{sign}int{n}" for n in (8, 16, 32, 64) for sign in ("", "u")), "float16",
           "float32", "float64")  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: C0..CF without DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a step is indexed.

    Attributes:
      images: column paths of encoded images.
      columns: paths of low-dimensional columns and how they are stored.
      language: path and column of the instruction; language_encoding: see `decode_instruction`.
      hashed: feature names that the content hash covers: all of a step's that are no images.
    """

    images: tuple[str, ...]
    columns: Mapping[str, Column]
    language: tuple[str, Column]
    language_encoding: str
    hashed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Episode:
    """Index rows of one record, T steps.

    Attributes:
      images: IMAGE[T] by column path.
      columns: [T,...] by path; packed ones and texts as a list of T byte strings.
      instructions: one for each step.
      content: u64 hash of the steps' numbers and texts.
    """

    images: dict[str, np.ndarray]
    columns: dict[str, np.ndarray | list[bytes]]
    instructions: list[str]
    content: int


def is_packed(column: Column) -> bool:
    """Whether a column is handed on as byte strings: texts and zlib-packed arrays."""
    return column.kind == "text" or column.encoding == "zlib"


def make_plan(
    folder: TfdsFolder,
    images: Sequence[str],
    columns: Sequence[str],
    language: str,
    language_encoding: str,
) -> Plan:
    """Finds the columns in features.json.

    Raises:
      FolderError: one is not there or is of another kind; lists all, with the nearest names.
    """
    problems = []

    def find(path: str, kinds: tuple[str, ...]) -> Column:
        column = folder.columns.get(path)
        if column is None:
            problems.append(f"no column {path!r}{nearest(path, folder.columns)}")
        elif column.kind not in kinds:
            problems.append(f"column {path!r} is of kind {column.kind}, not {' or '.join(kinds)}")
        elif column.kind == "tensor" and min(column.shape, default=1) < 1:
            problems.append(f"column {path!r} has no fixed shape: {column.shape}")
        elif column.kind == "tensor" and column.dtype not in _DTYPES:
            problems.append(f"column {path!r} is of dtype {column.dtype}, which is not read")
        return column or Column("other")

    for path in images:
        find(path, ("image",))
    found = {path: find(path, ("tensor", "text")) for path in columns}
    words = find(language, ("text", "tensor"))
    if problems:
        raise FolderError(f"{folder.root}/features.json:\n  " + "\n  ".join(problems))
    hashed = (path for path, column in folder.columns.items() if column.kind != "image")
    return Plan(
        tuple(images), found, (language, words), language_encoding,
        tuple(sorted(_PREFIX + path for path in hashed)),
    )  # fmt: skip


def scan_episode(record: bytes, plan: Plan) -> Episode:
    """Reads one serialised tf.train.Example.

    Raises:
      ExampleError: not one, or a column is missing or does not fit its declaration.
      BadRecordError: an instruction that cannot be decoded.
    """
    spans = feature_spans(record)
    images = {path: _image_rows(record, _span(spans, path)) for path in plan.images}
    columns = {path: _values(record, spans, path, c) for path, c in plan.columns.items()}
    path, column = plan.language
    decoded: dict[bytes, str] = {}
    instructions = []
    for value in _values(record, spans, path, column):
        key = value if isinstance(value, bytes) else value.tobytes()
        if key not in decoded:
            decoded[key] = decode_instruction(value, plan.language_encoding)
        instructions.append(decoded[key])
    lengths = {path: len(rows) for path, rows in {**images, **columns}.items()}
    lengths[plan.language[0]] = len(instructions)
    if len(set(lengths.values())) > 1:
        raise ExampleError(f"columns of different lengths: {lengths}")
    return Episode(images, columns, instructions, _content(record, spans, plan.hashed))


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels from an image's header; (0, 0) if it has none.

    JPEG and PNG are read here, 10 times as fast as PIL, which knows the rest.
    """
    if data.startswith(b"\xff\xd8"):
        at = 2
        while at + 9 <= len(data) and data[at] == 0xFF:
            marker = data[at + 1]
            if marker in _JPEG_FRAMES:
                return struct.unpack_from(">HH", data, at + 5)
            # Fill bytes stand before a marker.
            at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
        return 0, 0
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return height, width
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0
    return height, width


def _span(spans: Mapping[str, Span], path: str) -> Span:
    if (span := spans.get(_PREFIX + path)) is None:
        raise ExampleError(f"no feature {_PREFIX + path!r}")
    return span


def _image_rows(record: bytes, span: Span) -> np.ndarray:
    found = bytes_spans(record, span)
    rows = np.zeros(len(found), IMAGE)
    for i, (start, end) in enumerate(found):
        data = record[start:end]
        height, width = image_size(data)
        if max(height, width) > np.iinfo(np.uint16).max:
            height = width = 0
        rows[i] = start, end - start, google_crc32c.value(data), height, width
    return rows


def _values(
    record: bytes, spans: Mapping[str, Span], path: str, column: Column
) -> np.ndarray | list[bytes]:
    """[T,...] of a column, or T byte strings."""
    span = _span(spans, path)
    try:
        if is_packed(column):
            return [record[a:b] for a, b in bytes_spans(record, span)]
        if column.encoding == "bytes":
            packed = [record[a:b] for a, b in bytes_spans(record, span)]
            flat = np.frombuffer(b"".join(packed), column.dtype)
        else:
            flat = numbers(record, span).astype(column.dtype)
        return flat.reshape(_rows(len(flat), column), *column.shape)
    except ValueError as error:
        raise ExampleError(f"column {path}: {error}") from None


def _rows(count: int, column: Column) -> int:
    size = math.prod(column.shape)
    if count % size:
        raise ExampleError(f"{count} numbers do not make rows of shape {column.shape}")
    return count // size


def _content(record: bytes, spans: Mapping[str, Span], names: Sequence[str]) -> int:
    """Hash of what an episode is, the same in every split, order and encoding of its images."""
    result = hashlib.blake2b(digest_size=8)
    for name in names:
        if name in spans:
            start, end = spans[name]
            result.update(f"{name}\0{end - start}\0".encode())
            result.update(record[start:end])
    return int.from_bytes(result.digest(), "little")
