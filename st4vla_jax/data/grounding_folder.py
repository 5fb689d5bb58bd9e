"""Grounding records in array_record shards, as data.convert writes them, as a source.

Images lie in the records: one read a sample, where JSONL takes one a line and one an image.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from st4vla_jax.data.convert_grounding import IMAGES, RECORD
from st4vla_jax.data.episode_scan import image_size
from st4vla_jax.data.grounding import GroundingSource, IndexBuilder
from st4vla_jax.data.holdout import check_part
from st4vla_jax.data.index_folder import build_once, cache_root, digest
from st4vla_jax.data.llava import parse_record
from st4vla_jax.data.shards import ShardReader, ShardState, first_line, open_array_record
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.source_files import SourceError, file_stamps
from st4vla_jax.data.tfrecord import ExampleError, ShardError, bytes_spans, feature_spans

MANIFEST = "conversion.json"  # of data.conversion
_WHOLE = (0, 2**40)  # byte range of a record
_FORMAT = 1  # of the index; another one makes a new index


class GroundingFolder(GroundingSource):
    """A folder of grounding records that data.convert made; see `GroundingSource`."""

    _arrays = ("file", "line", "kind", "content", "size_start", "sizes")

    def __init__(
        self,
        folder: Path | str,
        *,
        name: str,
        holdout: float = 0.0,
        part: str = "train",
        max_bad_records: int = 0,
        index_dir: Path | str | None = None,
    ) -> None:
        """Indexes the folder, or finds its index; every record is read and checked once.

        Args:
          folder: with conversion.json and its shards.
          name: of the data set.
          holdout: as in `GroundingSource`, by a hash of the images themselves.
          part: likewise.
          max_bad_records: likewise.
          index_dir: likewise.

        Raises:
          SourceError: no such folder, missing shards or records (all by name), or too many bad
            records.
        """
        folder = Path(folder)
        check_part(holdout, part, name)
        counts = _shards(folder)
        paths = [folder / shard for shard in counts]
        stamps = file_stamps(paths)
        key = digest(_FORMAT, stamps, max_bad_records)
        self.name, self._choice = name, (holdout, part)
        self._folder = cache_root(folder, index_dir) / f"grounding-{key[:16]}"

        def build(work: Path) -> dict[str, Any]:
            return _Builder(folder, counts).build(work, stamps, max_bad_records)

        build_once(self._folder, build)
        self._open()

    def _open_files(self, meta: dict[str, Any]) -> None:
        states = [ShardState(Path(n).name, "array_record", *rest) for n, *rest in meta["stamps"]]
        self._reader = ShardReader(self._root, states)

    def record_name(self, index: int) -> str:
        """Shard and number of a record."""
        row = self._row(index)
        return f"{self._names[self._index['file'][row]]} record {self._index['line'][row]}"

    def _read(self, index: int) -> tuple[dict[str, Any], list[bytes]]:
        row = self._row(index)
        shard, number = int(self._index["file"][row]), int(self._index["line"][row])
        found = self._reader.read(shard, number, 0, [_WHOLE], lambda parts: bool(parts[0]))
        if found is None:
            raise BadRecordError(f"{self.record_name(index)}: its checksum does not match")
        return _parsed(found[0])


class _Builder(IndexBuilder):
    """Writes the index of a folder; ``counts``: records of each shard."""

    def __init__(self, folder: Path, counts: dict[str, int]) -> None:
        super().__init__(folder, "none")
        self._counts = counts

    def add_file(self, number: int, path: Path, name: str) -> str:
        """Adds a shard's records; returns the sha256 of its content."""
        content, reader = hashlib.sha256(), open_array_record(path)
        if reader.num_records() != self._counts[path.name]:
            raise ShardError(
                f"{path}: {reader.num_records()} records, {MANIFEST} says "
                f"{self._counts[path.name]}; convert again"
            )
        for record_number in range(reader.num_records()):
            where = f"{name} record {record_number}"
            try:
                (data,) = reader.read([record_number])
                content.update(data)
                record, images = _parsed(data)
                sizes = [image_size(image) for image in images]
                if (0, 0) in sizes:
                    raise BadRecordError(f"image {sizes.index((0, 0))} does not decode")
                hashes = [hashlib.sha256(image).hexdigest() for image in images]
                self.add((number, record_number, 0, 0), record, hashes, sizes, where)
            # array_record raises the first three on bytes that fail their checksum.
            except (RuntimeError, IndexError, ValueError) as e:
                self.bad.append(f"{where}: {first_line(e)}")
        return content.hexdigest()


def _parsed(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The record and its encoded images; raises BadRecordError if it is no such record."""
    try:
        spans = feature_spans(data)
        found = {n: [data[a:b] for a, b in bytes_spans(data, s)] for n, s in spans.items()}
        (text,) = found[RECORD]
    except (ExampleError, KeyError, ValueError) as e:
        raise BadRecordError(f"not a grounding record ({e!r})") from e
    return parse_record(text), found.get(IMAGES, [])


def _shards(folder: Path) -> dict[str, int]:
    """{name: records} of the shards that the manifest lists."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != "grounding":
            raise SourceError(f"{folder}: holds {manifest['format']} episodes, no grounding set")
        shards = (s for split in manifest["splits"].values() for s in split["shards"])
        return {shard["name"]: shard["records"] for shard in shards}
    except (FileNotFoundError, NotADirectoryError) as e:
        raise SourceError(
            f"{folder}: no {MANIFEST}; not a folder of data.convert (a .json or .jsonl file can be "
            "given itself)"
        ) from e
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise SourceError(f"{folder / MANIFEST}: not a manifest of data.convert ({e!r})") from e
