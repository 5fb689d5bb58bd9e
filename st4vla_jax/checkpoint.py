"""Checkpoints on disk: written whole, read in parts (those of a run: train_checkpoints.py).

::

  DIR/params/                       Orbax (StandardCheckpointer reads it), an array a parameter
  DIR/meta/meta.json                `Meta`: model config, prompt, images, actions, origin
  DIR/meta/dataset_statistics.json  normalisation statistics by embodiment
  DIR/meta/tokenizer/               tokenizer.json and its companions
  DIR/meta/hf_config.json           the VLM's Hugging Face config, if it came from there
  DIR/meta/passthrough.safetensors  tensors that only a conversion back to torch needs

Parameters are addressed by path, "vlm/visual/patch_embed/proj/kernel".  A checkpoint appears under
its name only when it is complete.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1 as ocp_v1

from st4vla_jax.config import ModelConfig, from_dict, to_dict
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec
from st4vla_jax.data.prompts import PromptConfig

FORMAT_VERSION = 1
META = "meta/meta.json"
STATISTICS = "dataset_statistics.json"
PASSTHROUGH = "passthrough.safetensors"
HF_CONFIG = "hf_config.json"
PARAMS = "params"
EMA = "ema"  # moving averages of the trained ones, in a training run's checkpoint
TREE = "_METADATA"  # the file that makes a folder an Orbax tree
# A parameter in the messages of TensorStore: the key of its metadata or of one of its chunks.
_NAMED = re.compile(r'"([^"/]+)/(?:zarr\.json|c/)')
_GROUP_BYTES = 256 << 20  # parameters written in one go: each go costs 60 ms and two files
# Stored in pieces of this size: a 1.6 GB parameter in one piece took twice the memory (6.1 GiB
# against 3.2) and three times as long (measured on 2 cores).
CHUNK_BYTES = 64 << 20
_CONCURRENT_GB = 4  # read at a time, beside what is already in its place


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, too new, or in the way."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself, besides files.

    Attributes:
      model: sizes.
      prompt: template of the user's turn, system text, lower-casing.
      image: size and pixel bounds of the views.
      action: names, units and normalisation of the action dimensions; None for a VLM alone.
      source: file -> sha256 of what it was converted from.
      notes: free text by name, e.g. which parts are fresh.
      stored_head: the Hugging Face source stored a tied output head a second time.
      step: training step, or None.
      git_revision: of this package when written, or None.
    """

    model: ModelConfig
    prompt: PromptConfig
    image: ImageConfig
    action: ActionSpec | None = None
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stored_head: bool = False
    step: int | None = None
    git_revision: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able dict with the format version."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("prompt", "image", "action"):
            part = values[name]
            values[name] = None if part is None else dataclasses.asdict(part)
        for name in ("source", "notes"):
            values[name] = dict(values[name])
        return {"format_version": FORMAT_VERSION} | values | {"model": to_dict(self.model)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Meta:
        """Inverse of `to_json`; unknown and missing keys raise CheckpointError, all listed."""
        values = dict(values)
        values.pop("format_version")
        parts = {"prompt": PromptConfig, "image": ImageConfig, "action": ActionSpec}
        problems = _key_problems(cls, values, "")
        for name, kind in parts.items():
            if isinstance(values.get(name), dict):
                problems += _key_problems(kind, values[name], f"{name}.")
        if problems:
            raise CheckpointError("\n  ".join(["does not fit this version:", *problems]))
        for name, kind in parts.items():
            if values[name] is not None:
                values[name] = kind(**{k: _tuples(v) for k, v in values[name].items()})
        return cls(**values | {"model": from_dict(values["model"])})


def _key_problems(kind: type, values: Mapping[str, Any], prefix: str) -> list[str]:
    names = {f.name for f in dataclasses.fields(kind)}
    unknown = [f"unknown key {prefix}{key}" for key in values if key not in names]
    return unknown + [f"missing key {prefix}{key}" for key in names if key not in values]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def git_revision() -> str | None:
    """Commit of this package's checkout, or None outside of one.

    An installed package may lie inside another project's repository, whose commit says nothing.
    """
    root = Path(__file__).resolve().parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = done.stdout.splitlines()
    return commit if Path(top).resolve() == root else None


# --- Writing ------------------------------------------------------------------------------------


def check_target(out: Path | str, marker: str, overwrite: bool = False) -> None:
    """Raises CheckpointError if `new_folder` could not write to ``out``; for a check up front."""
    out = Path(out).absolute()
    above = next(folder for folder in out.parents if folder.exists())
    if not above.is_dir():
        raise CheckpointError(f"{out}: {above} is a file, not a folder")
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if taken and not overwrite:
        raise CheckpointError(f"{out}: already there; give --overwrite to replace it")
    if taken and not (out / marker).exists():
        raise CheckpointError(f"{out}: holds no {marker}, so --overwrite does not replace it")


@contextlib.contextmanager
def new_folder(out: Path | str, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its name if the block succeeds, else vanishes.

    Args:
      out: folder to make; it may be there if empty.  Of a symbolic link the target is made, and
        the link stays.
      marker: file (relative) that tells a folder of the kind that may be overwritten.
      overwrite: replace such a folder.

    Raises:
      CheckpointError: ``out`` is there already, or is something else than what may be replaced.
    """
    check_target(out, marker, overwrite)
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        work.mkdir()
        yield work
        if out.exists():
            out.rename(old)
        work.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(
    out: Path | str,
    leaves: Iterable[tuple[str, np.ndarray]],
    meta: Meta,
    files: Mapping[str, bytes | Path],
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint, holding one parameter in memory at a time.

    Args:
      out: folder to make.
      leaves: (path, array) of every parameter.
      meta: what goes to meta.json.
      files: name below DIR/meta -> contents, or a file to copy.
      overwrite: replace a checkpoint that is there.

    Raises:
      CheckpointError: ``out`` is taken.
    """
    with new_folder(out, META, overwrite) as work:
        _write_leaves(work / PARAMS, leaves)
        for name, content in files.items():
            target = work / "meta" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
        (work / "meta").mkdir(exist_ok=True)
        (work / META).write_text(json.dumps(meta.to_json(), indent=2) + "\n", encoding="utf-8")


def _write_leaves(folder: Path, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes an Orbax tree, large parameters one at a time and small ones in groups.

    The partial API of Orbax v1 does it; what it makes is one item "state" in a folder, which is
    moved up, so that ``folder`` itself is the tree.  It runs in a thread that is waited for, also
    when Ctrl-C ends the wait: threads of Orbax would else write into a folder that was removed.
    """
    session = folder.with_name(f"{folder.name}.session")
    context = ocp_v1.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    group: dict[str, np.ndarray] = {}
    size = 0
    with context, concurrent.futures.ThreadPoolExecutor(1) as pool:

        def save(tree: dict[str, Any]) -> None:
            run = contextvars.copy_context().run  # the thread sees ``context`` too
            pool.submit(run, ocp_v1.partial.save, session, tree).result()

        for path, array in leaves:
            group[path] = array
            size += array.nbytes
            del array  # the group alone holds it: it is free before the next one is made
            if size >= _GROUP_BYTES:
                save(nested(group.items()))
                group, size = {}, 0
        if group:
            save(nested(group.items()))
        ocp_v1.partial.finalize(session)
    (item,) = [child for child in session.iterdir() if (child / TREE).is_file()]
    item.rename(folder)
    shutil.rmtree(session)


def nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{"a/b/c": x} as nested dicts, from pairs of path and value."""
    tree: dict[str, Any] = {}
    for path, value in leaves:
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


# --- Reading ------------------------------------------------------------------------------------


def read_meta(directory: Path | str) -> Meta:
    """Reads meta.json.

    Raises:
      CheckpointError: no checkpoint there, an incomplete one, or one of a newer format.
    """
    directory = Path(directory)
    missing = [n for n in (META, f"{PARAMS}/{TREE}") if not (directory / n).is_file()]
    if missing:
        raise CheckpointError(f"{directory}: no complete checkpoint, lacks {', '.join(missing)}")
    try:
        values = json.loads((directory / META).read_text(encoding="utf-8"))
        version = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / META}: not readable ({error})") from None
    if not isinstance(version, int):
        raise CheckpointError(f"{directory / META}: format_version {version!r} is no number")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{directory}: format_version {version} is newer than this package's "
            f"{FORMAT_VERSION}; update st4vla_jax"
        )
    try:
        return Meta.from_json(values)
    except (ValueError, TypeError) as error:  # of the parts' own checks, or a wrong kind of value
        raise CheckpointError(f"{directory / META}: {error}") from None


def param_shapes(directory: Path | str, item: str = PARAMS) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the parameters, or of their moving average, without reading."""
    return tree_shapes(_tree_folder(directory, item))


def tree_shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the arrays of an Orbax tree."""
    with _reading(folder, TREE):
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {
        "/".join(key.key for key in keys): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for keys, leaf in flat
    }


def read_leaf(directory: Path | str, path: str, item: str = PARAMS) -> np.ndarray:
    """Reads one parameter; raises CheckpointError if it is absent or damaged."""
    args = nested([(path, ocp.RestoreArgs(np.ndarray))])
    value = restore_tree(_tree_folder(directory, item), args, path)
    for name in path.split("/"):
        value = value[name]
    if not isinstance(value, np.ndarray):  # Orbax gives back the placeholder of an absent one
        raise CheckpointError(f"{directory}: has no parameter named {path}")
    return value


def iter_params(directory: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array), one parameter in memory at a time."""
    for path in param_shapes(directory):
        yield path, read_leaf(directory, path)


def read_params(
    directory: Path | str,
    shardings: Any = None,
    dtype: Any = None,
    subtrees: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Reads the parameters, each device only what it holds.

    Args:
      directory: a checkpoint.
      shardings: tree of `jax.sharding.Sharding` like the parameters (or like the subtrees asked
        for), or one for all; None gives numpy arrays.
      dtype: cast while reading; None keeps the stored dtypes.
      subtrees: top-level names to read, e.g. ("vlm",); None reads all.

    Raises:
      CheckpointError: no parameters there, or a subtree is absent (all named).
    """
    paths = param_shapes(directory)
    tops = {path.split("/")[0] for path in paths}
    absent = [name for name in subtrees or () if name not in tops]
    if absent:
        raise CheckpointError(f"{directory}: has no parameters named {', '.join(absent)}")
    wanted = tops if subtrees is None else set(subtrees)
    tree = nested(
        (p, ocp.RestoreArgs(np.ndarray, dtype)) for p in paths if p.split("/")[0] in wanted
    )
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _, one=shardings: one, tree)
    if shardings is not None:
        tree = jax.tree.map(
            lambda _, sharding: ocp.ArrayRestoreArgs(jax.Array, dtype, sharding=sharding),
            tree,
            shardings,
        )
    return restore_tree(_tree_folder(directory, PARAMS), tree, ", ".join(sorted(wanted)))


def restore_tree(folder: Path, restore_args: dict[str, Any], what: str) -> dict[str, Any]:
    """Reads the leaves of an Orbax tree that ``restore_args`` names, ``what`` for messages."""
    item = jax.tree.map(lambda _: 0, restore_args)
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_CONCURRENT_GB)
    with _reading(folder, what):
        return handler.restore(folder, args=args)


@contextlib.contextmanager
def _reading(folder: Path, what: str) -> Iterator[None]:
    """Makes a CheckpointError of whatever a damaged Orbax tree raises.

    Args:
      folder: the tree.
      what: is read; a parameter that the error names is named instead.
    """
    try:
        yield
    except Exception as error:  # json, zarr and TensorStore raise many kinds
        named = _NAMED.search(str(error))
        what = named[1].replace(".", "/") if named else what
        reason = str(error).partition(" [tensorstore_spec")[0].partition("\n")[0]
        raise CheckpointError(
            f"{folder}: cannot read {what}, the checkpoint may be damaged "
            f"({type(error).__name__}: {reason})"
        ) from error


def _tree_folder(directory: Path | str, item: str) -> Path:
    folder = Path(directory).absolute() / item
    if not (folder / TREE).is_file():
        raise CheckpointError(f"{directory}: no complete checkpoint, lacks {item}/{TREE}")
    return folder
