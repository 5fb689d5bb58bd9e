"""The Qwen2.5 decoder over packed sequences, with taps on its hidden states and a KV cache.

Source: HF Qwen2_5_VLTextModel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from st4vla_jax.config import Runtime, TextConfig
from st4vla_jax.models import kv_cache
from st4vla_jax.models.attention import attention, segment_mask
from st4vla_jax.models.kv_cache import KVCache
from st4vla_jax.models.layers import (
    Embed,
    Linear,
    Params,
    RMSNorm,
    Stack,
    decoder_policy,
    layer_slice,
    remat,
    scan_blocks,
    take_rows,
)
from st4vla_jax.models.mrope import RotaryTables, rotary_tables, rotate
from st4vla_jax.models.prefetch import Layout, scan_prefetched
from st4vla_jax.sharding import constrain, is_sharded

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tap:
    """A computation that rides along the decoder and reads a range of its hidden states.

    Hidden-state ids are HF's: 0 = embeddings, i = output of block i (counted from 1), last =
    num_hidden_layers = after the final norm (the last block's raw output has no id).

    Attributes:
      start, end: half-open range of ids.
      xs: pytree with leading axis end - start; one slice is handed to ``fn`` for each id.
      carry: initial carry.
      fn: (carry, x, hidden [B,T,D]) -> carry, called in order of the ids.
    """

    start: int
    end: int
    xs: Any
    carry: Any
    fn: Callable[[Any, Any, Array], Any]

    def at(self, carry: Any, index: int, hidden: Array) -> Any:
        """Applies ``fn`` with the slice of hidden-state id ``index``."""
        return self.fn(carry, jax.tree.map(lambda x: x[index - self.start], self.xs), hidden)


@struct.dataclass
class LmOutput:
    """What a forward pass returns.

    Attributes:
      hidden: [B,T,D] after the final norm, in the compute dtype.
      carry: the tap's final carry; None without a tap.
      cache: the extended cache; None without a cache.
    """

    hidden: Array
    carry: Any = None
    cache: KVCache | None = None


class SelfAttention(nn.Module):
    """Grouped-query attention with biased q/k/v and mRoPE (HF Qwen2_5_VLAttention)."""

    cfg: TextConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self,
        x: Array,
        rope: RotaryTables,
        segment_ids: Array,
        cache: KVCache | None = None,
        layer: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Maps x [B,T,D] to ([B,T,D], cache with this layer's new keys and values)."""
        cfg, rt = self.cfg, self.rt
        linear = partial(Linear, dtype=rt.dtypes.compute, param_dtype=rt.dtypes.params)
        heads, groups = cfg.num_attention_heads, cfg.num_key_value_heads

        def project(name: str, num: int, axis: str) -> Array:
            shape, axes = (num, cfg.head_dim), ("embed", axis, "head_dim")
            y = linear((cfg.hidden_size,), shape, axes, name=name)(x)
            return constrain(y, rt.rules, "batch", "act_seq", f"act_{axis}", None)

        q = rotate(project("q_proj", heads, "heads"), rope)
        k = rotate(project("k_proj", groups, "kv_heads"), rope)
        v = project("v_proj", groups, "kv_heads")
        kv_segments, offset = segment_ids, 0
        if cache is not None:
            cache = kv_cache.append_layer(cache, layer, k, v)
            k, v = kv_cache.read_layer(cache, layer)
            kv_segments, offset = cache.segment_ids, cache.length
        out = attention(
            q, k, v, q_segments=segment_ids, kv_segments=kv_segments, causal=True,
            q_offset=offset, query_chunk=rt.query_chunk, kernel=rt.attention, mask=mask,
            rules=rt.rules,
        )  # fmt: skip
        out = constrain(out, rt.rules, "batch", "act_seq", "act_heads", None)
        out = linear(
            (heads, cfg.head_dim), (cfg.hidden_size,), ("heads", "head_dim", "embed"),
            use_bias=False, name="o_proj",
        )(out)  # fmt: skip
        # Padding gets nothing from attention, as on upstream's unpadded path (spec 1.6).
        return jnp.where((segment_ids > 0)[..., None], out, 0), cache


class GatedMlp(nn.Module):
    """SwiGLU without biases (HF Qwen2MLP)."""

    cfg: TextConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, rt = self.cfg, self.rt
        linear = partial(
            Linear, dtype=rt.dtypes.compute, param_dtype=rt.dtypes.params, use_bias=False
        )
        width, inner = (cfg.hidden_size,), (cfg.intermediate_size,)
        gate = linear(width, inner, ("embed", "mlp"), name="gate_proj")(x)
        up = linear(width, inner, ("embed", "mlp"), name="up_proj")(x)
        y = constrain(jax.nn.silu(gate) * up, rt.rules, "batch", "act_seq", "act_mlp")
        return linear(inner, width, ("mlp", "embed"), name="down_proj")(y)


class DecoderBlock(nn.Module):
    """Pre-norm attention and MLP with residuals (HF Qwen2_5_VLDecoderLayer)."""

    cfg: TextConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self,
        x: Array,
        rope: RotaryTables,
        segment_ids: Array,
        cache: KVCache | None = None,
        layer: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        cfg, rt = self.cfg, self.rt
        norm = partial(
            RMSNorm, cfg.hidden_size, "embed", cfg.rms_norm_eps, param_dtype=rt.dtypes.params
        )
        with jax.named_scope("self_attn"):
            y, cache = SelfAttention(cfg, rt, name="self_attn")(
                norm(name="input_layernorm")(x), rope, segment_ids, cache, layer, mask
            )
            x = x + y
        with jax.named_scope("mlp"):
            x = x + GatedMlp(cfg, rt, name="mlp")(norm(name="post_attention_layernorm")(x))
        return constrain(x, rt.rules, "batch", "act_seq", "act_embed"), cache


class LanguageModel(nn.Module):
    """Token embeddings, decoder blocks and final norm; parameters as rules.text_rules."""

    cfg: TextConfig
    rt: Runtime

    def setup(self):
        cfg, rt = self.cfg, self.rt
        self.embed_tokens = Embed(
            cfg.vocab_size, cfg.hidden_size, param_dtype=rt.dtypes.params
        )  # fmt: skip
        f32, half = partial(jax.ShapeDtypeStruct, dtype=jnp.float32), cfg.head_dim // 2
        self.blocks = Stack(
            block=DecoderBlock(cfg, rt, parent=None),
            length=cfg.num_hidden_layers,
            example=(
                f32((1, 1, cfg.hidden_size)),
                (f32((1, 1, half)), f32((1, 1, half))),
                jax.ShapeDtypeStruct((1, 1), jnp.int32),
            ),
        )
        self.norm = RMSNorm(
            cfg.hidden_size, "embed", cfg.rms_norm_eps, param_dtype=rt.dtypes.params
        )

    def embed(self, tokens: Array) -> Array:
        """Embeddings [B,T,D] of token ids i32[B,T], in the compute dtype.

        An id outside the vocabulary gives NaN, not a neighbour's embedding.
        """
        table = self.embed_tokens().astype(self.rt.dtypes.compute)
        embeds = take_rows(table, tokens, self.rt.rules)
        return constrain(embeds, self.rt.rules, "batch", "act_seq", "act_embed")

    def __call__(
        self,
        embeds: Array,
        positions: Array,
        segment_ids: Array,
        *,
        tap: Tap | None = None,
        cache: KVCache | None = None,
    ) -> LmOutput:
        """Runs the decoder; a token attends to the tokens before it in its own segment.

        Args:
          embeds: [B,T,D].
          positions: i32[B,T,3] mRoPE ids.
          segment_ids: i32[B,T]; 0 = padding, whose attention output is zero.
          tap: rides along and reads hidden states.
          cache: earlier tokens of the same rows; the new tokens are appended.

        Raises:
          ValueError: the tap's ids are not hidden-state ids of this decoder.
        """
        cfg, depth = self.cfg, self.cfg.num_hidden_layers
        if tap is not None and not 0 <= tap.start < tap.end <= depth + 1:
            raise ValueError(
                f"tap reads hidden states {tap.start}..{tap.end} (half open); there are "
                f"{depth + 1}, with ids 0..{depth}"
            )
        rope = rotary_tables(positions, cfg.head_dim, cfg.mrope_section, cfg.rope_theta)
        if self.is_initializing():
            self.embed_tokens()  # the caller embeds; init creates the table all the same
        if cache is not None:
            cache = kv_cache.append_segments(cache, segment_ids)
        embeds = embeds.astype(self.rt.dtypes.compute)
        x = constrain(embeds, self.rt.rules, "batch", "act_seq", "act_embed")
        carry = None if tap is None else tap.carry
        if tap is not None and tap.start == 0:
            carry = tap.at(carry, 0, x)
        with jax.named_scope("blocks"):
            x, carry, cache = self._run_blocks(x, rope, segment_ids, tap, carry, cache)
        hidden = self.norm(x)
        if tap is not None and tap.end == depth + 1:
            carry = tap.at(carry, depth, hidden)
        if cache is not None:
            cache = kv_cache.advance(cache, embeds.shape[1])
        return LmOutput(hidden, carry, cache)

    def _run_blocks(self, x, rope, segment_ids, tap, carry, cache):
        """All blocks; those whose outputs the tap reads are scanned with the tap's slices."""
        depth = self.cfg.num_hidden_layers
        block = DecoderBlock(self.cfg, self.rt, parent=None)
        stack = self.blocks()
        mask = None
        if cache is None:
            mask = segment_mask(
                self.rt.attention, x.dtype, self.cfg.head_dim, segment_ids, segment_ids, True
            )

        rides = tap is not None and tap.start < depth and tap.end > 1
        if cache is None and not rides and self._prefetches(stack):
            return self._run_prefetched(block, stack, x, (rope, segment_ids, mask)), carry, cache

        def body(state, inputs):
            x, carry, cache = state
            params, layer, tap_x = inputs
            x, cache = block.apply({"params": params}, x, rope, segment_ids, cache, layer, mask)
            if tap_x is not None:
                carry = tap.fn(carry, tap_x, x)
            return x, carry, cache

        # Block i (from 0) outputs id i + 1, but the last block's raw output has no id.
        first = last = depth
        if rides:
            first, last = max(tap.start, 1) - 1, min(tap.end, depth) - 1
        state = (x, carry, cache)
        for start, stop in ((0, first), (first, last), (last, depth)):
            if start == stop:
                continue
            ridden = None
            if (start, stop) == (first, last):
                skip = start + 1 - tap.start
                ridden = jax.tree.map(lambda v, s=skip, n=stop - start: v[s : s + n], tap.xs)
            inputs = (layer_slice(stack, start, stop), jnp.arange(start, stop), ridden)
            state = scan_blocks(body, state, inputs, decoder_policy(self.rt.remat))
        return state

    def _prefetches(self, stack: Params) -> bool:
        """Whether weights are sharded, all of them a block's own (no adapters)."""
        return is_sharded() and len(jax.tree.leaves(stack)) == len(self.blocks.axes())

    def _run_prefetched(self, block: DecoderBlock, stack: Params, x: Array, consts: Any) -> Array:
        def apply(x, params, consts):
            rope, segment_ids, mask = consts
            return block.apply({"params": params}, x, rope, segment_ids, mask=mask)[0]

        policy = decoder_policy(self.rt.remat)
        return scan_prefetched(
            remat(apply, policy),
            x,
            stack,
            consts,
            Layout(self.blocks.axes(), self.rt.rules, self.rt.dtypes.compute),
            keep=policy == "full_keep_weights",
            # With its products kept, the MLP's gradients come before all that reads positions.
            early=policy == "dots",
        )
