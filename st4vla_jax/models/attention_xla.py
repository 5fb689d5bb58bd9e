"""Attention in plain XLA: in one piece, in chunks of queries, or over windows of keys (CPUs)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array

BLOCK = 64  # queries that share a window
# Widths of the windows to choose from; a branch of the program each.
WIDTHS = (256, 512, 1024)


def attend(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    causal: bool,
    q_offset: Array | int,
    query_chunk: int,
    weights_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Every query against every key, ``query_chunk`` queries at a time.

    Arguments, result and errors as `attention`.
    """
    length = q.shape[-3]
    if not query_chunk or length <= query_chunk:
        return _dense(q, k, v, q_segments, kv_segments, causal, q_offset, weights_fn)
    if weights_fn is not None:
        raise ValueError("weights_fn and query_chunk cannot be combined")
    pad = -length % query_chunk
    chunks = (length + pad) // query_chunk

    def split(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, pad)
        x = jnp.pad(x, widths)
        axis %= x.ndim
        shape = (*x.shape[:axis], chunks, query_chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    @jax.checkpoint
    def one(args):
        i, qc, sc = args
        return _dense(qc, k, v, sc, kv_segments, causal, q_offset + i * query_chunk, None)

    segments = None if q_segments is None else split(q_segments, -1)
    out = jax.lax.map(one, (jnp.arange(chunks), split(q, -3), segments))
    out = jnp.moveaxis(out, 0, -4)
    return out.reshape(*q.shape[:-3], length + pad, *q.shape[-2:])[..., :length, :, :]


def _dense(q, k, v, q_segments, kv_segments, causal, q_offset, weights_fn):
    *lead, q_len, heads, dim = q.shape
    kv_len, groups = k.shape[-3:-1]
    q = q.reshape(*lead, q_len, groups, heads // groups, dim)
    # [...,G,Tq,N/G,Tk] is the order in which the matmul leaves them: no transpose of the scores.
    scores = jnp.einsum("...qgnh,...kgh->...gqnk", q, k, preferred_element_type=jnp.float32)
    scores = scores * dim**-0.5
    mask = None
    if q_segments is not None:
        mask = q_segments[..., :, None] == kv_segments[..., None, :]
    if causal:
        order = jnp.arange(kv_len)[None, :] <= jnp.arange(q_len)[:, None] + q_offset
        mask = order if mask is None else mask & order
    if mask is not None:
        mask = mask[..., None, :, None, :]
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if weights_fn is not None:
        weights = weights_fn(weights)
    out = jnp.einsum("...gqnk,...kgh->...qgnh", weights.astype(v.dtype), v)
    return out.reshape(*lead, q_len, heads, dim)


# --- Windows of keys ----------------------------------------------------------------------------


def has_windows(length: int) -> bool:
    """Whether `attend_windows` takes rows of this length and can save work on them."""
    return length % BLOCK == 0 and bool(_widths(length))


def _widths(length: int) -> list[int]:
    return [width for width in WIDTHS if 2 * width <= length]


def attend_windows(
    q: Array, k: Array, v: Array, segments: Array, causal: bool, query_chunk: int
) -> Array:
    """Self-attention in packed rows: each block of queries reads only a window of keys.

    The width is the smallest of WIDTHS that holds all keys that any block sees, found in the
    segment ids at every call, else the whole row: exact for every batch, and no segment is too
    long.  Only padding (segment 0), whose output nobody reads, may see less: of the row's padding
    it sees what lies in its window, at least itself.  Scores are made again in the backward pass.

    On one core of an EPYC 9004, forward and backward in f32 (ms of CPU time, full rows -> windows):
    causal, B=2 T=640 N=12 G=2 H=64, segments up to 184: 253 -> 83; vision, B=2 P=1280 N=6 H=64,
    images of 256 patches: 713 -> 117.

    Args:
      q: [...,T,N,H], ``has_windows(T)``.
      k: [...,T,G,H].
      v: [...,T,G,H].
      segments: i32[...,T], not negative.
      causal: masks keys after the query, by index.
      query_chunk: of whole rows, as `attention`.

    Returns:
      [...,T,N,H] in q's dtype.
    """
    lead = q.ndim - 3
    rows = [x.reshape(-1, *x.shape[lead:]) for x in (q, k, v, segments)]
    first, last = _seen_keys(rows[3], causal)
    widths = _widths(q.shape[-3])
    need = jnp.max(last + 1 - first)
    branches = [partial(_over_windows, causal, width) for width in widths]

    def whole(q, k, v, segments, first):
        return attend(q, k, v, segments, segments, causal, 0, query_chunk)

    # A branch must keep nothing for the backward pass: all branches' values would be kept.
    branches = [jax.checkpoint(branch) for branch in (*branches, whole)]
    out = jax.lax.switch(jnp.sum(need > jnp.array(widths)), branches, *rows, first)
    return out.reshape(q.shape)


def _seen_keys(segments: Array, causal: bool) -> tuple[Array, Array]:
    """Lowest and highest index of the keys that a block sees, i32[B,T/64] each."""
    index = jnp.arange(segments.shape[-1], dtype=jnp.int32)
    query, key = index[:, None], index[None, :]
    same = segments[:, :, None] == segments[:, None, :]
    seen = jnp.where(segments[:, :, None] > 0, same, query == key)
    if causal:
        seen &= key <= query
    seen = seen.reshape(len(segments), -1, BLOCK, len(index))
    first = jnp.min(jnp.where(seen, index, len(index)), axis=(-2, -1))
    return first, jnp.max(jnp.where(seen, index, -1), axis=(-2, -1))


def _over_windows(causal, width, q, k, v, segments, first):
    """Rows and blocks one by one: products large enough, scores that stay in the cache."""
    length = q.shape[1]
    starts = jnp.minimum(first, length - width)

    def row(args):
        q, k, v, segments, starts = args

        @jax.checkpoint
        def block(args):
            index, start = args
            at = index * BLOCK
            keys = (jax.lax.dynamic_slice_in_dim(x, start, width) for x in (k, v, segments))
            queries = (jax.lax.dynamic_slice_in_dim(x, at, BLOCK) for x in (q, segments))
            (k_own, v_own, k_ids), (q_own, q_ids) = keys, queries
            return _dense(q_own, k_own, v_own, q_ids, k_ids, causal, at - start, None)

        return jax.lax.map(block, (jnp.arange(length // BLOCK), starts)).reshape(q.shape)

    return jax.lax.map(row, (q, k, v, segments, starts))
