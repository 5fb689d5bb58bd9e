"""GPU flash attention: cuDNN's kernel behind `jax.nn.dot_product_attention`, with a packed mask.

cuDNN knows no segment ids through JAX's public API, so the segments become a mask that all blocks
share.  It is boolean on purpose: from jax 0.11 on no gradient of a boolean mask is computed, while
a float bias of the same content would cost one in every block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.cache
def device_has_kernel() -> bool:
    """Whether cuDNN's flash attention runs on this process's GPU (NVIDIA, from Ampere on)."""
    device = jax.local_devices(backend="gpu")[0]
    if "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0


def supports(dtype: jnp.dtype, q_len: int, kv_len: int, head_dim: int) -> bool:
    """Whether the kernel takes these shapes (check_is_flash_attention in jax._src.cudnn).

    Lengths must be even where there is a mask and a gradient.  Head dims over 128 need Hopper and
    occur in no model here.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return not (q_len % 2 or kv_len % 2 or head_dim % 8) and head_dim <= 128


def attend(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    """Attention on one device.

    Args:
      q: [...,Tq,N,H].
      k: [...,Tk,G,H].
      v: [...,Tk,G,H].
      mask: bool[...,1,Tq,Tk], True = visible; None sees everything.
      causal: a query sees no key of a higher index; cuDNN skips those blocks.

    Returns:
      [...,Tq,N,H].
    """
    folded = (None if x is None else x.reshape(-1, *x.shape[-3:]) for x in (q, k, v, mask))
    q_rows, k_rows, v_rows, mask_rows = folded
    out = jax.nn.dot_product_attention(
        q_rows, k_rows, v_rows, mask=mask_rows, is_causal=causal, implementation="cudnn"
    )
    return out.reshape(q.shape)
