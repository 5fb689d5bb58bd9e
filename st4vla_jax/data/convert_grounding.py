"""Grounding records (LLaVA JSON and JSONL) to array_record, or to JSONL with its images, and back.

A converted record is ``{"images": [encoded, ...], "record": JSON}`` with regions in original
pixels.  RefCOCO, RoboRefIt, Where2Place and A0 are brought to JSONL by data/importers.py first.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from st4vla_jax.data.conversion import MANIFEST, Conversion, ConversionError, PlannedShard
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.image import ImageError, decode_image
from st4vla_jax.data.llava import image_paths, record_turns
from st4vla_jax.data.shards import open_array_record
from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.tfds_write import encode_image, encode_record, record_features
from st4vla_jax.data.tfrecord import bytes_spans, feature_spans
from st4vla_jax.data.writer import GroundingWriter, conversations

IMAGES, RECORD = "images", "record"

_PNG = Column("image", (-1, -1, 3), "uint8", "png")


def grounding_conversion(
    path: Path,
    *,
    image_root: Path | None = None,
    coordinates: str = "none",
    shard_records: int = 4096,
) -> Conversion:
    """Plans the conversion of a JSON or JSONL file to array_record.

    Args:
      path: the file.
      image_root: folder that image paths are relative to; default: the file's.
      coordinates: frame that numbers in texts are in, see `llava.frame_size`.
      shard_records: records of a shard.

    Raises:
      SourceError: missing images, or records that cannot be used; all by name.
    """
    source = GroundingSource(path, name=path.stem, images=image_root, coordinates=coordinates)
    root = image_root or path.parent
    starts = range(0, len(source), shard_records)
    return Conversion(
        source=path,
        sources=(path,),
        format="grounding",
        name=path.stem,
        version="1.0.0",
        features=record_features(IMAGES, [RECORD]),
        shards=tuple(
            PlannedShard(
                "train",
                number,
                min(shard_records, len(source) - start),
                functools.partial(
                    _read, source, root, range(start, min(start + shard_records, len(source)))
                ),
            )
            for number, start in enumerate(starts)
        ),
        settings={"image_root": str(root.absolute()), "coordinates": coordinates},
    )


def write_jsonl(
    path: Path, out: Path, *, image_root: Path | None = None, coordinates: str = "none"
) -> int:
    """Writes JSONL and its images by `GroundingWriter`; returns the number of records.

    Args:
      path: a JSON or JSONL file, or a folder that `grounding_conversion` made.
      out: folder to make.
      image_root: see `grounding_conversion`; not for a folder.
      coordinates: likewise.

    Raises:
      ConversionError: the folder is no such conversion, or other than its manifest says.
    """
    with GroundingWriter(out) as writer:
        if path.is_dir():
            for encoded, record in _converted(path):
                sizes = [decode_image(image).shape[:2] for image in encoded]
                turns = record_turns(record, sizes)
                writer.add(encoded, turns, **_without(record, "conversations"))
        else:
            source = GroundingSource(
                path, name=path.stem, images=image_root, coordinates=coordinates
            )
            for index in range(len(source)):
                record, encoded = _record(source, image_root or path.parent, index)
                writer.add(encoded, source.turns(index), **_without(record, "conversations"))
    return writer.records


def _converted(folder: Path) -> Iterator[tuple[list[bytes], dict[str, Any]]]:
    """Yields the images and the record of each entry of a converted folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{folder}: no {MANIFEST}; not a folder of this converter") from None
    if manifest["format"] != "grounding":
        raise ConversionError(f"{folder}: holds {manifest['format']} episodes, no grounding set")
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            reader = open_array_record(folder / shard["name"])
            if reader.num_records() != shard["records"]:
                raise ConversionError(f"{folder / shard['name']}: records are missing")
            for number in range(shard["records"]):
                (data,) = reader.read([number])
                spans = feature_spans(data)
                found = {n: [data[a:b] for a, b in bytes_spans(data, s)] for n, s in spans.items()}
                yield found[IMAGES], json.loads(found[RECORD][0])


def _without(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}


def _read(source: GroundingSource, root: Path, rows: range) -> Iterator[tuple[bytes, int]]:
    """Yields each record, one step each."""
    for index in rows:
        record, encoded = _record(source, root, index)
        text = json.dumps(record, ensure_ascii=False).encode()
        yield encode_record({IMAGES: encoded, RECORD: [text]}), 1


def _record(source: GroundingSource, root: Path, index: int) -> tuple[dict[str, Any], list[bytes]]:
    """The record without paths of images, its regions in original pixels; the images."""
    stored = source.record(index)
    kept = _without(stored, "image", "images")
    kept["conversations"] = conversations(source.turns(index))
    where = source.record_name(index)
    return kept, [_encoded(root / name, where) for name in image_paths(stored)]


def _encoded(path: Path, where: str) -> bytes:
    """The file's bytes; a PNG of its colours where tfds needs one (palette, alpha, other files)."""
    data = path.read_bytes()
    try:
        pixels = decode_image(data, str(path))
        with Image.open(io.BytesIO(data)) as image:
            plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L")
    except ImageError as error:
        raise ConversionError(f"{where}: {error}") from error
    return data if plain else encode_image(pixels, _PNG)
