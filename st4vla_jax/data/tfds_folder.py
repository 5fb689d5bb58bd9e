"""What a tfds-format folder holds, from features.json, dataset_info.json and its shards' names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from st4vla_jax.data.robot_spec import nearest
from st4vla_jax.data.tfrecord import ShardError

ALL_SPLITS = "all"

_SHARD = re.compile(
    r"(?P<name>.+)-(?P<split>[^-]+)\.(?P<format>tfrecord|array_record)"
    r"-(?P<number>\d{5,})-of-(?P<count>\d{5,})"
)
_STEPS = "steps/"


class FolderError(ValueError):
    """A folder that is not the data set it should be; lists every problem by file or key."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One feature of a step, as features.json declares it.

    Attributes:
      kind: image, text, tensor or other (which cannot be read).
      shape: of one step; -1 = not fixed.
      dtype: NumPy's name.
      encoding: of a tensor: none (a list of numbers), bytes or zlib (packed, one value a step).
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = "object"
    encoding: str = "none"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a split; ``records`` as dataset_info.json says, None where it does not."""

    path: Path
    format: str
    records: int | None


@dataclasses.dataclass(frozen=True)
class TfdsFolder:
    """A data set version on disk; ``columns`` by "/"-joined path below a step."""

    root: Path
    columns: Mapping[str, Column]
    splits: Mapping[str, tuple[Shard, ...]]

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, or of every split by ALL_SPLITS.

        Raises:
          FolderError: there is no such split.
        """
        if split == ALL_SPLITS:
            return tuple(shard for name in sorted(self.splits) for shard in self.splits[name])
        if split not in self.splits:
            known = (*self.splits, ALL_SPLITS)
            raise FolderError(f"{self.root}: no split {split!r}{nearest(split, known)}")
        return self.splits[split]


def shard_split(name: str) -> str:
    """The split that a shard's file name tells."""
    return _SHARD.fullmatch(Path(name).name)["split"]


def read_folder(root: Path | str) -> TfdsFolder:
    """Reads a folder of one version, or of one data set with one version below it.

    Raises:
      FolderError: no tfds-format episodes there, several versions, or shards missing (all named).
    """
    root = _version_folder(Path(root).absolute())
    problems: list[str] = []
    lengths = _shard_lengths(root, problems)
    splits = _splits(root, lengths, problems)
    columns = dict(_columns(_json(root / "features.json"), ""))
    steps = {
        path.removeprefix(_STEPS): column
        for path, column in columns.items()
        if path.startswith(_STEPS)
    }
    if not steps:
        problems.append(
            "features.json declares no 'steps': not an episodic (RLDS) data set; its features are "
            + ", ".join(sorted(columns)[:20])
        )
    if problems:
        raise FolderError(f"{root}:\n  " + "\n  ".join(problems))
    return TfdsFolder(root, steps, splits)


def _version_folder(root: Path) -> Path:
    if (root / "features.json").is_file():
        return root
    versions = sorted(path.parent for path in root.glob("*/features.json"))
    if len(versions) == 1:
        return versions[0]
    if versions:
        names = ", ".join(path.name for path in versions)
        raise FolderError(f"{root}: several versions; name one of them: {names}")
    raise FolderError(f"{root}: no features.json there or one folder below: not a tfds data set")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FolderError(f"{path}: not JSON ({error})") from None


def _shard_lengths(root: Path, problems: list[str]) -> dict[str, list[int]]:
    """Records of each shard by split; empty without a dataset_info.json."""
    path = root / "dataset_info.json"
    if not path.is_file():
        return {}
    try:
        return {
            split["name"]: [int(n) for n in split.get("shardLengths", ())]
            for split in _json(path).get("splits", ())
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problems.append(f"dataset_info.json: cannot be understood ({error!r})")
        return {}


def _splits(
    root: Path, lengths: Mapping[str, list[int]], problems: list[str]
) -> dict[str, tuple[Shard, ...]]:
    """Shards by split in order; missing ones become problems."""
    found: dict[str, dict[int, re.Match[str]]] = {}
    counts: dict[str, set[int]] = {}
    for path in sorted(root.iterdir()):
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match["split"], {})[int(match["number"])] = match
            counts.setdefault(match["split"], set()).add(int(match["count"]))
    problems += [
        f"split {split!r} is in dataset_info.json, yet none of its {len(n)} shards is there"
        for split, n in lengths.items()
        if n and split not in found
    ]
    if not found:
        problems.append("no shards named NAME-SPLIT.tfrecord-00000-of-00001 or .array_record-...")
    splits = {}
    for split, matches in found.items():
        if len(counts[split]) > 1 or len({(m["name"], m["format"]) for m in matches.values()}) > 1:
            names = [m.string for m in matches.values()]
            problems.append(
                f"split {split!r} mixes shards of several sets: {names[0]}, {names[-1]}"
            )
            continue
        (count,) = counts[split]
        one = next(iter(matches.values()))
        stem = f"{one['name']}-{split}.{one['format']}"
        problems += [
            f"missing shard {stem}-{i:05d}-of-{count:05d}" for i in range(count) if i not in matches
        ]
        records = lengths.get(split) or [None] * count
        if len(records) != count:
            problems.append(
                f"split {split!r}: dataset_info.json knows {len(records)} shards, the files' names "
                f"say {count}"
            )
            continue
        splits[split] = tuple(
            Shard(root / matches[i].string, one["format"], records[i]) for i in sorted(matches)
        )
    return splits


def _columns(feature: Mapping[str, Any], path: str) -> Iterator[tuple[str, Column]]:
    """Yields (path, column) of the leaves below a feature of features.json."""
    if "featuresDict" in feature:
        for name, child in feature["featuresDict"].get("features", {}).items():
            yield from _columns(child, f"{path}/{name}" if path else name)
    elif "sequence" in feature and path == _STEPS.rstrip("/"):
        yield from _columns(feature["sequence"]["feature"], path)
    elif "image" in feature:
        yield path, Column("image", _shape(feature["image"]), "uint8")
    elif "text" in feature:
        yield path, Column("text")
    elif "tensor" in feature:
        tensor = feature["tensor"]
        dtype = tensor.get("dtype", "float32")
        kind = "text" if dtype in ("string", "object") else "tensor"
        if kind == "text" and _shape(tensor):
            kind = "other"
        yield path, Column(kind, _shape(tensor), dtype, tensor.get("encoding", "none"))
    else:
        yield path, Column("other")


def _shape(feature: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in feature.get("shape", {}).get("dimensions", ()))


def record_count_problem(shard: Shard, records: int) -> ShardError | None:
    """An error if a shard holds another number of records than dataset_info.json says."""
    if shard.records is None or shard.records == records:
        return None
    return ShardError(
        f"{shard.path}: {records} records, dataset_info.json says {shard.records}; fetch the file "
        "again (it may be truncated between two records)"
    )
