"""Trees of a train state as a checkpoint stores them: plain nested dicts, a leaf a path."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from st4vla_jax.checkpoint import CHUNK_BYTES, TREE, nested, restore_tree, tree_shapes
from st4vla_jax.state import TrainState, split

Leaves = Mapping[str, jax.ShapeDtypeStruct]


def flat(tree: Any) -> dict[str, Any]:
    """{"a/0/mu/b": leaf}: keys of dicts, fields of named tuples and positions, joined."""
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def of_state(state: TrainState) -> dict[str, Any]:
    """Item of a checkpoint -> tree; ``params`` holds trainable and frozen ones together."""
    other = {"optimizer": state.opt_state, "step": state.step, "skipped": state.skipped}
    items = {"params": state.all_params, "opt_state": other}
    return items if state.ema is None else items | {"ema": state.ema}


def to_state(abstract: TrainState, leaves: Mapping[str, Mapping[str, Any]]) -> TrainState:
    """Inverse of `of_state`.

    Args:
      abstract: state of the structure wanted.
      leaves: item -> {path: value}.
    """
    trees = {
        name: jax.tree.unflatten(jax.tree.structure(tree), [leaves[name][p] for p in flat(tree)])
        for name, tree in of_state(abstract).items()
    }
    trainable = flat(abstract.params)
    params, frozen = split(trees["params"], lambda path: path in trainable)
    other = trees["opt_state"]
    return abstract.replace(
        params=params,
        frozen=frozen,
        opt_state=other["optimizer"],
        step=other["step"],
        skipped=other["skipped"],
        ema=trees.get("ema"),
    )


def to_save(state: TrainState) -> dict[str, ocp.args.PyTreeSave]:
    """Item -> what Orbax saves, which it reads without our classes or optax's."""
    items = {}
    for name, tree in of_state(state).items():
        tree = nested(flat(tree).items())
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
        items[name] = ocp.args.PyTreeSave(tree, save_args=save_args)
    return items


def mismatches(
    folder: Path, leaves: Leaves, dtypes: bool, ignore: Collection[str] = ()
) -> list[str]:
    """How the stored tree ``folder`` differs from ``leaves``: a line for each path.

    Args:
      folder: an Orbax tree.
      leaves: what is wanted.
      dtypes: they must be equal too.
      ignore: stored paths that nobody wants.
    """
    name = folder.name
    if not (folder / TREE).is_file():
        return [f"{name}: not in the checkpoint"]
    stored = tree_shapes(folder)
    problems = [f"{name}/{path}: not in the checkpoint" for path in leaves if path not in stored]
    problems += [
        f"{name}/{path}: not in this run"
        for path in stored
        if path not in leaves and path not in ignore
    ]
    for path in leaves.keys() & stored.keys():
        old, new = stored[path], leaves[path]
        if old.shape != new.shape or (dtypes and old.dtype != new.dtype):
            problems.append(
                f"{name}/{path}: {_text(old)} in the checkpoint, {_text(new)} in this run"
            )
    return sorted(problems)


def _text(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def read(folder: Path, leaves: Leaves) -> dict[str, jax.Array]:
    """Reads leaves of a stored tree, cast and sharded as told; each device only what it holds.

    Raises:
      CheckpointError: the stored tree is damaged.
    """
    args = nested(
        (
            path,
            ocp.ArrayRestoreArgs(
                jax.Array, leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape
            ),
        )
        for path, leaf in leaves.items()
    )
    return flat(restore_tree(folder, args, folder.name)) if leaves else {}
