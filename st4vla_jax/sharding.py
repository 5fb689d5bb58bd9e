"""Logical axis names, the one rules table, and lookups that raise instead of replicating.

Parameters carry their logical names in an `Axes` box while they are initialised; activations are
named where they are constrained.  `Rules` maps a logical name to mesh axes.  Flax's own context
(`nn.logical_axis_rules`) is not used: it is a thread-local outside jit's cache key and replicates
unknown names in silence.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from flax.core import meta
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from st4vla_jax.state import leaves_by_path

MESH_AXES = ("data", "fsdp", "tensor")
LANES = 128  # of a TPU's registers: narrower slices are padded when they travel
_LEAST = 64  # below it the compiler makes an all-gather an all-reduce, at twice the bytes

# Logical name -> mesh axes.  Widths are sliced by fsdp, heads and mlp by tensor.
DEFAULT_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # activations
    ("batch", ("data", "fsdp")),
    ("act_seq", ()),
    ("act_embed", ()),
    ("act_heads", ("tensor",)),
    ("act_kv_heads", ()),
    ("act_mlp", ("tensor",)),
    ("act_vocab", ("tensor",)),
    # language model; Qwen2.5-VL-3B has 2 key/value heads, so they stay whole
    ("layers", ()),
    ("vocab", ("tensor", "fsdp")),
    ("vocab_embed", ()),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ()),
    ("head_dim", ()),
    ("mlp", ("tensor",)),
    # vision tower
    ("vision_embed", ("fsdp",)),
    ("vision_heads", ("tensor",)),
    ("vision_mlp", ("tensor",)),
    ("vision_merged", ("fsdp",)),
    ("vision_merger_mlp", ("tensor",)),
    # DINOv2-S, Q-Former and DiT-B are under 128 M parameters each: replicated
    ("dino_embed", ()),
    ("dino_heads", ()),
    ("dino_mlp", ()),
    ("bridge_embed", ()),
    ("bridge_heads", ()),
    ("bridge_mlp", ()),
    ("dit_embed", ()),
    ("dit_heads", ()),
    ("dit_mlp", ()),
)


class ShardingError(ValueError):
    """A parameter or activation cannot be laid out on the mesh; lists every problem found."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Immutable, hashable table from logical axis names to mesh axes."""

    table: tuple[tuple[str, tuple[str, ...]], ...] = DEFAULT_RULES

    def replace(self, **axes: str | Sequence[str] | None) -> Rules:
        """Returns a table with the given logical names mapped anew; unknown names raise."""
        table = dict(self.table)
        for name, value in axes.items():
            self.mesh_axes(name)
            table[name] = (value,) if isinstance(value, str) else tuple(value or ())
            if unknown := [axis for axis in table[name] if axis not in MESH_AXES]:
                raise ShardingError(
                    f"rule {name!r}: {', '.join(map(repr, unknown))} is no mesh axis (there are "
                    f"{', '.join(MESH_AXES)})"
                )
        return Rules(tuple(table.items()))

    def without(self, axis: str) -> Rules:
        """The table with a mesh axis taken out of every entry but the batch's."""
        return Rules(
            tuple(
                (name, axes if name == "batch" else tuple(a for a in axes if a != axis))
                for name, axes in self.table
            )
        )

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of one logical name; None is never sharded.  Raises on unknown names."""
        if name is None:
            return ()
        table = dict(self.table)
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ShardingError(f"unknown logical axis {name!r}{hint}")
        return table[name]

    def spec(self, names: Iterable[str | None]) -> PartitionSpec:
        """PartitionSpec of an array whose axes have these logical names; raises on collisions."""
        names, used, entries = tuple(names), {}, []
        for name in names:
            axes = self.mesh_axes(name)
            for axis in axes:
                if axis in used:
                    raise ShardingError(
                        f"axes {used[axis]!r} and {name!r} of {names} both want mesh axis {axis!r}"
                    )
                used[axis] = name
            entries.append(axes[0] if len(axes) == 1 else (axes or None))
        return PartitionSpec(*entries)

    def param_spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """As `spec`, for a parameter: vectors (norms, biases) are not sliced by fsdp.

        Gathering one takes longer than its bytes do, and holds up the gathers that matter.
        """
        spec = self.spec(names)
        if len([name for name in names if name != "layers"]) > 1:
            return spec
        return PartitionSpec(*(None if entry == "fsdp" else entry for entry in spec))


@struct.dataclass
class Axes(meta.AxisMetadata):
    """Box around a parameter that carries its logical axis names during initialisation."""

    value: Any
    names: tuple[str | None, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Axes:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Axes:
        name = params.get(meta.PARTITION_NAME)
        return self.replace(names=self.names[:index] + (name,) + self.names[index:])

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Axes:
        return self.replace(names=self.names[:index] + self.names[index + 1 :])


def is_axes(x: Any) -> bool:
    return isinstance(x, Axes)


def unbox(tree: Any) -> Any:
    """Strips the `Axes` boxes: the plain nested dict that every step works on."""
    return jax.tree.map(lambda x: x.value if is_axes(x) else x, tree, is_leaf=is_axes)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh (data, fsdp, tensor) over ``devices`` (default: all of this job).

    Slice after slice and host after host, whatever order they come in: a host's rows of the batch
    are one block, and only the data axis crosses slices.

    Raises:
      ShardingError: the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = (data, fsdp, tensor)
    if math.prod(sizes) != len(devices):
        raise ShardingError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {math.prod(sizes)} devices, "
            f"there are {len(devices)}"
        )
    devices.sort(key=lambda d: (getattr(d, "slice_index", 0), d.process_index))
    # AxisType.Auto: Explicit axes, the default of jax.make_mesh, forbid sharding constraints.
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh | AbstractMesh, rules: Rules) -> int:
    """Parts of the batch: devices along its mesh axes."""
    return math.prod(mesh.shape[axis] for axis in rules.mesh_axes("batch"))


def is_sharded() -> bool:
    """Whether the mesh of `jax.set_mesh` cuts parameters along fsdp."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def table_axes(rules: Rules) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of `jax.set_mesh` that cut the vocabulary: those that cut the batch too, and the others.

    Along the first a table must be gathered to be read, along the others it may stay split.
    """
    mesh, batch = jax.sharding.get_abstract_mesh(), rules.mesh_axes("batch")
    axes = [axis for axis in rules.mesh_axes("vocab") if mesh.shape[axis] > 1]
    return tuple(a for a in axes if a in batch), tuple(a for a in axes if a not in batch)


def constrain(x: jax.Array, rules: Rules, *names: str | None) -> jax.Array:
    """Constrains an activation to its logical layout under the mesh of `jax.set_mesh`.

    Without a mesh it returns ``x``; names are looked up either way, so that a misspelt name fails
    on a laptop too.
    """
    if len(names) != x.ndim:
        raise ShardingError(f"{len(names)} names {names} for an array of shape {x.shape}")
    spec = rules.spec(names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedSharding for every leaf of a tree of `Axes` boxes (arrays or ShapeDtypeStructs).

    Raises:
      ShardingError: lists every unknown name, collision and indivisible size of the tree.
    """
    problems: list[str] = []

    def one(path, box):
        where = "/".join(str(k.key) for k in path)
        if not is_axes(box):
            problems.append(f"{where}: has no logical axis names")
            return None
        try:
            spec = rules.param_spec(box.names)
        except ShardingError as e:
            problems.append(f"{where}: {e}")
            return None
        for size, name, entry in zip(box.value.shape, box.names, spec, strict=True):
            axes = (entry,) if isinstance(entry, str) else entry or ()
            parts = math.prod(mesh.shape[a] for a in axes)
            if size % parts:
                problems.append(
                    f"{where}: axis {name!r} of size {size} is not divisible by {parts} "
                    f"(mesh axes {axes}); map {name!r} to None or change the mesh"
                )
        return NamedSharding(mesh, spec)

    tree = jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_axes)
    if problems:
        raise ShardingError("cannot shard the parameters:\n  " + "\n  ".join(problems))
    return tree


def narrow_slices(
    boxed: Any, mesh: Mesh | AbstractMesh, rules: Rules
) -> tuple[tuple[str, ...], list[str]]:
    """Axes that fsdp cuts in slices under LANES lanes, and as problems those under 64.

    On v5p, fsdp=64 of a width of 2048 made every all-gather a dynamic-update-slice and an
    all-reduce (compiled, jax 0.10.2), fsdp=16 none.
    """
    narrow: dict[str, None] = {}
    problems: dict[str, None] = {}
    for _, box in leaves_by_path(boxed, is_leaf=is_axes):
        for size, name in zip(box.value.shape, box.names, strict=True):
            axes = rules.mesh_axes(name)
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if "fsdp" not in axes or parts == 1 or size % parts or size // parts >= LANES:
                continue
            text = f"{name} {size} / {parts} = {size // parts}"
            narrow[text] = None
            if size // parts < _LEAST:
                problems[
                    f"fsdp: slices of {text} lanes; under {_LEAST} the compiler makes each "
                    f"all-gather an all-reduce: at most fsdp={max(1, size // _LEAST)}, or "
                    f"--config.mesh.rules={{'{name}': ()}} keeps it whole on every device"
                ] = None
    return tuple(narrow), list(problems)


def platform_problems(boxed: Any, mesh: Mesh, rules: Rules) -> list[str]:
    """What the collectives of the mesh's own platform cannot do, or only slowly."""
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return narrow_slices(boxed, mesh, rules)[1]
    # jax 0.10.2: 4 processes with mesh 1,2,2 took the train step's collectives in different orders
    # ("Received data size doesn't match"); with the tensor axis inside a process all is well.
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    if platform == "cpu" and any(len({d.process_index for d in group}) > 1 for group in groups):
        return [
            "mesh.tensor: a tensor axis over several CPU processes fails in gloo; keep it inside a "
            "process (more devices each) or make it 1"
        ]
    return []
