"""Keys and values of earlier tokens, as an explicit value: every function returns a new cache.

All rows advance together, one slot for each token or padding slot fed; a row's padding keeps
segment id 0 in the cache, so that no later token sees it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from st4vla_jax.config import Runtime, TextConfig
from st4vla_jax.sharding import constrain

Array = jax.Array


@struct.dataclass
class KVCache:
    """Cache of S slots for each row.

    Attributes:
      k, v: [layers,B,S,G,H] rotated keys, and values.
      segment_ids: i32[B,S] segment of each slot; 0 = padding or not yet filled.
      length: i32[] slots filled so far.
    """

    k: Array
    v: Array
    segment_ids: Array
    length: Array


def init_cache(cfg: TextConfig, rt: Runtime, batch: int, slots: int) -> KVCache:
    """An empty cache in the compute dtype."""
    shape = (
        cfg.num_hidden_layers, batch, slots, cfg.num_key_value_heads, cfg.head_dim,
    )  # fmt: skip
    empty = constrain(
        jnp.zeros(shape, rt.dtypes.compute), rt.rules, None, "batch", None, "act_kv_heads", None
    )
    return KVCache(empty, empty, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))


def append_segments(cache: KVCache, segment_ids: Array) -> KVCache:
    """Claims the next slots for tokens i32[B,T]; ``length`` stays, for `append_layer`.

    Raises:
      ValueError: the cache has fewer than T slots in all.
    """
    slots, tokens = cache.segment_ids.shape[1], segment_ids.shape[1]
    if tokens > slots:
        raise ValueError(f"{tokens} tokens do not fit a key/value cache of {slots} slots")
    ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
    return cache.replace(segment_ids=ids)


def append_layer(cache: KVCache, layer: Array, k: Array, v: Array) -> KVCache:
    """Writes one layer's k, v [B,T,G,H] into the slots after ``length``."""
    start = (layer, 0, cache.length, 0, 0)
    update = jax.lax.dynamic_update_slice  # in place, since the cache is a loop carry
    return cache.replace(
        k=update(cache.k, k[None].astype(cache.k.dtype), start),
        v=update(cache.v, v[None].astype(cache.v.dtype), start),
    )


def read_layer(cache: KVCache, layer: Array) -> tuple[Array, Array]:
    """One layer's keys and values [B,S,G,H]."""
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (cache.k, cache.v))
    return k, v


def advance(cache: KVCache, tokens: int) -> KVCache:
    """Counts ``tokens`` slots as filled, once every layer has written them."""
    return cache.replace(length=cache.length + tokens)
