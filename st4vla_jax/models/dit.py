"""Diffusion Transformer over an action chunk (upstream DiT_modules): condition tokens in front.

A plain pre-norm transformer: no adaLN, no gating, no mask.  The timestep enters only through the
condition tokens.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from st4vla_jax.config import DitConfig, Runtime
from st4vla_jax.models.layers import (
    Linear,
    Stack,
    boxed,
    fan_init,
    layer_norm,
    normal_init,
    scan_blocks,
)
from st4vla_jax.models.vit import Mlp, SelfAttention, constrain_tokens, token_example

MAX_PERIOD = 10_000.0

_xavier = functools.partial(fan_init, "xavier")


def timestep_features(t: jax.Array, size: int) -> jax.Array:
    """Sinusoids of the raw step index: i32[...] -> f32[...,size], cosines first."""
    half = size // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) / half * jnp.arange(half, dtype=jnp.float32))
    angles = t[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _linear(cfg: DitConfig, rt: Runtime, num_in: int, name: str, init=None) -> Linear:
    """Linear num_in -> D in the action dtype, N(0, 0.02) unless ``init`` is given."""
    return Linear(
        (num_in,), (cfg.hidden_size,), (None, "dit_embed"), kernel_init=init or normal_init(0.02),
        dtype=rt.dtypes.action, param_dtype=rt.dtypes.params, name=name,
    )  # fmt: skip


class TimestepEmbedder(nn.Module):
    """mlp_2(silu(mlp_0(sinusoids)))."""

    cfg: DitConfig
    rt: Runtime

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """i32[...] -> [...,D]."""
        cfg, rt = self.cfg, self.rt
        x = timestep_features(t, cfg.frequency_size)
        x = jax.nn.silu(_linear(cfg, rt, cfg.frequency_size, "mlp_0")(x))
        return _linear(cfg, rt, cfg.hidden_size, "mlp_2")(x)


class ConditionEmbedder(nn.Module):
    """Linear map of the condition, and the learned condition that stands for "none"."""

    cfg: DitConfig
    rt: Runtime

    def setup(self):
        cfg = self.cfg
        self.uncondition = self.param(
            "uncondition",
            boxed(normal_init(0.02), (None, "dit_embed")),
            (cfg.num_condition_tokens, cfg.hidden_size),
            self.rt.dtypes.params,
        )
        self.linear = _linear(cfg, self.rt, cfg.hidden_size, "linear")

    def __call__(self, condition: jax.Array, drop: jax.Array | None) -> jax.Array:
        condition = condition.astype(self.rt.dtypes.action)
        if drop is not None:
            nothing = self.uncondition.astype(condition.dtype)
            condition = jnp.where(drop[..., None, None], nothing, condition)
        return self.linear(condition)


class DitBlock(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)); norms without parameters, GELU in tanh form."""

    cfg: DitConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, rt = self.cfg, self.rt
        kwargs = {
            "dtype": rt.dtypes.action, "param_dtype": rt.dtypes.params, "kernel_init": _xavier,
        }  # fmt: skip
        attn = SelfAttention(cfg.hidden_size, cfg.num_heads, "dit", name="attn", **kwargs)
        hidden = cfg.mlp_ratio * cfg.hidden_size
        mlp = Mlp(cfg.hidden_size, hidden, "dit", True, name="mlp", **kwargs)
        x = constrain_tokens(x, rt.rules)
        x = x + attn(layer_norm(x, cfg.norm_eps))
        x = x + mlp(layer_norm(x, cfg.norm_eps))
        return constrain_tokens(x, rt.rules)


class FinalLayer(nn.Module):
    """Norm without parameters, then a zero-initialised linear: the first prediction is 0."""

    cfg: DitConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtypes = self.cfg, self.rt.dtypes
        return Linear(
            (cfg.hidden_size,), (cfg.action_dim,), ("dit_embed", None),
            kernel_init=nn.initializers.zeros_init(),
            dtype=dtypes.action, param_dtype=dtypes.params, name="linear",
        )(layer_norm(x, cfg.norm_eps))  # fmt: skip


class DiT(nn.Module):
    """Predicts the noise in an action chunk; leading axes are free, the first one is the batch."""

    cfg: DitConfig
    rt: Runtime

    def setup(self):
        cfg, rt = self.cfg, self.rt
        size = cfg.hidden_size
        self.positional_embedding = self.param(
            "positional_embedding",
            boxed(normal_init(size**-0.5), (None, "dit_embed")),
            (cfg.num_condition_tokens + cfg.chunk, size),
            rt.dtypes.params,
        )
        self.x_embedder = _linear(cfg, rt, cfg.action_dim, "x_embedder")
        self.t_embedder = TimestepEmbedder(cfg, rt)
        self.z_embedder = ConditionEmbedder(cfg, rt)
        block = DitBlock(cfg, rt, parent=None)
        self.blocks = Stack(block, cfg.depth, (token_example(size, rt.dtypes.action),))
        self.final_layer = FinalLayer(cfg, rt)

    def __call__(
        self, x: jax.Array, t: jax.Array, condition: jax.Array, drop: jax.Array | None = None
    ) -> jax.Array:
        """Noise prediction f32[...,C,A].

        Args:
          x: [...,C,A] noisy actions.
          t: i32[...] diffusion step of each chunk, 0 .. diffusion_steps - 1.
          condition: [...,Q,D]; leading axes broadcast against those of ``x``.
          drop: bool[...], True replaces the whole condition by the learned `unconditional`
            (training of classifier-free guidance); None drops nothing.
        """
        return self.denoise(x, t, self.embed_condition(condition, drop))

    def embed_condition(self, condition: jax.Array, drop: jax.Array | None = None) -> jax.Array:
        """Condition [...,Q,D] -> [...,Q,D] as `denoise` takes it; the same at every step."""
        return self.z_embedder(condition, drop)

    def unconditional(self) -> jax.Array:
        """The learned condition [Q,D] that stands for "none"."""
        return self.z_embedder.uncondition

    def embed_timestep(self, t: jax.Array) -> jax.Array:
        """i32[...] -> [...,D]."""
        return self.t_embedder(t)

    def denoise(self, x: jax.Array, t: jax.Array, embedded: jax.Array) -> jax.Array:
        """Noise prediction f32[...,C,A] from an embedded condition [...,Q,D]."""
        cfg, rt = self.cfg, self.rt
        condition = embedded + self.embed_timestep(t)[..., None, :]
        actions = self.x_embedder(x)
        shape = (*actions.shape[:-2], cfg.num_condition_tokens, cfg.hidden_size)
        tokens = jnp.concatenate([jnp.broadcast_to(condition, shape), actions], axis=-2)
        tokens = tokens + self.positional_embedding.astype(tokens.dtype)
        block = DitBlock(cfg, rt, parent=None)

        def body(tokens, params):
            with jax.named_scope("dit_block"):
                return block.apply({"params": params}, tokens)

        tokens = scan_blocks(body, tokens, self.blocks(), rt.remat)
        out = self.final_layer(tokens[..., cfg.num_condition_tokens :, :])
        return out.astype(jnp.float32)
