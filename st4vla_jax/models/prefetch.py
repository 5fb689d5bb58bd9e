"""Scanned blocks whose weights travel while another block computes, for sharded weights (FSDP).

In a plain scan a block's weights are gathered in the round that computes with them: its first
product waits for its first gather, and the compiler moves nothing over the edge of a loop's round.
Here each round gathers the weights of the block that comes next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from st4vla_jax.sharding import Rules

Array = jax.Array
Params = Any
Apply = Callable[[Array, Params, Any], Array]

_constrain = jax.lax.with_sharding_constraint


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one block's weights lie on the mesh of `jax.set_mesh`.

    Attributes:
      axes: logical names of each leaf, in the order of `jax.tree.leaves`.
      rules: of the mesh; dtype: of the matmuls, in which weights and gradients travel.
    """

    axes: tuple[tuple[str | None, ...], ...]
    rules: Rules
    dtype: Any

    def gather(self, stack: Params, layer: Array | int) -> Params:
        """Block ``layer`` of a stack, whole along fsdp."""
        leaves, tree = jax.tree.flatten(stack)
        whole, found = self.rules.without("fsdp"), []
        for leaf, names in zip(leaves, self.axes, strict=True):
            own = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False).astype(self.dtype)
            own = _constrain(own, self.rules.param_spec(names))  # sliced and cast before it travels
            found.append(_constrain(own, whole.param_spec(names)))
        return jax.tree.unflatten(tree, found)

    def scatter(self, grads: Params) -> Params:
        """Gradients of a block, summed where its parameters lie."""
        leaves, tree = jax.tree.flatten(grads)
        pairs = zip(leaves, self.axes, strict=True)
        return jax.tree.unflatten(
            tree, [_constrain(g, self.rules.param_spec(names)) for g, names in pairs]
        )


def scan_prefetched(
    apply: Apply,
    x: Array,
    stack: Params,
    consts: Any,
    layout: Layout,
    keep: bool = False,
    early: bool = False,
) -> Array:
    """Applies the blocks of a stack in order.

    One gather of a block's weights too many is made, in each direction.

    Args:
      apply: (x, weights of one block, consts) -> x, rematerialised as it should be.
      x: [B,...].
      stack: parameters, each leaf [length,...].
      consts: what all blocks read; gets no gradient.
      layout: of one block.
      keep: keeps the gathered weights for the backward pass, which then gathers none.
      early: the backward pass of a block reads ``consts`` when the next weights have come.  For
        blocks whose backward pass begins with products that need none of them: the compiler's
        scheduler hides gathers that nothing waits for behind the round's last products alone,
        where the gradients' sums are too.
    """
    return _scan(apply, layout, (keep, early), x, stack, consts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(apply, layout, how, x, stack, consts):
    return _forward(apply, layout, how, x, stack, consts)[0]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Shared:
    """Stands for a value of a pullback that is not kept for each block."""

    index: int


def _is_shared(x: Any) -> bool:
    return isinstance(x, _Shared)


def _last(stack: Params) -> int:
    return len(jax.tree.leaves(stack)[0]) - 1


def _forward(apply, layout, how, x, stack, consts):
    (keep, _), last = how, _last(stack)

    def body(carry, layer):
        x, weights = carry
        following = layout.gather(stack, jnp.minimum(layer + 1, last))
        out, pullback = jax.vjp(lambda x, w: apply(x, w, consts), x, weights)
        shared = jax.tree.leaves((consts, None if keep else weights))
        indices = {id(value): _Shared(i) for i, value in enumerate(shared)}
        return (out, following), jax.tree.map(lambda v: indices.get(id(v), v), pullback)

    carry = (x, layout.gather(stack, 0))
    (x, _), pullbacks = jax.lax.scan(body, carry, jnp.arange(last + 1))
    return x, (pullbacks, stack, consts)


def _backward(apply, layout, how, residuals, grad):
    pullbacks, stack, consts = residuals
    (keep, early), last = how, _last(stack)

    def body(carry, xs):
        grad, weights = carry
        pullback, layer = xs
        before = None if keep else layout.gather(stack, jnp.maximum(layer - 1, 0))
        late = consts
        if early and not keep:
            late, before = jax.lax.optimization_barrier((consts, before))
        shared = jax.tree.leaves((late, weights))
        whole = jax.tree.map(
            lambda v: shared[v.index] if _is_shared(v) else v, pullback, is_leaf=_is_shared
        )
        grad, own = whole(grad)
        own = jax.tree.map(lambda g, p: g.astype(p.dtype), layout.scatter(own), stack)
        return (grad, before), own

    carry = (grad, None if keep else layout.gather(stack, last))
    xs = (pullbacks, jnp.arange(last + 1))
    (grad, _), grads = jax.lax.scan(body, carry, xs, reverse=True)
    return grad, grads, None


_scan.defvjp(_forward, _backward)
