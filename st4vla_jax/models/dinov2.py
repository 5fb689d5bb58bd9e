"""DINOv2 image encoder (torch.hub facebookresearch/dinov2, no registers): S, B, L and g."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from st4vla_jax.config import DinoConfig, Runtime
from st4vla_jax.models.layers import LayerNorm, Linear, Stack, boxed, normal_init, scan_blocks
from st4vla_jax.models.vit import (
    Mlp,
    SelfAttention,
    absolute_positions,
    constrain_tokens,
    from_scratch_tokens,
    token_example,
)

# ImageNet statistics of the RGB channels in [0, 1], as DINOv2 was trained with.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def normalize_pixels(images: jax.Array) -> jax.Array:
    """u8[...,h,w,3] RGB -> f32, ImageNet-normalised."""
    pixels = images.astype(jnp.float32) / 255
    return (pixels - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)


def cubic_weights(source: int, target: int) -> np.ndarray:
    """Weights f32[target,source] of the hub model's one-dimensional grid resize.

    Bicubic (a = -0.75) without antialias, border clamped.  The scale is (target + 0.1) / source,
    not target / source: the hub adds 0.1 against a rounding of the size and passes the factor on
    to the interpolation, so that its coordinates are a little denser than HF Dinov2Model's.
    """
    a = -0.75
    coordinate = (np.arange(target) + 0.5) * source / (target + 0.1) - 0.5
    base = np.floor(coordinate)
    weights = np.zeros((target, source))
    for tap in (-1, 0, 1, 2):
        d = np.abs(coordinate - base - tap)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        index = np.clip(base + tap, 0, source - 1).astype(int)
        np.add.at(weights, (np.arange(target), index), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


def resize_positions(pos_embed: jax.Array, grid: int) -> jax.Array:
    """Position embedding [1+g0*g0,D] (class token first) -> f32[1+grid*grid,D]."""
    rows, size = pos_embed.shape
    source = round((rows - 1) ** 0.5)
    pos_embed = pos_embed.astype(jnp.float32)
    if grid == source:
        return pos_embed
    weights = cubic_weights(source, grid)
    table = pos_embed[1:].reshape(source, source, size)
    table = jnp.einsum("ip,pqd->iqd", weights, table, precision=jax.lax.Precision.HIGHEST)
    table = jnp.einsum("jq,iqd->ijd", weights, table, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([pos_embed[:1], table.reshape(grid * grid, size)])


def _init(num_in: int) -> nn.initializers.Initializer:
    del num_in  # a fixed width, whatever the fan
    return normal_init(0.02)


def _unit_gain(num_in: int) -> nn.initializers.Initializer:
    """0.02 fits widths of hundreds: at 96 it makes every block nearly the identity."""

    def init(key, shape, dtype=jnp.float32):
        return math.prod(shape[:num_in]) ** -0.5 * jax.random.normal(key, shape, dtype)

    return init


class LayerScale(nn.Module):
    """x * gamma, one factor a channel."""

    cfg: DinoConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param(
            "gamma",
            boxed(nn.initializers.ones_init(), ("dino_embed",)),
            (self.cfg.hidden_size,),
            self.rt.dtypes.params,
        )
        return x * gamma.astype(x.dtype)


class SwiGlu(nn.Module):
    """w3(silu(x1) * x2) with [x1, x2] = w12(x) (hub SwiGLUFFNFused); kernel of w12 [D,2,F]."""

    cfg: DinoConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtypes = self.cfg, self.rt.dtypes
        size, hidden = (cfg.hidden_size,), (cfg.mlp_size,)
        kwargs = {"dtype": dtypes.compute, "param_dtype": dtypes.params}
        names = ("dino_embed", None, "dino_mlp")
        both = Linear(size, (2, *hidden), names, name="w12", **kwargs)(x)
        gated = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
        return Linear(hidden, size, ("dino_mlp", "dino_embed"), name="w3", **kwargs)(gated)


class DinoBlock(nn.Module):
    """x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))."""

    cfg: DinoConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, rt = self.cfg, self.rt
        kwargs = {"dtype": rt.dtypes.compute, "param_dtype": rt.dtypes.params}
        kwargs["kernel_init"] = _unit_gain if cfg.from_scratch else _init
        attn = SelfAttention(cfg.hidden_size, cfg.num_heads, "dino", name="attn", **kwargs)
        if cfg.swiglu:
            mlp = SwiGlu(cfg, rt, name="mlp")
        else:
            mlp = Mlp(cfg.hidden_size, cfg.mlp_size, "dino", False, name="mlp", **kwargs)
        x = constrain_tokens(x, rt.rules)
        x = x + LayerScale(cfg, rt, name="ls1")(attn(self._norm("norm1")(x)))
        x = x + LayerScale(cfg, rt, name="ls2")(mlp(self._norm("norm2")(x)))
        return constrain_tokens(x, rt.rules)

    def _norm(self, name: str) -> LayerNorm:
        cfg = self.cfg
        dtype = self.rt.dtypes.params
        return LayerNorm(cfg.hidden_size, "dino_embed", cfg.norm_eps, dtype, name=name)


class PatchEmbed(nn.Module):
    """One linear map of each patch, flattened (channel, row, column) as in the Conv2d kernel."""

    cfg: DinoConfig
    rt: Runtime

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """f32[...,h,w,3] -> [...,(h/14)*(w/14),D]."""
        cfg, dtypes = self.cfg, self.rt.dtypes
        side = cfg.patch_size
        *lead, height, width, channels = pixels.shape
        rows, cols = height // side, width // side
        x = pixels.reshape(*lead, rows, side, cols, side, channels)
        # [..., rows, y, cols, x, c] -> [..., rows, cols, c, y, x]
        axes = [len(lead) + i for i in (0, 2, 4, 1, 3)]
        x = x.transpose(*range(len(lead)), *axes).reshape(*lead, rows * cols, channels * side**2)
        return Linear(
            (channels * side**2,), (cfg.hidden_size,), (None, "dino_embed"),
            dtype=dtypes.compute, param_dtype=dtypes.params, name="proj",
        )(x)  # fmt: skip


class DinoV2(nn.Module):
    """DINOv2; leading axes of the images are free, the first one is the batch."""

    cfg: DinoConfig
    rt: Runtime

    def setup(self):
        cfg, dtypes = self.cfg, self.rt.dtypes
        rows = 1 + (cfg.pretrain_size // cfg.patch_size) ** 2
        self.cls_token = self.param(
            "cls_token",
            boxed(normal_init(1e-6), ("dino_embed",)),
            (cfg.hidden_size,),
            dtypes.params,
        )
        self.pos_embed = self.param(
            "pos_embed",
            boxed(normal_init(0.02), (None, "dino_embed")),
            (rows, cfg.hidden_size),
            dtypes.params,
        )
        self.patch_embed = PatchEmbed(cfg, self.rt)
        block = DinoBlock(cfg, self.rt, parent=None)
        example = token_example(cfg.hidden_size, dtypes.compute)
        self.blocks = Stack(block, cfg.depth, (example,))
        self.norm = LayerNorm(cfg.hidden_size, "dino_embed", cfg.norm_eps, dtypes.params)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Patch tokens after the final norm, class token dropped.

        Args:
          images: u8[...,h,h,3] RGB; h is a multiple of 14.

        Returns:
          [...,(h/14)^2,D] in the compute dtype.

        Raises:
          ValueError: the images are not square or their side is not a multiple of the patch.
        """
        return self.features(normalize_pixels(images))[1]

    def features(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalised pixels f32[...,h,h,3] -> (class token [...,D], patch tokens [...,t,D])."""
        cfg, rt = self.cfg, self.rt
        height, width = pixels.shape[-3:-1]
        if height != width or height % cfg.patch_size or not height:
            raise ValueError(
                f"DINOv2 takes square images with a side that is a multiple of {cfg.patch_size}, "
                f"not {height}x{width}; resize or crop them first"
            )
        patches = self.patch_embed(pixels)
        if cfg.from_scratch:
            patches = self._stem(patches, (height // cfg.patch_size, width // cfg.patch_size))
        cls = jnp.broadcast_to(self.cls_token, (*patches.shape[:-2], 1, cfg.hidden_size))
        x = jnp.concatenate([cls.astype(patches.dtype), patches], axis=-2)
        x = x + resize_positions(self.pos_embed, height // cfg.patch_size)  # the sum is in f32
        block = DinoBlock(cfg, rt, parent=None)

        def body(x, params):
            with jax.named_scope("dino_block"):
                return block.apply({"params": params}, x)

        x = scan_blocks(body, x.astype(rt.dtypes.compute), self.blocks(), rt.remat)
        x = self.norm(x)
        return x[..., 0, :], x[..., 1:, :]

    def _stem(self, patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """`qwen_vision.from_scratch_stem` over whole images: [...,t,D] -> [...,t,D]."""
        places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)
        positions = absolute_positions(jnp.asarray(places), self.cfg.hidden_size)
        mean = patches.astype(jnp.float32).mean(-2, keepdims=True)
        return from_scratch_tokens(patches, mean, positions)
