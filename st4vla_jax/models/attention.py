"""One attention function for every module: grouped heads, packed segments, causal or full."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    causal: bool = False,
    q_offset: Array | int = 0,
    query_chunk: int = 0,
    weights_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Scaled dot-product attention; softmax in f32.

    A query sees a key if both carry the same segment id and, when causal, the key's index is at
    most the query's index plus ``q_offset`` (the number of cached keys before the first query).

    Args:
      q: [...,Tq,N,H] queries.
      k: [...,Tk,G,H] keys; N is a multiple of G.
      v: [...,Tk,G,H] values.
      q_segments: i32[...,Tq]; None means no segment mask.
      kv_segments: i32[...,Tk].
      causal: masks keys after the query, by index.
      q_offset: index of the first query among the keys.
      query_chunk: handles this many queries at a time, so that memory stays linear in Tq;
        0 = all at once.
      weights_fn: applied to the softmax weights [...,G,Tq,N/G,Tk] (dropout).

    Returns:
      [...,Tq,N,H] in q's dtype.
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
