"""The bridge from the language model to the action expert: gradient decay and Q-Former.

The heart of the policy: `scale_gradient` decides how much of the action loss reaches the VLM, and
the layer-wise Querying Transformer turns hidden states and DINO tokens into the DiT's condition.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from st4vla_jax.config import BridgeConfig, Runtime
from st4vla_jax.models.attention import attention
from st4vla_jax.models.layers import (
    Init,
    LayerNorm,
    Linear,
    Params,
    Stack,
    boxed,
    fan_init,
    normal_init,
    scan_blocks,
)
from st4vla_jax.models.vit import constrain_tokens, token_example
from st4vla_jax.sharding import unbox


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, scale: float, probe: jax.Array) -> jax.Array:
    """Identity whose gradient is multiplied by ``scale`` (paper: 0.5 from the expert to the VLM).

    differs: the released upstream code has the decay commented out, and there it would also act
    on the DINO tokens; here it acts on what it is given, the VLM's hidden states.

    Args:
      x: any array.
      scale: 1.0 leaves the gradient bit-equal, 0.0 stops it (also where it is not finite).
      probe: f32[] zero; its gradient is sum(g^2) of the gradient g before scaling, so that the
        norm of the bridge's gradient costs no second backward pass.
    """
    return x


def _scale_forward(x, scale, probe):
    return x, None


def _scale_backward(scale, _, g):
    squares = jnp.sum(jnp.square(g.astype(jnp.float32)))
    return (g * scale if scale else jnp.zeros_like(g)), squares


scale_gradient.defvjp(_scale_forward, _scale_backward)


def dropout(x: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout with one key for each sample: keys [...], x [...,*rest]."""

    def keep(key):
        return jax.random.bernoulli(key, 1 - rate, x.shape[keys.ndim :])

    for _ in range(keys.ndim):
        keep = jax.vmap(keep)
    return jnp.where(keep(keys), x / (1 - rate), 0).astype(x.dtype)


def fold_keys(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """`jax.random.fold_in` of one number into every key of an array of keys."""
    fold = jax.random.fold_in
    for _ in range(keys.ndim):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(keys, number)


def _symmetric_uniform(fan_in: int) -> Init:
    """nn.Linear's default for biases: U(+-1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _linear(rt: Runtime, num_in: int, num_out: int, axes: tuple, name: str | None = None) -> Linear:
    """Linear with nn.Linear's default initialisation, as upstream's Q-Former has it."""
    return Linear(
        (num_in,), (num_out,), axes, dtype=rt.dtypes.compute, param_dtype=rt.dtypes.params,
        kernel_init=fan_init("torch_linear", 1), bias_init=_symmetric_uniform(num_in), name=name,
    )  # fmt: skip


class InProjection(nn.Module):
    """Query, key and value maps in one kernel [D,3,N,H] (torch MultiheadAttention's in_proj)."""

    cfg: BridgeConfig
    rt: Runtime

    @nn.compact
    def __call__(self, query: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
        """Maps query [...,Q,D], keys [...,S,D] to q [...,Q,N,H], k and v [...,S,N,H]."""
        cfg, dtypes = self.cfg, self.rt.dtypes
        shape = (3, cfg.num_heads, cfg.hidden_size // cfg.num_heads)
        axes = (None, "bridge_heads", "head_dim")
        kernel = self.param(
            "kernel",
            boxed(fan_init("xavier", 1), ("bridge_embed", *axes)),
            (cfg.hidden_size, *shape),
            dtypes.params,
        ).astype(dtypes.compute)
        bias = self.param(
            "bias", boxed(nn.initializers.zeros_init(), axes), shape, dtypes.params
        ).astype(dtypes.compute)
        q = jnp.einsum("...qd,dnh->...qnh", query, kernel[:, 0]) + bias[0]
        kv = jnp.einsum("...kd,dsnh->...ksnh", keys, kernel[:, 1:]) + bias[1:]
        return q, kv[..., 0, :, :], kv[..., 1, :, :]


class CrossAttention(nn.Module):
    """Queries attend to the valid keys; dropout on the weights if keys for it are given."""

    cfg: BridgeConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        keys: jax.Array,
        mask: jax.Array | None,
        dropout_keys: jax.Array | None,
    ) -> jax.Array:
        cfg, dtypes = self.cfg, self.rt.dtypes
        q, k, v = InProjection(cfg, self.rt, name="in_proj")(query, keys)
        segments = {}
        if mask is not None:
            ones = jnp.ones(query.shape[:-1], jnp.int32)
            segments = {"q_segments": ones, "kv_segments": mask.astype(jnp.int32)}
        weights_fn = None
        if dropout_keys is not None:
            weights_fn = functools.partial(dropout, keys=dropout_keys, rate=cfg.dropout)
        out = attention(q, k, v, weights_fn=weights_fn, **segments)
        return Linear(
            out.shape[-2:], (cfg.hidden_size,), ("bridge_heads", "head_dim", "bridge_embed"),
            dtype=dtypes.compute, param_dtype=dtypes.params,
            kernel_init=fan_init("torch_linear", 2), name="out_proj",
        )(out)  # fmt: skip


class BridgeBlock(nn.Module):
    """query += attn(norm1(query), keys); query += dropout(mlp(norm2(query))).

    Keys and values are not normed, and no norm follows the last block (upstream QFormer.py).
    """

    cfg: BridgeConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        keys: jax.Array,
        mask: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        cfg, rt = self.cfg, self.rt
        attn_keys = mlp_keys = None
        if dropout_keys is not None:
            attn_keys, mlp_keys = fold_keys(dropout_keys, 0), fold_keys(dropout_keys, 1)
        size, hidden = cfg.hidden_size, cfg.mlp_ratio * cfg.hidden_size
        names = ("bridge_embed", "bridge_mlp")
        attn = CrossAttention(cfg, rt, name="cross_attn")
        x = query + attn(self._norm("norm1")(query), keys, mask, attn_keys)
        y = _linear(rt, size, hidden, names, "mlp_0")(self._norm("norm2")(x))
        y = _linear(rt, hidden, size, names[::-1], "mlp_2")(jax.nn.gelu(y, approximate=False))
        return x + (y if mlp_keys is None else dropout(y, mlp_keys, cfg.dropout))

    def _norm(self, name: str) -> LayerNorm:
        dtype = self.rt.dtypes.params
        return LayerNorm(self.cfg.hidden_size, "bridge_embed", param_dtype=dtype, name=name)


class StateEncoder(nn.Module):
    """Proprioception f32[...,S] -> one key token [...,1,D]: fc2(gelu(fc1(state))).

    differs: upstream's release has no state encoder; the paper calls it optional.
    """

    cfg: BridgeConfig
    rt: Runtime

    @nn.compact
    def __call__(self, state: jax.Array) -> jax.Array:
        cfg, rt = self.cfg, self.rt
        hidden = cfg.state_hidden_size
        x = _linear(rt, cfg.state_dim, hidden, (None, "bridge_mlp"), "fc1")(state)
        x = jax.nn.gelu(x, approximate=False)
        x = _linear(rt, hidden, cfg.hidden_size, ("bridge_mlp", "bridge_embed"), "fc2")(x)
        return x[..., None, :]


class Bridge(nn.Module):
    """Layer-wise Querying Transformer: hidden states and DINO tokens in, condition [...,Q,D] out.

    Leading axes are free ([B,K] in training), the first one is the batch.  To ride the language
    model's scan, call `encode`, `key_mask` and `queries` before it, scan the parameters "blocks"
    along and call `block` in its body; `__call__` does that over given hidden states.

    Attributes:
      vlm_size: width E of the language model; dino_size: width of DINOv2.
    """

    cfg: BridgeConfig
    vlm_size: int
    dino_size: int
    rt: Runtime

    def setup(self):
        cfg, rt = self.cfg, self.rt
        # The VLM's width stays whole here (None, not "embed"): both kernels are small.
        self.dino_proj = _linear(rt, self.dino_size, self.vlm_size, ("dino_embed", None))
        self.proj = _linear(rt, self.vlm_size, cfg.hidden_size, (None, "bridge_embed"))
        self.query_tokens = self.param(
            "query_tokens",
            boxed(normal_init(1.0), (None, "bridge_embed")),
            (cfg.num_queries, cfg.hidden_size),
            rt.dtypes.params,
        )
        example = token_example(cfg.hidden_size, rt.dtypes.compute)
        block = BridgeBlock(cfg, rt, parent=None)
        self.blocks = Stack(block, cfg.num_layers, (example, example))
        if cfg.state_dim:
            self.state_encoder = StateEncoder(cfg, rt)

    def __call__(
        self,
        hidden: jax.Array,
        dino_tokens: jax.Array,
        state: jax.Array | None,
        token_mask: jax.Array,
        dino_mask: jax.Array,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Condition [...,Q,D] in the compute dtype.

        Args:
          hidden: [k,...,L,E], one hidden state for each block (after `scale_gradient`).
          dino_tokens: [...,V*t,C].
          state: f32[...,S] if the config has a state encoder, else not read.
          token_mask: bool[...,L] valid tokens.
          dino_mask: bool[...,V*t] valid DINO tokens.
          dropout_keys: key array [...], one for each sample; None is evaluation.

        Raises:
          ValueError: the number of hidden states is not the number of blocks, or a model with a
            state encoder is given no state.
        """
        if len(hidden) != self.cfg.num_layers:
            raise ValueError(
                f"{len(hidden)} hidden states for the bridge's {self.cfg.num_layers} blocks "
                f"(start_layer {self.cfg.start_layer}, end_layer {self.cfg.end_layer})"
            )
        context = self.encode(dino_tokens, state)
        mask = self.key_mask(token_mask, dino_mask)

        def body(query, scanned):
            params, states, layer = scanned
            return self.block(params, query, states, context, mask, dropout_keys, layer)

        layers = (self.blocks(), hidden, jnp.arange(self.cfg.num_layers))
        return scan_blocks(body, self.queries(hidden.shape[1:-2]), layers, self.rt.remat)

    def encode(self, dino_tokens: jax.Array, state: jax.Array | None = None) -> jax.Array:
        """Keys that all blocks share: DINO and state tokens, projected: [...,V*t (+1),D]."""
        context = self.proj(self.dino_proj(dino_tokens))
        if not self.cfg.state_dim:
            return context
        if state is None:
            raise ValueError(
                f"bridge.state_dim is {self.cfg.state_dim}, but the batch has no state; give "
                "proprioception or set state_dim to 0"
            )
        return jnp.concatenate([context, self.state_encoder(state)], axis=-2)

    def key_mask(self, token_mask: jax.Array, dino_mask: jax.Array) -> jax.Array | None:
        """Valid key slots bool[...,L + V*t (+1)] in the order of `block`'s keys.

        The state token is always valid.  None, every slot, when the config's mask_padding is off:
        upstream attends to padding.
        """
        if not self.cfg.mask_padding:
            return None
        parts = [token_mask, dino_mask]
        if self.cfg.state_dim:
            parts.append(jnp.ones_like(token_mask[..., :1]))
        return jnp.concatenate(parts, axis=-1)

    def queries(self, lead: tuple[int, ...]) -> jax.Array:
        """The learned queries for each sample: [*lead,Q,D]."""
        tokens = self.query_tokens.astype(self.rt.dtypes.compute)
        return jnp.broadcast_to(tokens, (*lead, *tokens.shape))

    def block(
        self,
        params: Params,
        query: jax.Array,
        hidden: jax.Array,
        context: jax.Array,
        mask: jax.Array | None,
        dropout_keys: jax.Array | None,
        layer: jax.Array | int,
    ) -> jax.Array:
        """One block over one hidden state; may be called inside a scan after `encode`.

        Args:
          params: one block's slice of the parameters "blocks".
          query: [...,Q,D] queries so far.
          hidden: [...,L,E] states of the sample's tokens.
          context: [...,V*t (+1),D] from `encode`.
          mask: from `key_mask`; None attends to every slot.
          dropout_keys: key array [...], the same for all blocks; None is evaluation.
          layer: number of the block, 0 .. k-1, which makes its dropout its own.

        Returns:
          [...,Q,D] queries after the block.
        """
        keys = jnp.concatenate([self._project(hidden), context], axis=-2)
        if dropout_keys is not None:
            dropout_keys = fold_keys(dropout_keys, layer)
        block = BridgeBlock(self.cfg, self.rt, parent=None)
        with jax.named_scope("bridge_block"):
            query = constrain_tokens(query, self.rt.rules)
            query = block.apply({"params": params}, query, keys, mask, dropout_keys)
            return constrain_tokens(query, self.rt.rules)

    def _project(self, hidden: jax.Array) -> jax.Array:
        """The shared projection as a pure function: a bound module cannot be called in a scan."""
        params: Params = unbox(self.proj.variables["params"])
        detached = self.proj.clone(parent=None, name=None)
        return detached.apply({"params": params}, hidden)
