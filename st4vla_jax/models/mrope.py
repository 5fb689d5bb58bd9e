"""Multimodal rotary position embedding: three position axes share the frequencies of a head.

Source: HF Qwen2_5_VLRotaryEmbedding and apply_rotary_pos_emb.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
RotaryTables = tuple[Array, Array]


def rotary_tables(
    positions: Array, head_dim: int, sections: tuple[int, int, int], theta: float
) -> RotaryTables:
    """Cosine and sine of every rotation angle.

    HF repeats the section pattern for both halves of the head, and the halves rotate by the same
    angles, so one half is enough: frequency f belongs to the axis whose section covers f.

    Args:
      positions: i32[B,T,3] ids on the axes time, height, width.
      head_dim: H, twice the sum of ``sections``.
      sections: number of frequencies of each axis.
      theta: base of the frequencies.

    Returns:
      cos, sin: f32[B,T,H/2].
    """
    frequencies = 1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    ids = jnp.repeat(positions, jnp.array(sections), axis=-1, total_repeat_length=head_dim // 2)
    angles = ids.astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, tables: RotaryTables) -> Array:
    """Rotates the pairs (x[h], x[h + H/2]) of every head, in f32.

    Args:
      x: [B,T,...,H], heads on any axes between.
      tables: cos, sin of f32[B,T,H/2].

    Returns:
      Like x, in its dtype.
    """
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(table, heads) for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)
