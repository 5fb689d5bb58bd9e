"""Losses without denominators, which come from the masks of the global batch (DESIGN.md D5)."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from st4vla_jax.models.layers import whole_table
from st4vla_jax.sharding import Rules, table_axes

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

    Forward and backward go over the vocabulary in tiles; tiles over tokens instead would gather the
    table once a tile.  On a mesh each device gathers the rows of the table that it lacks, once, and
    scores its own tokens; a vocabulary split over the tensor axis stays split.  Matmuls in hidden's
    dtype with f32 accumulation.

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
    table = table.astype(hidden.dtype)  # cast before it travels
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _tiled_nll(tile, (), hidden, table, targets)
    whole, split = table_axes(rules)

    def local(hidden, table, targets):
        if whole:
            table = whole_table(table, whole)
        if split:
            targets = targets - jax.lax.axis_index(split) * len(table)
        return _tiled_nll(tile, split, hidden, table, targets)

    batch = rules.spec(("batch",))
    specs = (batch, rules.param_spec(("vocab", "vocab_embed")), batch)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=batch, check_vma=False)
    return mapped(hidden, table, targets)


def _tiles(table: Array, tile: int) -> Array:
    """[V,D] -> [n,V/n,D], padded where n does not divide V."""
    vocab = len(table)
    num_tiles = _num_tiles(vocab, tile)
    return jnp.pad(table, ((0, -vocab % num_tiles), (0, 0))).reshape(num_tiles, -1, table.shape[1])


def _num_tiles(vocab: int, tile: int) -> int:
    """The divisor of ``vocab`` nearest to vocab / tile; without a near one, as many (padded)."""
    want = max(1, math.ceil(vocab / tile))
    near = [n for n in range(math.ceil(want / 2), 2 * want + 1) if vocab % n == 0]
    return min(near, key=lambda n: abs(math.log(n / want)), default=want)


def _tile_logits(hidden, tiles, j, vocab):
    """Tile j's logits f32[B,M,V/n] and kernel [V/n,D]; ids past the vocabulary never win."""
    num_tiles, rows, _ = tiles.shape
    kernel = jax.lax.dynamic_index_in_dim(tiles, j, keepdims=False)
    logits = jnp.einsum("bmd,vd->bmv", hidden, kernel, preferred_element_type=jnp.float32)
    if rows * num_tiles > vocab:
        logits = jnp.where(j * rows + jnp.arange(rows) < vocab, logits, _LOWEST)
    return logits, kernel


def _is_target(targets, j, rows, vocab):
    """bool[B,M,V/n]: the one entry of tile j, if any, that holds the target."""
    own = jnp.where((targets >= 0) & (targets < vocab), targets - j * rows, -1)
    return own[..., None] == jnp.arange(rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled_nll(tile, split, hidden, table, targets):
    """One device's part: hidden [B,M,D], table [V,D], targets i32[B,M] -> f32[B,M].

    ``split`` are the mesh axes over which the vocabulary is split; ids are counted from the first
    of the device's own.
    """
    return _tiled_nll_fwd(tile, split, hidden, table, targets)[0]


def _tiled_nll_fwd(tile, split, hidden, table, targets):
    tiles, vocab = _tiles(table, tile), len(table)
    num_tiles, rows, _ = tiles.shape

    def body(j, state):
        top, total, picked = state
        logits, _ = _tile_logits(hidden, tiles, j, vocab)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        total = total * jnp.exp(top - new_top)
        total = total + jnp.sum(jnp.exp(logits - new_top[..., None]), axis=-1)
        # A sum over a comparison: a gather of single entries is slow on TPUs.
        hit = _is_target(targets, j, rows, vocab)
        return new_top, total, picked + jnp.sum(jnp.where(hit, logits, 0), axis=-1)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    top, total, picked = jax.lax.fori_loop(
        0, num_tiles, body, (jnp.full_like(zeros, _LOWEST), zeros, zeros)
    )
    if split:
        highest = jax.lax.pmax(top, split)
        total, picked = jax.lax.psum((total * jnp.exp(top - highest), picked), split)
        top = highest
    log_norm = top + jnp.log(total)
    return log_norm - picked, (hidden, table, targets, log_norm)


def _tiled_nll_bwd(tile, split, residuals, grad):
    hidden, table, targets, log_norm = residuals
    tiles, vocab = _tiles(table, tile), len(table)
    num_tiles, rows, _ = tiles.shape
    if split:  # shard_map hands each of the devices that share a result a part of its gradient
        grad = jax.lax.psum(grad, split)

    def body(j, state):
        grad_hidden, grad_tiles = state
        logits, kernel = _tile_logits(hidden, tiles, j, vocab)
        hit = _is_target(targets, j, rows, vocab)
        grad_logits = (jnp.exp(logits - log_norm[..., None]) - hit) * grad[..., None]
        grad_logits = grad_logits.astype(hidden.dtype)
        grad_hidden += jnp.einsum(
            "bmv,vd->bmd", grad_logits, kernel, preferred_element_type=jnp.float32
        )
        grad_kernel = jnp.einsum(
            "bmv,bmd->vd", grad_logits, hidden, preferred_element_type=jnp.float32
        )
        # Each tile is written once, so its rows need no accumulator in f32.
        grad_tiles = jax.lax.dynamic_update_index_in_dim(
            grad_tiles, grad_kernel.astype(tiles.dtype), j, axis=0
        )
        return grad_hidden, grad_tiles

    grad_hidden, grad_tiles = jax.lax.fori_loop(
        0, num_tiles, body, (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(tiles))
    )
    grad_table = grad_tiles.reshape(-1, table.shape[1])[:vocab]
    return grad_hidden.astype(hidden.dtype), grad_table, None


_tiled_nll.defvjp(_tiled_nll_fwd, _tiled_nll_bwd)
