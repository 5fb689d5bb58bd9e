"""The layers that create parameters, with logical axis names; and the scanned stack of blocks.

Kernels keep their natural axes (a query projection is [D,N,H], not [D,N*H]), so that the sharding
rules divide heads and never a head.  Norms compute in f32; matmuls in the caller's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from st4vla_jax.models.attention import platform
from st4vla_jax.sharding import Axes, Rules, batch_shards, is_axes, table_axes

Init = Callable[..., jax.Array]
Params = Any

normal_init = nn.initializers.normal


def boxed(init: Init, names: tuple[str | None, ...]) -> Init:
    """Initializer whose result carries its logical axis names."""

    def wrapped(key, shape, dtype):
        if len(shape) != len(names):
            raise ValueError(f"shape {shape} does not fit logical axes {names}")
        return Axes(init(key, shape, dtype), names)

    return wrapped


def fan_init(kind: str, num_in: int) -> Init:
    """PyTorch's initialisers for a kernel whose first ``num_in`` axes are inputs.

    ``xavier`` is xavier_uniform_; ``torch_linear`` is nn.Linear's default for weights
    (kaiming_uniform with a = sqrt(5), that is U(+-1/sqrt(fan_in))).
    """

    def init(key, shape, dtype=jnp.float32):
        fan_in, fan_out = math.prod(shape[:num_in]), math.prod(shape[num_in:])
        bound = {
            "xavier": math.sqrt(6 / (fan_in + fan_out)),
            "torch_linear": 1 / math.sqrt(fan_in),
        }[kind]
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """y = x @ kernel + bias over the trailing ``len(in_shape)`` axes of x.

    Attributes:
      in_shape, out_shape: axes of the kernel, e.g. (D,) -> (N, H) for a query projection.
      axes: one logical name for each axis of the kernel, inputs first.
      dtype: dtype of the matmul and of the result; param_dtype: dtype of fresh parameters.
      pad_in, pad_out: zeros beyond the first input and the last output axis, of the matmul alone:
        some kernels are much faster on whole tiles.  The result is wider by ``pad_out``.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    kernel_init: Init = normal_init(0.02)
    bias_init: Init = nn.initializers.zeros_init()
    pad_in: int = 0
    pad_out: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_in = len(self.in_shape)
        in_shape = (self.in_shape[0] + self.pad_in, *self.in_shape[1:])
        kernel = self.param(
            "kernel",
            boxed(self.kernel_init, self.axes),
            (*self.in_shape, *self.out_shape),
            self.param_dtype,
        )
        lead, inner = x.shape[: x.ndim - num_in], x.shape[x.ndim - num_in :]
        if inner != in_shape:
            raise ValueError(f"{self.name}: input {x.shape} does not end in {in_shape}")
        kernel = self._padded(kernel, self.pad_in, self.pad_out)
        contract = ((tuple(range(len(lead), x.ndim)), tuple(range(num_in))), ((), ()))
        y = jax.lax.dot_general(x.astype(self.dtype), kernel, contract)
        if self.has_variable("params", "lora_a"):  # beside the kernel, see models/lora.py
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            low = jax.lax.dot_general(
                x.astype(self.dtype), self._padded(a, self.pad_in, 0), contract
            )
            y = y + jnp.tensordot(low, self._padded(b, 0, self.pad_out), 1)
        if self.use_bias:
            bias = self.param(
                "bias",
                boxed(self.bias_init, self.axes[num_in:]),
                tuple(self.out_shape),
                self.param_dtype,
            )
            y = y + self._padded(bias, 0, self.pad_out)
        return y

    def _padded(self, weight: jax.Array, first: int, last: int) -> jax.Array:
        """In the matmul's dtype, with zeros after the first and the last axis."""
        weight = weight.astype(self.dtype)
        if not first + last:
            return weight
        widths = [[0, 0] for _ in weight.shape]
        widths[0][1] += first
        widths[-1][1] += last
        return jnp.pad(weight, widths)


class Embed(nn.Module):
    """Token embedding table [V,D] with logical axes (vocab, vocab_embed)."""

    num_embeddings: int
    features: int
    axes: tuple[str | None, ...] = ("vocab", "vocab_embed")
    param_dtype: Any = jnp.float32
    embedding_init: Init = normal_init(0.02)

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns the table; callers take rows or use it as the tied output head."""
        return self.param(
            "embedding",
            boxed(self.embedding_init, self.axes),
            (self.num_embeddings, self.features),
            self.param_dtype,
        )


class RMSNorm(nn.Module):
    """x / rms(x) in f32, cast back to x's dtype, then times the scale (HF Qwen2RMSNorm)."""

    features: int
    axis: str | None
    eps: float = 1e-6
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            boxed(nn.initializers.ones_init(), (self.axis,)),
            (self.features,),
            self.param_dtype,
        )
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm without parameters over the last axis, in f32; result in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(var + eps)).astype(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias over the last axis, in f32; result in x's dtype."""

    features: int
    axis: str | None
    eps: float = 1e-5
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.features,)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", boxed(ones, (self.axis,)), shape, self.param_dtype)
        bias = self.param("bias", boxed(zeros, (self.axis,)), shape, self.param_dtype)
        y = layer_norm(x.astype(jnp.float32), self.eps) * scale.astype(jnp.float32)
        return (y + bias.astype(jnp.float32)).astype(x.dtype)


def gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Reads rows of each batch element: x [B,n,...], index i32[B,...] -> [B,...,*x.shape[2:]].

    The one way indices are read: batched over B only.  Other forms of the same gather make the
    partitioner all-gather whole activations (DESIGN.md D2).
    """
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="clip"))(x, index)


def whole_table(table: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """All rows of a table that is cut along mesh axes, in the body of a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if len(axes) == 1 and mesh.size == mesh.shape[axes[0]] > 2 and platform() == "tpu":
        return _gather_ring(table, axes[0])
    # Along a new axis: the TPU compiler does not scatter the gradient of 151,936 rows otherwise.
    return jax.lax.all_gather(table, axes).reshape(-1, table.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_ring(table: jax.Array, axis: str) -> jax.Array:
    """[V/n,D] of each of n devices -> [V,D]; the gradient's parts are summed while they travel.

    Over a whole slice the TPU compiler sums a scattered gradient of this size whole on every
    device, at twice the bytes, and computes nothing meanwhile (v5e:4x4, jax 0.10.2).
    """
    return jax.lax.all_gather(table, axis, tiled=True)


def _gather_ring_bwd(axis: str, _: None, grad: jax.Array) -> tuple[jax.Array]:
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    parts = grad.reshape(size, -1, grad.shape[-1])

    def one_way(first: int, width: int, step: int) -> jax.Array:
        """Sums some of the columns; device i passes on to device i + step."""
        turn = [(i, (i + step) % size) for i in range(size)]

        def part(hops: int) -> jax.Array:  # of the device that is so many hops ahead
            start = ((me + step * hops) % size, 0, first)
            return jax.lax.dynamic_slice(parts, start, (1, parts.shape[1], width))[0]

        total = part(size - 1)
        for hops in range(size - 2, -1, -1):
            total = jax.lax.ppermute(total, axis, turn) + part(hops)
        return total

    half = grad.shape[-1] // 2
    rest = grad.shape[-1] - half
    return (jnp.concatenate([one_way(0, half, 1), one_way(half, rest, -1)], axis=-1),)


_gather_ring.defvjp(lambda table, axis: (_gather_ring(table, axis), None), _gather_ring_bwd)


def take_rows(table: jax.Array, ids: jax.Array, rules: Rules) -> jax.Array:
    """Rows of an embedding table [V,D] in its layout: ids i32[B,T] -> [B,T,D].

    On a mesh each device gathers the rows that it lacks and looks up its own tokens, so that the
    gradient is summed where the table lies: left to the partitioner, it is summed whole on every
    device.  An id outside the vocabulary gives NaN, not a neighbour's embedding.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Rows that the mesh does not divide: the one row that parameters are initialised with.
    if mesh.empty or mesh.size == 1 or len(ids) % batch_shards(mesh, rules):
        return jnp.take(table, ids, axis=0)
    whole, split = table_axes(rules)

    def local(table, ids):
        if whole:
            table = whole_table(table, whole)
        if not split:
            return jnp.take(table, ids, axis=0)
        own, rows = ids - jax.lax.axis_index(split) * len(table), len(table)
        found = jnp.take(table, jnp.clip(own, 0, rows - 1), axis=0)
        inside = (own >= 0) & (own < rows)
        found = jax.lax.psum(jnp.where(inside[..., None], found, 0), split)
        known = (ids >= 0) & (ids < rows * jax.lax.axis_size(split))
        return jnp.where(known[..., None], found, jnp.nan)

    batch = rules.spec(("batch",))
    specs = (rules.param_spec(("vocab", "vocab_embed")), batch)
    return jax.shard_map(local, in_specs=specs, out_specs=batch, check_vma=False)(table, ids)


# --- Scanned stacks -----------------------------------------------------------------------------
# Blocks of a stack are applied as pure functions of one slice of a stacked parameter tree.  This
# instead of nn.scan, because a bridge over several layers scans static slices of the language
# model's stack while its own blocks ride along (DESIGN.md section 6).

# Three are "full" but for the decoder.  "full_keep_weights": where weights are sharded, those that
# it gathers for the forward pass are kept for the backward pass (models/prefetch.py).
# "dots_decoder": it keeps its products, as in "dots", of which the vision tower has as many bytes
# for fewer FLOPs.  "dots_decoder_mlp": and the tower those of gate_proj and up_proj.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "full_keep_weights": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_decoder": jax.checkpoint_policies.nothing_saveable,
    "dots_decoder_mlp": jax.checkpoint_policies.nothing_saveable,
}


def decoder_policy(policy: str) -> str:
    """The name in REMAT_POLICIES of what the decoder's blocks keep."""
    return "dots" if policy.startswith("dots") else policy


def remat(fn: Callable, policy: str) -> Callable:
    """`jax.checkpoint` by a name in REMAT_POLICIES, for the body of a scan."""
    if policy == "none":
        return fn
    # prevent_cse is only needed outside of scan, where XLA could merge the recomputation.
    return jax.checkpoint(fn, policy=REMAT_POLICIES[policy], prevent_cse=False)


class Stack(nn.Module):
    """Parameters of ``length`` equal blocks, stacked on a leading axis named ``layers``.

    Attributes:
      block: an unbound module (made with ``parent=None``).
      length: number of blocks.
      example: arguments for ``block.init``, as a tuple of ShapeDtypeStructs (or None).
    """

    block: nn.Module
    length: int
    example: tuple[Any, ...]

    @nn.compact
    def __call__(self) -> Params:
        """Returns the stacked parameter tree of the blocks, each leaf [length, ...]."""
        if self.is_initializing():
            # One draw for the whole stack: an initialiser for each leaf would trace all of them.
            tree = self._init_stack(self.make_rng("params"))
            return {name: self.param(name, lambda _, v=value: v) for name, value in tree.items()}
        return dict(self.variables["params"])

    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """Logical names of one block's leaves, in the order of `jax.tree.leaves`."""
        tree = jax.eval_shape(self.block.init, jax.random.key(0), *self.example)["params"]
        return tuple(box.names for box in jax.tree.leaves(tree, is_leaf=is_axes))

    def _init_stack(self, key: jax.Array) -> Params:
        args = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.example)
        keys = jax.random.split(key, self.length)
        tree = jax.vmap(lambda k: self.block.init(k, *args)["params"])(keys)
        layer_axis = {meta.PARTITION_NAME: "layers"}
        return jax.tree.map(lambda b: b.add_axis(0, layer_axis), tree, is_leaf=is_axes)


def layer_slice(stack: Params, start: int, stop: int) -> Params:
    """Blocks start..stop-1 of a stack; the whole stack is passed through uncopied."""
    return jax.tree.map(lambda p: p if (start, stop) == (0, len(p)) else p[start:stop], stack)


def scan_blocks(body: Callable, carry: Any, xs: Any, policy: str) -> Any:
    """lax.scan of ``body(carry, x) -> carry`` over the layer axis of ``xs``, rematerialised."""

    def step(c, x):
        return body(c, x), None

    return jax.lax.scan(remat(step, policy), carry, xs)[0]
