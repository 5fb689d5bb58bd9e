"""HDF5 demonstrations (LIBERO and robomimic layouts) to RLDS episodes.

Both keep ``data/demo_N`` with ``actions``, ``obs/NAME``, ``rewards``, ``dones`` and ``states``.
LIBERO's cameras and states get the names that its published RLDS sets (openvla) have, so that the
registered specs ``libero_*`` read them; its images, stored upside down, are turned by 180 degrees,
as there.  Importing this module needs the ``hdf5`` extra.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from st4vla_jax.data.conversion import Conversion, ConversionError, PlannedShard
from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.tfds_write import EpisodeError, check_columns, encode_episode, episode_features
from st4vla_jax.data.writer import FLAGS, LANGUAGE, demonstration_flags

SUFFIXES = (".hdf5", ".h5")

_DEMO = re.compile(r"demo_?(\d+)")
_METADATA = {"file": Column("text"), "demo": Column("text")}
_FLAGS = {"reward": "rewards", "is_terminal": "dones"}
_NAMES = {"actions": "action"}
# openvla's LIBERO: step column -> the datasets that it is joined from.
_LIBERO = {
    "observation/image": ("obs/agentview_rgb",),
    "observation/wrist_image": ("obs/eye_in_hand_rgb",),
    "observation/state": ("obs/ee_states", "obs/gripper_states"),
    "observation/joint_state": ("obs/joint_states",),
}
_PARTS_OF_STATE = ("obs/ee_pos", "obs/ee_ori")  # of obs/ee_states

Sources = Mapping[str, tuple[str, ...]]


def hdf5_conversion(
    path: Path,
    *,
    instruction: str | None = None,
    rotate180: bool | None = None,
    float32: bool = False,
    shard_records: int = 32,
) -> Conversion:
    """Plans the conversion of one HDF5 file, or of a folder of them.

    Args:
      path: the file, or a folder with .hdf5 or .h5 files, all of one layout.
      instruction: of every episode, where the files do not tell it.
      rotate180: turn images; default: for LIBERO's layout only.
      float32: store f64 columns as f32, as published sets are; else they keep every bit.
      shard_records: episodes of a shard.

    Raises:
      ConversionError: no such files, another layout, or no instruction; lists all.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if not files:
        raise ConversionError(f"{path}: no {' or '.join(SUFFIXES)} files")
    demos = [demo for file in files for demo in _demos(file, instruction)]
    with _open(files[0]) as file:
        first = file["data"][demos[0][1]]
        libero = {name for names in _LIBERO.values() for name in names} <= set(_datasets(first))
        sources = _sources(first, libero)
        if rotate180 is None:
            rotate180 = libero
        columns = _columns(first, sources, float32)
        used = {name for names in sources.values() for name in names} | set(_FLAGS.values())
        left_out = sorted(set(_datasets(first)) - used)
    reader = functools.partial(_read, columns=columns, sources=sources, rotate180=rotate180)
    groups = [demos[i : i + shard_records] for i in range(0, len(demos), shard_records)]
    return Conversion(
        source=path,
        sources=tuple(files),
        format="hdf5",
        name=path.stem,
        version="1.0.0",
        features=episode_features(columns, _METADATA),
        shards=tuple(
            PlannedShard("train", i, len(group), functools.partial(reader, group))
            for i, group in enumerate(groups)
        ),
        settings={
            "layout": "libero" if libero else "robomimic",
            "columns": {name: list(parts) for name, parts in sources.items()},
            "instruction": instruction,
            "rotate180": rotate180,
            "float32": float32,
        },
        left_out=tuple(left_out),
    )


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ConversionError(f"{path}: not a readable HDF5 file ({error})") from error


def _demos(path: Path, instruction: str | None) -> list[tuple[Path, str, str]]:
    """(file, demo, instruction) in the order of their numbers."""
    with _open(path) as file:
        if "data" not in file or not len(file["data"]):
            raise ConversionError(f"{path}: no demonstrations below data/")
        names = list(file["data"])
        if other := [name for name in names if not _DEMO.fullmatch(name)]:
            raise ConversionError(f"{path}: data/{other[0]} is not named demo_N")
        names.sort(key=lambda name: int(_DEMO.fullmatch(name)[1]))
        texts = {name: instruction or _instruction(file["data"], name) for name in names}
    if silent := [name for name, text in texts.items() if not text]:
        raise ConversionError(
            f"{path}: no instruction for {len(silent)} demonstrations, first {silent[0]}; give "
            "--instruction"
        )
    return [(path, name, text) for name, text in texts.items()]


def _instruction(data: h5py.Group, demo: str) -> str:
    """Robocasa writes it to each demonstration, LIBERO to the file; robomimic has none."""
    try:
        if "ep_meta" in data[demo].attrs:
            return str(json.loads(data[demo].attrs["ep_meta"]).get("lang", "")).strip()
        text = json.loads(data.attrs.get("problem_info", "{}")).get("language_instruction", "")
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{data.file.filename}: attributes are no JSON ({error})") from error
    return "".join(text).strip().strip('"')


def _datasets(group: h5py.Group) -> list[str]:
    """Paths of all datasets below a group."""
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if _is_dataset(item) else None)
    return found


def _is_dataset(item: Any) -> bool:
    return isinstance(item, h5py.Dataset)


def _sources(demo: h5py.Group, libero: bool) -> Sources:
    """Step column -> the datasets that it is joined from."""
    sources: dict[str, tuple[str, ...]] = dict(_LIBERO) if libero else {}
    used = {name for names in sources.values() for name in names}
    if libero:
        used |= set(_PARTS_OF_STATE)
    for name in _datasets(demo):
        # next_obs is obs, one step on.
        if name in used or name in _FLAGS.values() or name.startswith("next_obs/"):
            continue
        if _kind(demo[name]) is not None:
            path = "observation/" + name[4:] if name.startswith("obs/") else name
            sources[_NAMES.get(path, path)] = (name,)
    if "action" not in sources:
        raise ConversionError(f"{demo.file.filename}: {demo.name} holds no actions")
    return sources


def _kind(dataset: h5py.Dataset) -> str | None:
    """image, tensor, or None for what is not converted (depth, masks, texts)."""
    if dataset.dtype == np.uint8 and dataset.ndim == 4 and dataset.shape[-1] == 3:
        return "image"
    return "tensor" if dataset.dtype.kind in "fiub" and dataset.ndim in (1, 2) else None


def _columns(demo: h5py.Group, sources: Sources, float32: bool) -> dict[str, Column]:
    columns = {LANGUAGE: Column("text"), **FLAGS}
    for path, names in sources.items():
        dataset = demo[names[0]]
        if path in columns:
            raise ConversionError(f"{demo.file.filename}: {names[0]} has the name of a flag")
        if _kind(dataset) == "image":
            columns[path] = Column("image", tuple(dataset.shape[1:]), "uint8", "jpeg")
            continue
        shape = dataset.shape[1:]
        if len(names) > 1:
            shape = (sum(demo[name].shape[1] for name in names),)
        dtype = np.result_type(*(demo[name].dtype for name in names)).name
        if dtype == "float64" and float32:
            dtype = "float32"
        encoding = "bytes" if dtype in ("float64", "uint64") else "none"
        columns[path] = Column("tensor", tuple(shape), dtype, encoding)
    check_columns(columns)
    return columns


def _read(
    demos: Sequence[tuple[Path, str, str]],
    columns: Mapping[str, Column],
    sources: Sources,
    rotate180: bool,
) -> Iterator[tuple[bytes, int]]:
    """Yields each demonstration as a record, and its steps."""
    for path, name, text in demos:
        with _open(path) as file:
            demo = file["data"][name]
            try:
                steps = _steps(demo, columns, sources, rotate180)
                metadata = {"file": path.name, "demo": name}
                record = encode_episode(columns, {**steps, LANGUAGE: text}, _METADATA, metadata)
            except (EpisodeError, KeyError, OSError) as error:  # h5py: KeyError, damaged: OSError
                raise ConversionError(f"{path} {name}: {error}") from error
            yield record, len(steps["action"])


def _steps(
    demo: h5py.Group, columns: Mapping[str, Column], sources: Sources, rotate180: bool
) -> dict[str, Any]:
    steps: dict[str, Any] = dict(demonstration_flags(len(demo["actions"])))
    for flag, name in _FLAGS.items():
        if name in demo:
            steps[flag] = demo[name][()].reshape(-1).astype(FLAGS[flag].dtype)
    for path, names in sources.items():
        parts = [demo[name][()] for name in names]
        steps[path] = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        if rotate180 and columns[path].kind == "image":
            steps[path] = steps[path][:, ::-1, ::-1]
    return steps
