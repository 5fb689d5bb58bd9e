"""Grounding and question-answering sets in LLaVA form: random access through a byte-offset index.

Records are read from the file when they are asked for and never kept: a list of dictionaries takes
five times the file's size in memory, in every process (spec data.md section 6).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st4vla_jax.data.answers import has_literal
from st4vla_jax.data.holdout import check_part, open_part, other_part
from st4vla_jax.data.image import ImageError, decode_image
from st4vla_jax.data.index_folder import (
    build_once,
    cache_root,
    digest,
    open_array,
    read_manifest,
    write_array,
)
from st4vla_jax.data.llava import (
    answer_kind,
    check_frame,
    check_turns,
    image_paths,
    parse_record,
    record_turns,
)
from st4vla_jax.data.source import BadRecordError, Lengths, Sample, Turn
from st4vla_jax.data.source_files import (
    SourceError,
    check_problems,
    check_stamps,
    file_stamps,
    kept_lengths,
)

_FORMAT = 2  # of the index; another one makes a new index
_KINDS = ("text", "box", "point", "trajectory")

_LOG = logging.getLogger(__name__)

Size = tuple[int, int]  # height, width in pixels


class GroundingSource:
    """One or more JSON or JSONL files of LLaVA records as a `Source`.

    Attributes:
      name: of the data set.
      bad: one line for each record that the index leaves out.
    """

    _arrays: tuple[str, ...] = ("file", "line", "kind", "content", "size_start", "sizes", "offset",
                                "length")  # fmt: skip

    def __init__(
        self,
        paths: Path | str | Sequence[Path | str],
        *,
        name: str,
        images: Path | str | None = None,
        coordinates: str = "none",
        holdout: float = 0.0,
        part: str = "train",
        max_bad_records: int = 0,
        index_dir: Path | str | None = None,
    ) -> None:
        """Indexes the files, or finds their index.

        Every record is checked, and every image's header read, before anything is trained on.  A
        JSON array is copied once as JSONL beside the index.

        Args:
          paths: the files, in order.
          name: of the data set.
          images: folder that image paths are relative to; default: the first file's folder.
          coordinates: frame that numbers in texts are in, see `llava.frame_size`; they are then
            rendered anew for the resized image.  "none": texts stay as they are.
          holdout: share of the images to hold out with all their records, by a hash of their
            names (of the text, where there is no image); see `data.holdout`.
          part: "train" or "held_out": the records to be.
          max_bad_records: records that may be left out, named in the log.
          index_dir: where the index lies; default: .st4vla_index beside the first file.

        Raises:
          SourceError: missing files or images (all by name), or too many bad records.
        """
        paths = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
        check_frame(coordinates)
        check_part(holdout, part, name)
        stamps = file_stamps(paths)
        root = Path(images) if images is not None else paths[0].parent
        key = digest(_FORMAT, stamps, str(root.absolute()), coordinates, max_bad_records)
        self.name, self._choice = name, (holdout, part)
        self._folder = cache_root(paths[0], index_dir) / f"grounding-{key[:16]}"

        def build(work: Path) -> dict[str, Any]:
            return IndexBuilder(root, coordinates).build(work, stamps, max_bad_records)

        build_once(self._folder, build)
        self._open()

    def _open(self) -> None:
        meta = read_manifest(self._folder)
        if meta is None:
            raise SourceError(f"{self._folder}: the index is gone; start again")
        self.bad: list[str] = meta["bad"]
        self._root, self._coordinates = Path(meta["images"]), meta["coordinates"]
        self._fingerprint = meta["fingerprint"]
        check_stamps(meta["stamps"])
        self._names = [stamp[0] for stamp in meta["stamps"]]
        self._index = {a: open_array(self._folder / f"{a}.npy") for a in self._arrays}
        self._open_files(meta)
        content = self._index["content"]
        self._part = open_part(
            self._folder,
            list(self._choice),
            len(content),
            lambda: other_part(content, *self._choice),
        )

    def _open_files(self, meta: dict[str, Any]) -> None:
        copies = (self._folder / f"{i}.jsonl" for i in range(len(self._names)))
        # Objects of `open` close themselves; reads go by pread, which has no shared position.
        self._files = [
            open(copy if copy.exists() else name, "rb")  # noqa: SIM115
            for copy, name in zip(copies, self._names, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_folder": self._folder, "_choice": self._choice}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._part.rows)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of its samples, of all parts: data set and answer kind."""
        return tuple(f"{self.name}/{_KINDS[i]}" for i in np.unique(self._index["kind"]))

    def _row(self, index: int) -> int:
        """The index row of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} of {self.name}")
        return int(self._part.rows[index])

    def record_name(self, index: int) -> str:
        """File and line of a record."""
        row = self._row(index)
        return f"{self._names[self._index['file'][row]]}:{self._index['line'][row]}"

    def image_sizes(self, index: int) -> list[Size]:
        """(height, width) of each image of a record, from the index."""
        row = self._row(index)
        start, end = self._index["size_start"][row : row + 2]
        return [tuple(size) for size in self._index["sizes"][start:end].tolist()]

    def record(self, index: int) -> dict[str, Any]:
        """The record as stored, keys of other tools included."""
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[dict[str, Any], list[Path] | list[bytes]]:
        """The record, and the files or the bytes of its images."""
        row = self._row(index)
        offset, length = (int(self._index[key][row]) for key in ("offset", "length"))
        line = os.pread(self._files[self._index["file"][row]].fileno(), length, offset)
        try:
            record = parse_record(line)
        except BadRecordError as e:
            raise BadRecordError(f"{self.record_name(index)}: {e}") from e
        return record, [self._root / path for path in image_paths(record)]

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The conversation, regions in original pixels."""
        return record_turns(self.record(index), self.image_sizes(index), self._coordinates)

    def __getitem__(self, index: int) -> Sample:
        (record, encoded), where = self._read(index), self.record_name(index)
        sizes, images = self.image_sizes(index), []
        for number, (source, size) in enumerate(zip(encoded, sizes, strict=True)):
            name = str(source) if isinstance(source, Path) else f"image {number}"
            try:
                images.append(decode_image(source, name))
            except ImageError as e:
                raise BadRecordError(f"{where}: {e}") from e
            if images[-1].shape[:2] != size:
                raise BadRecordError(
                    f"{where}: {name} is {images[-1].shape[:2]} pixels, {size} when it was indexed"
                )
        return Sample(
            tuple(images),
            record_turns(record, sizes, self._coordinates),
            group=f"{self.name}/{_KINDS[self._index['kind'][self._row(index)]]}",
            record=where,
        )

    def lengths(self, encoder: Any) -> Lengths:
        """Lengths under an encoder, kept beside the index."""
        every = range(len(self))
        return kept_lengths(
            self._part.folder,
            encoder,
            lambda: encoder.conversation_lengths(
                map(self.turns, every), map(self.image_sizes, every)
            ),
        )

    def fingerprint(self) -> str:
        """sha256 of the files' content, the images' sizes, the records kept and the settings."""
        return digest(self._fingerprint, self._part.digest)


class IndexBuilder:
    """Writes an index; memory is a few numbers a record."""

    def __init__(self, root: Path, coordinates: str) -> None:
        self.root, self.coordinates = root, coordinates
        self.sizes_of: dict[str, Size | str] = {}  # or what is wrong
        self.missing: list[str] = []
        self.bad: list[str] = []
        self.rows: list[tuple[int, ...]] = []  # file, line, offset, length, kind
        self.contents: list[int] = []
        self.literal: list[str] = []  # records with numbers in their texts
        self.counts, self.sizes = [0], []

    def build(self, work: Path, stamps: list[list[Any]], allowed: int) -> dict[str, Any]:
        hashes = []
        for number, (name, *_) in enumerate(stamps):
            path = Path(name)
            if _is_array(path):
                path = work / f"{number}.jsonl"
                _array_to_jsonl(Path(name), path)
            hashes.append(self.add_file(number, path, name))
        check_problems(", ".join(stamp[0] for stamp in stamps), self.bad, allowed, self.missing)
        if not self.rows:
            raise SourceError(f"{stamps[0][0]}: it holds no records")
        if self.literal:
            _LOG.warning(
                "%d records have bracketed numbers in their texts, first %s: they stay as they "
                "are, so these images are never cropped; if they are coordinates, say in which "
                "frame (coordinates=...), so that they follow the resize and crops",
                len(self.literal), self.literal[0],
            )  # fmt: skip
        columns = np.array(self.rows, np.int64).T
        kinds = (np.int32, np.int32, np.int64, np.int32, np.uint8)
        for key, column, dtype in zip(
            ("file", "line", "offset", "length", "kind"), columns, kinds, strict=True
        ):
            write_array(work / f"{key}.npy", column.astype(dtype))
        write_array(work / "content.npy", np.array(self.contents, np.uint64))
        sizes = np.array(self.sizes, np.int32).reshape(-1, 2)
        write_array(work / "size_start.npy", np.cumsum(self.counts, dtype=np.int64))
        write_array(work / "sizes.npy", sizes)
        kept = digest(_FORMAT, self.coordinates, hashes, columns, sizes)
        return {
            "stamps": stamps,
            "images": str(self.root.absolute()),
            "coordinates": self.coordinates,
            "bad": self.bad,
            "fingerprint": kept,
        }

    def add_file(self, number: int, path: Path, name: str) -> str:
        """Adds a file's records; returns the sha256 of its content."""
        content, offset = hashlib.sha256(), 0
        with open(path, "rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                content.update(line)
                if line.strip():
                    try:
                        record = parse_record(line)
                        paths = image_paths(record)
                        sizes = [self._size(path) for path in paths]
                        if wrong := [size for size in sizes if isinstance(size, str)]:
                            raise BadRecordError("; ".join(wrong))
                        place = number, line_number, offset, len(line)
                        self.add(place, record, paths, sizes, f"{name}:{line_number}")
                    except (BadRecordError, ImageError) as e:
                        self.bad.append(f"{name}:{line_number}: {e}")
                offset += len(line)
        return content.hexdigest()

    def add(
        self,
        place: tuple[int, int, int, int],
        record: dict[str, Any],
        images: Sequence[str],
        sizes: Sequence[Size],
        where: str,
    ) -> None:
        """Checks and adds a record.

        Args:
          place: number of its file, of its line (or record), its offset and length.
          record: as parsed.
          images: what tells its images from others.
          sizes: (height, width) of each.
          where: file and line, for messages.

        Raises:
          BadRecordError, ImageError: it cannot be used.
        """
        turns = record_turns(record, sizes, self.coordinates)
        check_turns(turns, sizes)
        about = digest(list(images) or [turn.text for turn in turns])
        content = hashlib.blake2b(about.encode(), digest_size=8).digest()
        self.rows.append((*place, _KINDS.index(answer_kind(turns))))
        self.contents.append(int.from_bytes(content, "little"))
        self.literal += [where] * (bool(sizes) and has_literal(turns))
        self.counts.append(len(sizes))
        self.sizes += sizes

    def _size(self, name: str) -> Size | str:
        """(height, width) by the image's header alone, or what is wrong with it."""
        if name not in self.sizes_of:
            path = self.root / name
            try:
                with Image.open(path) as image:
                    self.sizes_of[name] = image.size[::-1]
            except (FileNotFoundError, NotADirectoryError):
                self.missing.append(str(path))
                self.sizes_of[name] = f"image {path} is missing"
            # PIL's decoders raise these on broken headers; UnidentifiedImageError is an OSError.
            except (OSError, SyntaxError, ValueError) as e:
                self.sizes_of[name] = f"image {path} does not decode ({e})"
        return self.sizes_of[name]


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array_to_jsonl(path: Path, out: Path) -> None:
    """Writes a JSON array's entries as lines, one entry in memory at a time beside the text."""
    with open(out, "w", encoding="utf-8") as lines:
        for entry in _array_entries(path):
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _array_entries(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
        at = _skip(text, text.index("[") + 1)
        while text[at] != "]":
            entry, at = scan(text, at)
            yield entry
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
            elif text[at] != "]":
                raise ValueError(f"expected , or ] at character {at}")
        if text[at + 1 :].strip():
            raise ValueError(f"text after the array at character {at + 1}")
    except (ValueError, IndexError) as e:
        raise SourceError(f"{path}: not a JSON array ({e})") from e


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
