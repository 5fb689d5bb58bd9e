"""Qwen2.5-VL vision tower over packed images (HF Qwen2_5_VisionTransformerPretrainedModel).

Patches arrive in window order (data/image.py): every window lies within one bin of 64 slots, and
the four patches of a merged cell are neighbours.  So windowed attention is a reshape to bins, and
nothing is permuted on the device.  Legend in batch.py; W = P / 64 bins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from st4vla_jax.batch import VISION_BIN
from st4vla_jax.config import Runtime, VisionConfig
from st4vla_jax.data.image import IMAGE_MEAN, IMAGE_STD
from st4vla_jax.models.attention import attention, platform, segment_mask
from st4vla_jax.models.layers import (
    REMAT_POLICIES,
    Linear,
    Params,
    RMSNorm,
    Stack,
    boxed,
    layer_slice,
    normal_init,
    scan_blocks,
)
from st4vla_jax.models.mrope import rotate
from st4vla_jax.models.vit import absolute_positions, from_scratch_tokens
from st4vla_jax.sharding import constrain

Array = jax.Array

_TILE = 64
# Names of what rematerialisation may keep.
_BLOCK_INPUT, _MLP_PRODUCT = "vision_block_input", "vision_mlp_product"


def normalize_patches(patches: Array) -> Array:
    """u8[...,588] pixels, flat (channel, row, column), to f32 with CLIP's mean 0 and variance 1."""
    pixels = patches.shape[-1] // len(IMAGE_MEAN)
    mean, std = (np.repeat(np.float32(v), pixels) for v in (IMAGE_MEAN, IMAGE_STD))
    return (patches.astype(jnp.float32) / 255 - mean) / std


def rotary_tables(patch_hw: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """2-D rotary tables (HF Qwen2_5_VLVisionRotaryEmbedding).

    The first quarter of the head's frequencies turns with the row, the second with the column; the
    other half of the head repeats them.

    Args:
      patch_hw: i32[B,P,2] row and column of each patch.
      head_dim: H.
      theta: base of the frequencies.

    Returns:
      cos and sin, f32[B,P,H/2].
    """
    half = head_dim // 2
    frequencies = theta ** -(np.arange(0, half, 2, dtype=np.float32) / half)
    angles = patch_hw[..., None].astype(jnp.float32) * frequencies
    angles = angles.reshape(*patch_hw.shape[:-1], half)
    return jnp.cos(angles), jnp.sin(angles)


def from_scratch_stem(x: Array, patch_hw: Array, patch_image: Array) -> Array:
    """Embedded patches minus the mean of their image, times 3, plus `absolute_positions`.

    A fresh tower's features are nearly constant: the background outweighs the few patches that show
    something, and the first updates, which learn how answers are written, teach the language model
    to look past images.  Measured on the tabletop's generic pictures, updates of 32: with positions
    alone no places were learned in 1000, with this and `linear`'s initialisation from 300 on.

    Args:
      x: [B,P,D].
      patch_hw: i32[B,P,2].
      patch_image: i32[B,P].

    Returns:
      [B,P,D].
    """
    same = (patch_image[:, :, None] == patch_image[:, None]).astype(jnp.float32)
    mean = same @ x.astype(jnp.float32) / same.sum(-1, keepdims=True)
    return from_scratch_tokens(x, mean, absolute_positions(patch_hw, x.shape[-1]))


def block_groups(depth: int, full_indexes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Run-length form of the pattern of windowed and full-attention blocks.

    Returns:
      (windowed, full, repeats) triples in order: ``repeats`` times ``windowed`` blocks followed by
      ``full`` (0 or 1) block.  Qwen2.5-VL's 32 blocks are [(7, 1, 4)].
    """
    groups, start = [], 0
    for index in sorted(set(full_indexes)):
        groups.append((index - start, 1))
        start = index + 1
    if start < depth:
        groups.append((depth - start, 0))
    return [(*group, len(list(run))) for group, run in itertools.groupby(groups)]


class PatchKernel(nn.Module):
    """Bias-free patch projection with kernel [2,588,D], applied to a still image.

    Both frames of a still image are equal, so the kernel is summed over time, in f32
    (DESIGN.md D8).
    """

    cfg: VisionConfig
    rt: Runtime

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """[B,P,588] f32 -> [B,P,D] in the compute dtype."""
        cfg, dtypes = self.cfg, self.rt.dtypes
        shape = (cfg.temporal_patch_size, patches.shape[-1], cfg.hidden_size)
        init = boxed(normal_init(0.02), (None, None, "vision_embed"))
        kernel = self.param("kernel", init, shape, dtypes.params)
        kernel = jnp.sum(kernel, axis=0, dtype=jnp.float32).astype(dtypes.compute)
        return patches.astype(dtypes.compute) @ kernel


class PatchEmbed(nn.Module):
    """HF Qwen2_5_VisionPatchEmbed, from u8 pixels."""

    cfg: VisionConfig
    rt: Runtime

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """u8[B,P,588] -> [B,P,D]."""
        return PatchKernel(self.cfg, self.rt, name="proj")(normalize_patches(patches))


class VisionAttention(nn.Module):
    """HF Qwen2_5_VLVisionAttention; the shape of the segment ids says who attends to whom."""

    cfg: VisionConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self, x: Array, cos: Array, sin: Array, segments: Array, mask: Array | None = None
    ) -> Array:
        """Attends among equal segment ids.

        Args:
          x: [B,P,D].
          cos: f32[B,P,H/2] from `rotary_tables`.
          sin: f32[B,P,H/2].
          segments: i32[B,P] over the row or i32[B,W,64] within bins.
          mask: `segment_mask` of the segments.

        Returns:
          [B,P,D].
        """
        cfg, rt = self.cfg, self.rt
        heads = (cfg.num_heads, cfg.head_dim)
        names = ("vision_heads", "head_dim")
        qkv = linear(
            cfg, rt, "qkv", (cfg.hidden_size,), (3, *heads), ("vision_embed", None, *names)
        )(x)
        qkv = constrain(qkv, rt.rules, "batch", "act_seq", None, "act_heads", "head_dim")
        qk = rotate(qkv[:, :, :2], (cos, sin))
        parts = (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2])
        q, k, v = (part.reshape(*segments.shape, *heads) for part in parts)
        out = attention(
            q, k, v, q_segments=segments, kv_segments=segments, query_chunk=rt.query_chunk,
            kernel=rt.attention, mask=mask, rules=rt.rules,
        )  # fmt: skip
        out = out.reshape(*x.shape[:2], *heads)
        return linear(cfg, rt, "proj", heads, (cfg.hidden_size,), (*names, "vision_embed"))(out)


def mlp_padding(width: int) -> int:
    """Columns of zeros that bring the MLP's width to whole tiles on GPUs.

    Qwen2.5-VL's 3420 is no multiple of 8: on an H200 its products took 185 of a step's 988 ms,
    in kernels of an older architecture (traced at 3B, 100 samples).
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.shape.get("tensor", 1) > 1  # padding would move what is split
    return 0 if split or platform() != "gpu" else -width % _TILE


class VisionMlp(nn.Module):
    """SwiGLU with biases (HF Qwen2_5_VLMLP)."""

    cfg: VisionConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,P,D] -> [B,P,D]."""
        wide, narrow = (self.cfg.intermediate_size,), (self.cfg.hidden_size,)
        up_axes, pad = ("vision_embed", "vision_mlp"), mlp_padding(self.cfg.intermediate_size)
        gate = linear(self.cfg, self.rt, "gate_proj", narrow, wide, up_axes, pad_out=pad)(x)
        up = linear(self.cfg, self.rt, "up_proj", narrow, wide, up_axes, pad_out=pad)(x)
        gate, up = (checkpoint_name(y, _MLP_PRODUCT) for y in (gate, up))
        hidden = constrain(nn.silu(gate) * up, self.rt.rules, "batch", "act_seq", "act_mlp")
        return linear(self.cfg, self.rt, "down_proj", wide, narrow, up_axes[::-1], pad_in=pad)(
            hidden
        )


class VisionBlock(nn.Module):
    """Pre-norm block (HF Qwen2_5_VLVisionBlock)."""

    cfg: VisionConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self, x: Array, cos: Array, sin: Array, segments: Array, mask: Array | None = None
    ) -> Array:
        """Arguments and result as `VisionAttention`."""
        cfg, rt = self.cfg, self.rt
        x = constrain(x, rt.rules, "batch", "act_seq", "act_embed")
        y = norm(cfg, rt, "norm1")(x)
        x = x + VisionAttention(cfg, rt, name="attn")(y, cos, sin, segments, mask)
        x = x + VisionMlp(cfg, rt, name="mlp")(norm(cfg, rt, "norm2")(x))
        return constrain(x, rt.rules, "batch", "act_seq", "act_embed")


class PatchMerger(nn.Module):
    """Joins the four patches of a cell to one token (HF Qwen2_5_VLPatchMerger)."""

    cfg: VisionConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,P,D] -> [B,P/4,out_hidden_size]."""
        cfg, rt = self.cfg, self.rt
        merged, out = (cfg.merged_size,), (cfg.out_hidden_size,)
        x = norm(cfg, rt, "ln_q")(x)
        x = x.reshape(x.shape[0], x.shape[1] // cfg.spatial_merge_size**2, cfg.merged_size)
        x = linear(cfg, rt, "mlp_0", merged, merged, ("vision_merged", "vision_merger_mlp"))(x)
        x = constrain(x, rt.rules, "batch", "act_seq", "act_mlp")
        x = jax.nn.gelu(x, approximate=False)
        x = linear(cfg, rt, "mlp_2", merged, out, ("vision_merger_mlp", "embed"))(x)
        return constrain(x, rt.rules, "batch", "act_seq", "act_embed")


class VisionTower(nn.Module):
    """Features of packed images, one for each merged cell."""

    cfg: VisionConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self, patches: Array, patch_hw: Array, patch_image: Array, patch_window: Array
    ) -> Array:
        """Encodes B rows of P slots; slots with id 0 are padding and give unused features.

        Args:
          patches: u8[B,P,588] pixels, flat (channel, row, column); P is a multiple of 64 or 0.
          patch_hw: i32[B,P,2] row and column in the image's patch grid.
          patch_image: i32[B,P] image number within the row.
          patch_window: i32[B,P] window number, unique within a bin of 64 slots.

        Returns:
          [B,P/4,out_hidden_size] in the compute dtype; slot // 4 is the cell.

        Raises:
          ValueError: P is not a multiple of 64.
        """
        cfg, rt = self.cfg, self.rt
        if patches.shape[1] % VISION_BIN:
            raise ValueError(f"{patches.shape[1]} vision slots are not a multiple of {VISION_BIN}")
        x = PatchEmbed(cfg, rt, name="patch_embed")(patches)
        if cfg.from_scratch:
            x = from_scratch_stem(x, patch_hw, patch_image)
        block = VisionBlock(cfg, rt, parent=None)
        stack = Stack(block, cfg.depth, self._block_example(), name="blocks")()
        if patches.shape[1]:  # a batch without images must not gather the blocks' weights
            cos, sin = rotary_tables(patch_hw, cfg.head_dim, cfg.rope_theta)
            x = self._run_blocks(block, stack, x, (cos, sin), patch_image, patch_window)
        return PatchMerger(cfg, rt, name="merger")(x)

    def _block_example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        lead = (1, 1)
        table = jax.ShapeDtypeStruct((*lead, self.cfg.head_dim // 2), jnp.float32)
        x = jax.ShapeDtypeStruct((*lead, self.cfg.hidden_size), self.rt.dtypes.compute)
        return x, table, table, jax.ShapeDtypeStruct(lead, jnp.int32)

    def _run_blocks(
        self,
        block: VisionBlock,
        stack: Params,
        x: Array,
        tables: tuple[Array, Array],
        patch_image: Array,
        patch_window: Array,
    ) -> Array:
        """Scans each run of equal groups: windowed blocks, by an inner scan, then a full one."""
        cfg, policy = self.cfg, self.rt.remat
        bins = patch_window.reshape(patch_window.shape[0], -1, VISION_BIN)
        windowed_block = _block_step(block, tables, bins, "vision_windowed_block")
        full_block = _block_step(block, tables, patch_image, "vision_full_block")
        start = 0
        for windowed, full, repeats in block_groups(cfg.depth, cfg.fullatt_block_indexes):
            size = windowed + full

            def group(x, params, windowed=windowed, full=full):
                if windowed:
                    inner = layer_slice(params, 0, windowed)
                    x = scan_blocks(windowed_block, x, inner, "none")
                if full:
                    x = full_block(x, jax.tree.map(lambda p: p[windowed], params))
                return x

            params = layer_slice(stack, start, start + size * repeats)
            params = jax.tree.map(lambda p, n=size: p.reshape(-1, n, *p.shape[1:]), params)
            x = scan_blocks(_remat_group(group, policy), x, params, "none")
            start += size * repeats
        return x


def _block_step(
    block: VisionBlock, tables: tuple[Array, Array], segments: Array, scope: str
) -> Callable[[Array, Params], Array]:
    """(x, parameters of one block) -> x, rematerialised; its input is what a group keeps."""
    cfg, rt = block.cfg, block.rt
    mask = segment_mask(rt.attention, rt.dtypes.compute, cfg.head_dim, segments, segments)

    def apply(x, params):
        with jax.named_scope(scope):
            return block.apply({"params": params}, x, *tables, segments, mask)

    if rt.remat != "none":
        apply = jax.checkpoint(apply, policy=_kept(rt.remat), prevent_cse=False)
    return lambda x, params: apply(checkpoint_name(x, _BLOCK_INPUT), params)


def _remat_group(group: Callable, policy: str) -> Callable:
    """Rematerialises everything of a group but its blocks' inputs and what the policy keeps.

    The blocks are rematerialised already, and this costs no FLOP more.  But the inner scan takes
    slices of the group's parameters, and the outer scan would keep them for the backward pass: a
    copy of the whole tower.
    """
    if policy == "none":
        return group
    inputs = jax.checkpoint_policies.save_only_these_names(_BLOCK_INPUT)
    keep = jax.checkpoint_policies.save_from_both_policies(inputs, _kept(policy))
    return jax.checkpoint(group, policy=keep, prevent_cse=False)


def _kept(policy: str) -> Callable:
    """What a block keeps for its backward pass, by a name in REMAT_POLICIES."""
    if policy == "dots_decoder_mlp":
        return jax.checkpoint_policies.save_only_these_names(_MLP_PRODUCT)
    return REMAT_POLICIES[policy]


def linear(
    cfg: VisionConfig,
    rt: Runtime,
    name: str,
    inputs: tuple,
    outputs: tuple,
    axes: tuple,
    **padding: int,
) -> Linear:
    """Linear in this tower's precision, bound to the calling module under ``name``."""
    # 0.02 fits widths of thousands: at 96 it makes every block nearly the identity.
    std = math.prod(inputs) ** -0.5 if cfg.from_scratch else 0.02
    return Linear(
        inputs, outputs, axes, dtype=rt.dtypes.compute, param_dtype=rt.dtypes.params,
        kernel_init=normal_init(std), name=name, **padding,
    )  # fmt: skip


def norm(cfg: VisionConfig, rt: Runtime, name: str) -> RMSNorm:
    """RMSNorm over the width, bound to the calling module under ``name``."""
    return RMSNorm(cfg.hidden_size, "vision_embed", cfg.rms_norm_eps, rt.dtypes.params, name=name)
