"""Lazy reading of weight files and streaming writing of safetensors, without torch.

`open_weights` gives {key: LazyTensor} of a safetensors file, of a folder of shards or of a .pt/.pth
file (the only case that needs torch).  Files are memory-mapped: reading a tensor takes no memory
of its own until it is changed.

The safetensors format: 8 bytes little-endian header length, a JSON header
``{key: {dtype, shape, data_offsets}, "__metadata__": {str: str}}``, then the data without holes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.rules import ConversionError

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_MAX_HEADER = 100 << 20  # the reference implementation's own limit


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype whose values are read when asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype, copy=copy)


Tensors = dict[str, LazyTensor]


def lazy(array: np.ndarray) -> LazyTensor:
    """An array that is in memory already."""
    return LazyTensor(array.shape, array.dtype, lambda: array)


def concatenated(parts: list[LazyTensor]) -> LazyTensor:
    """The parts joined along their first axis when read."""
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: np.concatenate([p.read() for p in parts]))


def open_weights(path: Path | str) -> Tensors:
    """Opens a .safetensors, .pt or .pth file, or a folder of safetensors (one file or shards).

    Raises:
      ConversionError: nothing there, a damaged file, a shard missing, a file that is not a plain
        dict of tensors; the message names the file and the keys.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file or folder")
    if path.suffix in TORCH_SUFFIXES:
        from convert_weights.torch_io import open_torch  # alone needs torch

        return open_torch(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise ConversionError(f"{path}: expected .safetensors, .pt, .pth or .bin")


def weight_files(path: Path | str) -> list[Path]:
    """The files that `open_weights` reads."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    if (path / INDEX).is_file():
        return [path / name for name in sorted(set(_weight_map(path / INDEX).values()))]
    return [path / SINGLE]


def sha256(path: Path | str) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Reading ------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> Tensors:
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if (folder / SINGLE).is_file():
        return _open_safetensors(folder / SINGLE)
    raise ConversionError(f"{folder}: holds neither {INDEX} nor {SINGLE}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(n, str) and Path(n).name == n for n in table.values()):
            raise ValueError("a shard's name is not a plain file name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index}: not an index of safetensors shards ({error})") from None
    return table


def _open_shards(folder: Path) -> Tensors:
    weight_map = _weight_map(folder / INDEX)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        lost = {name: sum(shard == name for shard in weight_map.values()) for name in missing}
        text = ", ".join(f"{name} ({count} tensors)" for name, count in lost.items())
        raise ConversionError(f"{folder}: missing shards that {INDEX} names: {text}")
    shards = {name: _open_safetensors(folder / name) for name in names}
    problems = [
        f"{name} lacks {key}" for key, name in weight_map.items() if key not in shards[name]
    ]
    problems += [
        f"{name} holds {key}, which the index does not place there"
        for name, tensors in shards.items()
        for key in tensors
        if weight_map.get(key) != name
    ]
    if problems:
        raise ConversionError(
            f"{folder / INDEX}: does not fit its shards\n  " + "\n  ".join(problems)
        )
    return {key: shards[name][key] for key, name in weight_map.items()}


def _open_safetensors(path: Path) -> Tensors:
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    size = path.stat().st_size - start
    problems, spans = [], []
    for key, entry in header.items():
        try:
            begin, end = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            name = entry["dtype"]
        except (KeyError, TypeError, ValueError):
            problems.append(f"{key}: entry without dtype, shape and two data_offsets")
            continue
        spans.append((begin, end, key))
        if name not in DTYPES:
            problems.append(f"{key}: dtype {name} is not one of {', '.join(DTYPES)}")
        elif min(shape, default=0) < 0 or math.prod(shape) * DTYPES[name].itemsize != end - begin:
            problems.append(f"{key}: {name} {shape} does not fill bytes {begin} to {end}")
    problems += _span_problems(spans, size)
    if problems:
        raise ConversionError(f"{path}: damaged safetensors file\n  " + "\n  ".join(problems))
    # Copy on write: torch wants writable memory, and nothing ever writes.
    data = np.memmap(path, np.uint8, "c", offset=0) if size else np.empty(start, np.uint8)
    return {key: _mapped(data, start, entry) for key, entry in header.items()}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns (header, offset of the data)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ConversionError(
                f"{path}: truncated or not a safetensors file (header of {length} bytes in a file "
                f"of {size})"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: not a safetensors file (the header is not JSON)")
    return header, 8 + length


def _span_problems(spans: list[tuple[int, int, str]], size: int) -> list[str]:
    """Tensors must follow each other without holes or overlap and fill the file."""
    problems, expected = [], 0
    for begin, end, key in sorted(spans):
        if begin != expected:
            kind = (
                "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            )
            problems.append(f"{key}: data_offsets {begin} to {end}: {kind} (expected {expected})")
        expected = max(end, expected)
    if expected > size:
        cut = [key for _, end, key in spans if end > size]
        problems.append(f"truncated: {size} of {expected} data bytes; cut: {', '.join(cut)}")
    elif expected < size:
        problems.append(f"{size - expected} bytes after the last tensor")
    return problems


def _mapped(data: np.ndarray, start: int, entry: Mapping[str, Any]) -> LazyTensor:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    offset = start + entry["data_offsets"][0]
    return LazyTensor(shape, dtype, lambda: np.ndarray(shape, dtype, data, offset))


# --- Writing ------------------------------------------------------------------------------------


class SafetensorsWriter:
    """Writes safetensors files whose tensors arrive in any order, one at a time.

    All shapes are known beforehand: headers are written first, each tensor then goes to its place.

    Args:
      folder: existing folder to write to.
      plan: (key, shape, dtype) of every tensor, in the order in which they fill the shards.
      max_shard: data bytes of a shard at most, unless one tensor alone is larger; None = one file.
      name: file name when everything fits in one file.
    """

    def __init__(
        self,
        folder: Path,
        plan: Iterable[tuple[str, tuple[int, ...], np.dtype]],
        max_shard: int | None = None,
        name: str = SINGLE,
    ):
        shards = _split(list(plan), max_shard)
        stem = name.removesuffix(".safetensors")
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._place: dict[str, tuple[Path, int, tuple[int, ...], np.dtype]] = {}
        for shard, file in zip(shards, names if len(shards) > 1 else [name], strict=True):
            self._place |= _write_header(folder / file, shard)
        self._index = folder / f"{stem}.safetensors.index.json" if len(shards) > 1 else None
        self._left = set(self._place)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def write(self, key: str, array: np.ndarray) -> None:
        """Puts one tensor into its place; shape and dtype must be as planned."""
        path, offset, shape, dtype = self._place[key]
        if (array.shape, array.dtype) != (shape, dtype) or key not in self._left:
            raise ConversionError(
                f"{key}: {array.dtype}{array.shape}, planned {dtype}{shape}, once"
            )
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left.remove(key)

    def close(self) -> None:
        """Checks that every tensor was written and writes the index, if there are shards."""
        if self._left:
            raise ConversionError(f"tensors never written: {', '.join(sorted(self._left))}")
        if self._index:
            total = sum(math.prod(s) * d.itemsize for _, _, s, d in self._place.values())
            table = {key: place[0].name for key, place in self._place.items()}
            text = {"metadata": {"total_size": total}, "weight_map": table}
            self._index.write_text(json.dumps(text, indent=2))


def _split(plan: list, max_shard: int | None) -> list[list]:
    shards, room = [[]], max_shard
    for item in plan:
        size = math.prod(item[1]) * item[2].itemsize
        if max_shard is not None and shards[-1] and size > room:
            shards.append([])
            room = max_shard
        shards[-1].append(item)
        room = None if max_shard is None else room - size
    return shards


def _write_header(path: Path, shard: list) -> dict[str, tuple]:
    """Writes the header, sets the file's size and returns the place of each tensor."""
    # Wide types first, as the reference writer does: every tensor is then aligned for its type.
    order = sorted(shard, key=lambda item: -item[2].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, shape, dtype in order:
        end = begin + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + begin)
    return {
        key: (path, start + header[key]["data_offsets"][0], tuple(shape), dtype)
        for key, shape, dtype in shard
    }


def write_sharded(
    folder: Path,
    plan: Mapping[str, tuple[tuple[int, ...], Any]],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard: int | None = 4 << 30,
    name: str = SINGLE,
) -> None:
    """Writes a stream of tensors to one file or to shards with an index.

    Args:
      folder: existing folder.
      plan: {key: (shape, dtype)} of every tensor, in the order in which they fill the shards.
      tensors: (key, array) in any order.
      max_shard: data bytes of a shard at most, unless one tensor alone is larger; None = one file.
      name: file name when everything fits in one file.
    """
    writer = SafetensorsWriter(
        folder, [(key, shape, np.dtype(dtype)) for key, (shape, dtype) in plan.items()],
        max_shard, name,
    )  # fmt: skip
    for key, array in tensors:
        writer.write(key, array)
    writer.close()


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a few tensors that are in memory to one file."""
    plan = {key: (x.shape, x.dtype) for key, x in tensors.items()}
    write_sharded(path.parent, plan, tensors.items(), None, path.name)


def shapes(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    """{key: shape}."""
    return {key: tensor.shape for key, tensor in tensors.items()}
