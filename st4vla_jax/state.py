"""What a training step carries from update to update, and the split of parameters by path.

Trainable and frozen parameters are separate dicts before anything is differentiated, so that the
optimizer, the clip and every norm see trainable ones only (DESIGN.md D7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import struct

Params = dict[str, Any]


@struct.dataclass
class TrainState:
    """State of a run after ``step`` updates.

    Attributes:
      step: i32[] updates tried; also the number of the batch that comes next.
      params: trainable parameters, nested dict.
      frozen: parameters that are never updated; no path is in both.
      opt_state: moments of the trainable parameters.
      ema: moving average of ``params``, or None.
      skipped: i32[] updates skipped in a row because a gradient was not finite.
    """

    step: jax.Array
    params: Params
    frozen: Params
    opt_state: Any
    ema: Params | None
    skipped: jax.Array

    @property
    def all_params(self) -> Params:
        """Trainable and frozen parameters as the model takes them."""
        return merge(self.params, self.frozen)


def leaves_by_path(tree: Mapping[str, Any], is_leaf: Callable | None = None) -> Iterator:
    """Yields ("vlm/visual/...", leaf) in the order of `jax.tree.leaves`."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield "/".join(key.key for key in keys), leaf


def map_with_path(fn: Callable[..., Any], tree: Mapping[str, Any], *rest: Any, **kwargs) -> Any:
    """`jax.tree.map` whose function gets the leaf's path first."""

    def with_path(keys, *leaves):
        return fn("/".join(key.key for key in keys), *leaves)

    return jax.tree_util.tree_map_with_path(with_path, tree, *rest, **kwargs)


def split(tree: Params, is_chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """(chosen, others) by path; a dict that would be empty is left out of either."""

    def walk(node: Params, prefix: str) -> tuple[Params, Params]:
        chosen, others = {}, {}
        for name, child in node.items():
            path = prefix + name
            if not isinstance(child, dict):
                (chosen if is_chosen(path) else others)[name] = child
                continue
            for side, part in zip((chosen, others), walk(child, path + "/"), strict=True):
                if part:
                    side[name] = part
        return chosen, others

    return walk(tree, "")


def merge(first: Params, second: Params) -> Params:
    """Inverse of `split`.

    Raises:
      ValueError: a path is in both.
    """
    merged = dict(first)
    for name, value in second.items():
        if name not in merged:
            merged[name] = value
        elif isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = merge(merged[name], value)
        else:
            raise ValueError(f"parameter {name!r} is both trainable and frozen")
    return merged
