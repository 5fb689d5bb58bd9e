"""The two halves of a Vision Transformer block, shared by DINOv2 and the DiT (timm's layout)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from st4vla_jax.models.attention import attention
from st4vla_jax.models.layers import Init, Linear
from st4vla_jax.sharding import Rules, constrain

_CONTRAST = 3.0  # of a patch's difference from its image's mean, in towers from scratch
KernelInit = Callable[[int], Init]  # number of input axes -> initializer (layers.fan_init)


class SelfAttention(nn.Module):
    """Bidirectional self-attention with biases and one fused qkv kernel [D,3,N,H].

    Attributes:
      size: D; num_heads: N, with H = D / N.
      axis: prefix of the logical axis names ("dino", "dit").
      kernel_init: initializer for a kernel with that many input axes.
    """

    size: int
    num_heads: int
    axis: str
    kernel_init: KernelInit
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends over T: [...,T,D] -> [...,T,D]."""
        heads = (self.num_heads, self.size // self.num_heads)
        embed, head_names = f"{self.axis}_embed", (f"{self.axis}_heads", "head_dim")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = Linear(
            (self.size,), (3, *heads), (embed, None, *head_names),
            kernel_init=self.kernel_init(1), name="qkv", **dtypes,
        )(x)  # fmt: skip
        out = attention(qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :])
        return Linear(
            heads, (self.size,), (*head_names, embed),
            kernel_init=self.kernel_init(2), name="proj", **dtypes,
        )(out)  # fmt: skip


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))); ``approximate`` selects the tanh form of GELU."""

    size: int
    hidden_size: int
    axis: str
    approximate: bool
    kernel_init: KernelInit
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [...,D] -> [...,D]."""
        names = (f"{self.axis}_embed", f"{self.axis}_mlp")
        kwargs = {
            "dtype": self.dtype, "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init(1),
        }  # fmt: skip
        up = Linear((self.size,), (self.hidden_size,), names, name="fc1", **kwargs)(x)
        up = jax.nn.gelu(up, approximate=self.approximate)
        return Linear((self.hidden_size,), (self.size,), names[::-1], name="fc2", **kwargs)(up)


def constrain_tokens(x: jax.Array, rules: Rules) -> jax.Array:
    """Lays out tokens [B,...,T,D]: the first axis is the batch, others between are whole."""
    return constrain(x, rules, "batch", *(None,) * (x.ndim - 3), "act_seq", "act_embed")


def token_example(size: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """Smallest input [1,1,D] that initialises a block (layers.Stack)."""
    return jax.ShapeDtypeStruct((1, 1, size), jnp.dtype(dtype))


def absolute_positions(patch_hw: jax.Array, width: int) -> jax.Array:
    """2-D sine and cosine positions of amplitude 1, as large as a fresh patch embedding.

    A quarter of the width each: sine and cosine of the row, then of the column.  Frequencies fall
    from 1 to 1/100 a patch: on grids of a few dozen patches the usual 1/10,000 would be constant.

    Args:
      patch_hw: i32[B,P,2] row and column of each patch.
      width: D, a multiple of 4.

    Returns:
      f32[B,P,D].
    """
    count = width // 4
    frequencies = 100.0 ** -(np.arange(count, dtype=np.float32) / count)
    angles = patch_hw[..., None].astype(jnp.float32) * frequencies
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # [B,P,2,D/2]
    return waves.reshape(*patch_hw.shape[:-1], width)


def from_scratch_tokens(x: jax.Array, mean: jax.Array, positions: jax.Array) -> jax.Array:
    """Embedded patches of a tower from scratch: x minus the mean of its image, times 3, placed.

    Args:
      x: [...,D] embedded patches.
      mean: f32[...,D] of their images.
      positions: f32[...,D] of `absolute_positions`.

    Returns:
      Like ``x``.
    """
    return (_CONTRAST * (x - mean) + positions).astype(x.dtype)
