"""Losses without denominators, which come from the masks of the global batch (DESIGN.md D5)."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from st4vla_jax.sharding import Rules, constrain

Array = jax.Array

_LOWEST = jnp.finfo(jnp.float32).min


def masked_squared_error(pred: Array, target: Array, mask: Array) -> Array:
    """Squared errors in f32, 0 where masked; the caller sums over the axes it wants.

    Args:
      pred: f[...].
      target: f[...], same shape; masked entries may hold anything, NaN included.
      mask: bool, broadcast against them; True where an entry counts.

    Returns:
      f32[...].
    """
    # Masked before the difference: the gradient of a masked NaN would be NaN as well.
    pred, target = (jnp.where(mask, x.astype(jnp.float32), 0) for x in (pred, target))
    return jnp.square(pred - target)


def group_sums(
    values: Array, weights: Array, groups: Array, num_groups: int
) -> tuple[Array, Array]:
    """Weighted sums for each group, for metrics.

    Args:
      values: f32[...].
      weights: f32[...]; 0 leaves a value out.
      groups: i32[...] in 0..num_groups-1.
      num_groups: number of groups.

    Returns:
      f32[num_groups] sum of weights * values, and f32[num_groups] sum of weights.
    """
    weights = weights.astype(jnp.float32)
    # Compared and summed rather than scattered: a reduction partitions well, a scatter does not.
    member = (groups[..., None] == jnp.arange(num_groups)).astype(jnp.float32)
    axes = tuple(range(values.ndim))
    weighted = weights[..., None] * member
    return jnp.sum(values[..., None] * weighted, axis=axes), jnp.sum(weighted, axis=axes)


def next_token_nll(
    hidden: Array, table: Array, targets: Array, *, tile: int, rules: Rules
) -> Array:
    """Negative log-likelihood of each target, without the logits [B,M,V] in memory.

    Forward and backward go over the vocabulary in n tiles; tile j holds the ids i * n + j, so that
    a vocabulary split over the mesh stays split inside each tile.  Tiles over tokens instead would
    gather the table once a tile.  Matmuls in hidden's dtype with f32 accumulation.

    Args:
      hidden: [B,M,D] states that predict.
      table: [V,D] output head.
      targets: i32[B,M] in 0..V-1.
      tile: vocabulary entries of a tile, about; at most twice as many are used.
      rules: layout.

    Returns:
      f32[B,M].

    Raises:
      ValueError: ``tile`` is not positive.
    """
    if tile < 1:
        raise ValueError(f"tile {tile} must be at least 1")
    vocab = table.shape[0]
    num_tiles = _num_tiles(vocab, tile)
    # Width unsharded, in the compute dtype, before the loop: gathered once, not once a tile.
    table = constrain(table.astype(hidden.dtype), rules, "act_vocab", "act_embed")
    table = jnp.pad(table, ((0, -vocab % num_tiles), (0, 0)))
    table = table.reshape(-1, num_tiles, table.shape[-1])
    return _tiled_nll(vocab, rules, hidden, table, targets)


def _num_tiles(vocab: int, tile: int) -> int:
    """The divisor of ``vocab`` nearest to vocab / tile; without a near one, as many (padded)."""
    want = max(1, math.ceil(vocab / tile))
    near = [n for n in range(math.ceil(want / 2), 2 * want + 1) if vocab % n == 0]
    return min(near, key=lambda n: abs(math.log(n / want)), default=want)


def _tile_logits(hidden, table, j, vocab, rules):
    """Tile j's logits f32[B,M,V/n] and kernel [V/n,D]; ids past the vocabulary never win."""
    rows, num_tiles, _ = table.shape
    kernel = jax.lax.dynamic_index_in_dim(table, j, axis=1, keepdims=False)
    logits = jnp.einsum("bmd,vd->bmv", hidden, kernel, preferred_element_type=jnp.float32)
    logits = constrain(logits, rules, "batch", "act_seq", "act_vocab")
    if rows * num_tiles > vocab:
        logits = jnp.where(jnp.arange(rows) * num_tiles + j < vocab, logits, _LOWEST)
    return logits, kernel


def _is_target(targets, j, rows, num_tiles):
    """bool[B,M,V/n]: the one entry of tile j, if any, that holds the target."""
    inside = jnp.where(targets % num_tiles == j, targets // num_tiles, -1)
    return inside[..., None] == jnp.arange(rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled_nll(vocab, rules, hidden, table, targets):
    """Shapes: hidden [B,M,D], table [V/n,n,D], targets i32[B,M] -> f32[B,M]."""
    return _tiled_nll_fwd(vocab, rules, hidden, table, targets)[0]


def _tiled_nll_fwd(vocab, rules, hidden, table, targets):
    rows, num_tiles, _ = table.shape

    def body(j, state):
        top, total, picked = state
        logits, _ = _tile_logits(hidden, table, j, vocab, rules)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        total = total * jnp.exp(top - new_top)
        total = total + jnp.sum(jnp.exp(logits - new_top[..., None]), axis=-1)
        # A sum over a comparison, since a gather along a split vocabulary would gather logits.
        hit = _is_target(targets, j, rows, num_tiles)
        return new_top, total, picked + jnp.sum(jnp.where(hit, logits, 0), axis=-1)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    top, total, picked = jax.lax.fori_loop(
        0, num_tiles, body, (jnp.full_like(zeros, _LOWEST), zeros, zeros)
    )
    log_norm = top + jnp.log(total)
    return log_norm - picked, (hidden, table, targets, log_norm)


def _tiled_nll_bwd(vocab, rules, residuals, grad):
    hidden, table, targets, log_norm = residuals
    rows, num_tiles, _ = table.shape

    def body(j, state):
        grad_hidden, grad_table = state
        logits, kernel = _tile_logits(hidden, table, j, vocab, rules)
        hit = _is_target(targets, j, rows, num_tiles)
        grad_logits = (jnp.exp(logits - log_norm[..., None]) - hit) * grad[..., None]
        grad_logits = grad_logits.astype(hidden.dtype)
        grad_hidden += jnp.einsum(
            "bmv,vd->bmd", grad_logits, kernel, preferred_element_type=jnp.float32
        )
        grad_kernel = jnp.einsum(
            "bmv,bmd->vd", grad_logits, hidden, preferred_element_type=jnp.float32
        )
        # Each tile is written once, so its rows need no accumulator in f32.
        grad_table = jax.lax.dynamic_update_index_in_dim(
            grad_table, grad_kernel.astype(table.dtype), j, axis=1
        )
        return grad_hidden, grad_table

    grad_hidden, grad_table = jax.lax.fori_loop(
        0, num_tiles, body, (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(table))
    )
    return grad_hidden.astype(hidden.dtype), grad_table, None


_tiled_nll.defvjp(_tiled_nll_fwd, _tiled_nll_bwd)
