"""TFRecord framing with checksums, and tf.train.Example read in place, without TensorFlow.

A record is: u64 length, u32 masked CRC-32C of the length, the data, u32 masked CRC-32C of the data
(tensorflow/core/lib/io/record_writer.h).  The data is a tf.train.Example protobuf: a map from name
to a list of bytes, f32 or i64 (tensorflow/core/example/feature.proto).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np

_MASK_DELTA = 0xA282EAD8
_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size

Span = tuple[int, int]  # first byte and one past the last


class ShardError(ValueError):
    """A shard that cannot be used as it is; the message names the file and says what to do."""


class ExampleError(ValueError):
    """Bytes that are no tf.train.Example, or not of the kind that was asked for."""


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[tuple[int, bytes, int, bool]]:
    """Reads a shard from its start to its end.

    Yields:
      (offset of the data in the file, data, its stored masked CRC, whether that fits the data).

    Raises:
      ShardError: the framing is broken, so that what follows cannot be found.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        offset = 0
        while offset < size:
            header = file.read(HEADER_BYTES)
            if len(header) < HEADER_BYTES:
                raise ShardError(f"{path}: truncated record at byte {offset}; fetch the file again")
            length, crc = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != crc:
                raise ShardError(
                    f"{path}: the record length at byte {offset} fails its checksum, so what "
                    "follows cannot be read; fetch the file again"
                )
            offset += HEADER_BYTES
            if offset + length + _CRC.size > size:
                raise ShardError(
                    f"{path}: truncated record at byte {offset - HEADER_BYTES} ({length} bytes of "
                    f"data, {size - offset} left in the file); fetch the file again"
                )
            data = file.read(length)
            (crc,) = _CRC.unpack(file.read(_CRC.size))
            yield offset, data, crc, masked_crc32c(data) == crc
            offset += length + _CRC.size


# --- tf.train.Example ---------------------------------------------------------------------------

_VARINT, _I64, _BYTES, _I32 = 0, 1, 2, 5
_KINDS = {1: "bytes", 2: "f32", 3: "i64"}


def feature_spans(record: bytes) -> dict[str, Span]:
    """Where each feature of an Example lies, nothing copied.

    Raises:
      ExampleError: not a protobuf of that shape.
    """
    spans = {}
    for _, start, end in _fields(record, 0, len(record), only=1):
        for _, entry_start, entry_end in _fields(record, start, end, only=1):
            name, span = "", (entry_end, entry_end)
            for number, a, b in _fields(record, entry_start, entry_end):
                if number == 1:
                    name = record[a:b].decode("utf-8", errors="replace")
                elif number == 2:
                    span = (a, b)
            spans[name] = span
    return spans


def bytes_spans(record: bytes, feature: Span) -> list[Span]:
    """Where each value of a bytes feature lies; an empty feature has none.

    Raises:
      ExampleError: the feature holds numbers, or is broken.
    """
    return [
        (a, b)
        for start, end in _lists(record, feature, "bytes")
        for _, a, b in _fields(record, start, end, only=1)
    ]


def numbers(record: bytes, feature: Span) -> np.ndarray:
    """The values f32[n] or i64[n] of a number feature (f32[0] where it is empty).

    Raises:
      ExampleError: the feature holds bytes, or is broken.
    """
    kinds = [_KINDS.get(n, "unknown") for n, _, _ in _fields(record, *feature)]
    if "i64" in kinds:
        parts = [_i64_list(record, *span) for span in _lists(record, feature, "i64")]
    else:
        parts = [_f32_list(record, *span) for span in _lists(record, feature, "f32")]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _lists(record: bytes, feature: Span, kind: str) -> list[Span]:
    found = []
    for number, start, end in _fields(record, *feature):
        if _KINDS.get(number) != kind:
            raise ExampleError(f"holds {_KINDS.get(number, 'unknown')} values, not {kind}")
        found.append((start, end))
    return found


def _f32_list(record: bytes, start: int, end: int) -> np.ndarray:
    # Packed or one by one: both are fixed-width little-endian words at the fields' spans.
    words = [record[a:b] for _, a, b in _fields(record, start, end, only=1)]
    try:
        return np.frombuffer(b"".join(words), "<f4")
    except ValueError as error:
        raise ExampleError(f"broken list of floats ({error})") from None


def _i64_list(record: bytes, start: int, end: int) -> np.ndarray:
    # Packed or one by one: both are varints at the fields' spans.
    coded = np.frombuffer(
        b"".join(record[a:b] for _, a, b in _fields(record, start, end, only=1)), np.uint8
    )
    ends = np.flatnonzero(coded < 128)
    if not len(coded):
        return np.empty(0, np.int64)
    if not len(ends) or ends[-1] != len(coded) - 1:
        raise ExampleError("broken list of integers")
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(coded)) - np.repeat(starts, ends - starts + 1)
    parts = (coded & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(parts, starts).view(np.int64)


def _fields(
    record: bytes, start: int, end: int, only: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yields (field number, first byte, one past the last) of the fields of a message."""
    at = start
    while at < end:
        key, at = _varint(record, at, end)
        wire = key & 7
        first = at
        if wire == _BYTES:
            length, first = _varint(record, at, end)
            at = first + length
        elif wire == _I32:
            at += 4
        elif wire == _I64:
            at += 8
        elif wire == _VARINT:
            _, at = _varint(record, at, end)
        else:
            raise ExampleError(f"not a tf.train.Example: wire type {wire} at byte {first}")
        if at > end:
            raise ExampleError(f"not a tf.train.Example: a field at byte {first} runs over its end")
        if only is None or key >> 3 == only:
            yield key >> 3, first, at


def _varint(record: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = record[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ExampleError(f"not a tf.train.Example: broken number at byte {at}")
