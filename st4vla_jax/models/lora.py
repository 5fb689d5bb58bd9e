"""Low-rank adapters: y = x W + (x A) B beside kernels chosen by path (Hu et al., 2021).

An adapter is two leaves beside a kernel, ``lora_a`` and ``lora_b``; `layers.Linear` adds their
product where it finds them.  B starts at zero, so that an adapted model starts as the model.

differs: no factor alpha / r; with Adam it is the same as another learning rate of the adapters,
which the optimizer's table has.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from st4vla_jax.sharding import Axes, is_axes

LORA_A, LORA_B = "lora_a", "lora_b"
# Kernels that no `Linear` applies: it would not be known that an adapter stands beside them.
_OTHER_KERNELS = ("vlm/visual/patch_embed/proj", "bridge/blocks/cross_attn/in_proj")
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoraTarget:
    """Adapters of one rank.

    Attributes:
      pattern: regular expression for whole paths of `Linear` modules, e.g.
        "vlm/language_model/blocks/self_attn/[qkvo]_proj".
      rank: r.
    """

    pattern: str
    rank: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r}: {error}") from None


def lora_problems(boxed: Params, targets: Mapping[str, LoraTarget]) -> list[str]:
    """Targets that choose no kernel, and kernels that two targets choose."""
    paths = dict(_kernels(boxed))
    problems = [
        f"lora.{name}: {target.pattern!r} is no path of a kernel"
        for name, target in targets.items()
        if not any(re.fullmatch(target.pattern, path) for path in paths)
    ]
    for path in paths:
        names = [n for n, target in targets.items() if re.fullmatch(target.pattern, path)]
        if len(names) > 1:
            problems.append(f"lora: {' and '.join(names)} both choose {path}")
    return problems


def add_lora(boxed: Params, targets: Mapping[str, LoraTarget], key: jax.Array) -> Params:
    """Adds adapters in `Axes` boxes beside the chosen kernels: A ~ U(+-1/sqrt(fan_in)), B = 0.

    Args:
      boxed: parameters from `ST4VLA.init`.
      targets: by name; see `lora_problems`.
      key: of A; one key for each path, whatever else is adapted.
    """
    for number, (path, kernel) in enumerate(_kernels(boxed)):
        rank = next((t.rank for t in targets.values() if re.fullmatch(t.pattern, path)), None)
        if rank is not None:
            boxed = _with_adapter(boxed, path, kernel, rank, jax.random.fold_in(key, number))
    return boxed


def merge_lora(params: Params) -> Params:
    """Folds adapters into their kernels, in f32: the same function without them."""
    if LORA_A in params:
        kernel, a, b = (params[name] for name in ("kernel", LORA_A, LORA_B))
        rest = {name: leaf for name, leaf in params.items() if name not in (LORA_A, LORA_B)}
        return rest | {"kernel": merged_kernel(kernel, a, b)}
    return {k: merge_lora(v) if isinstance(v, dict) else v for k, v in params.items()}


def merged_kernel(kernel, a, b):
    """Folds one: kernel [*lead,*in,*out] + A [*lead,*in,r] B [*lead,r,*out], numpy or jax."""
    lead = a.ndim + b.ndim - 2 - kernel.ndim
    rank, inner = a.shape[-1], a.shape[lead:-1]
    layers = kernel.shape[:lead]
    low = a.reshape(*layers, math.prod(inner), rank).astype("float32")
    high = b.reshape(*layers, rank, -1).astype("float32")
    total = kernel.astype("float32") + (low @ high).reshape(kernel.shape)
    return total.astype(kernel.dtype)


def _kernels(tree: Params, prefix: str = ""):
    """Yields (path of the module, boxed kernel) of every `Linear`."""
    for name, child in tree.items():
        if isinstance(child, dict):
            if is_axes(child.get("kernel")) and prefix + name not in _OTHER_KERNELS:
                yield prefix + name, child["kernel"]
            yield from _kernels(child, f"{prefix}{name}/")


def _num_in(names: tuple[str | None, ...]) -> int:
    """Input axes of a kernel: heads and head_dim of an output projection, else one."""
    return 2 if (names[0] or "").endswith("heads") else 1


def _with_adapter(boxed: Params, path: str, kernel: Axes, rank: int, key: jax.Array) -> Params:
    lead = int(kernel.names[0] == "layers")
    shape, names = kernel.value.shape, kernel.names
    split = lead + _num_in(names[lead:])
    bound = 1 / math.sqrt(math.prod(shape[lead:split]))
    a = jax.random.uniform(key, (*shape[:split], rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[:lead], rank, *shape[split:]), jnp.float32)
    adapter = {
        LORA_A: Axes(a, (*names[:split], None)),
        LORA_B: Axes(b, (*names[:lead], None, *names[split:])),
    }
    return _updated(boxed, path.split("/"), adapter)


def _updated(tree: Params, path: list[str], leaves: Params) -> Params:
    """A copy of nested dicts with leaves added at a path."""
    if not path:
        return tree | leaves
    return tree | {path[0]: _updated(tree[path[0]], path[1:], leaves)}
