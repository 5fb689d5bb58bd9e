"""One attention function for every module, and the choice of the kernel that computes it.

XLA everywhere (attention_xla.py); cuDNN's flash attention on GPUs (attention_cudnn.py) and splash
attention on TPUs (attention_splash.py) where a module passes its runtime's kernel and the shapes
allow.  DINOv2, the Q-Former and the DiT leave it at XLA: their sequences have 80 to 500 keys, and
the Q-Former's dropout acts on the weights, which no kernel shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from st4vla_jax.models import attention_cudnn, attention_splash, attention_xla
from st4vla_jax.runtime import ATTENTION_KERNELS
from st4vla_jax.sharding import Rules

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    causal: bool = False,
    q_offset: Array | int = 0,
    query_chunk: int = 0,
    weights_fn: Callable[[Array], Array] | None = None,
    kernel: str = "xla",
    mask: Array | None = None,
    rules: Rules | None = None,
) -> Array:
    """Scaled dot-product attention; softmax in f32.

    A query sees a key if both carry the same segment id and, when causal, the key's index is at
    most the query's index plus ``q_offset`` (the number of cached keys before the first query).

    Args:
      q: [...,Tq,N,H] queries; the first axis is the batch.
      k: [...,Tk,G,H] keys; N is a multiple of G.
      v: [...,Tk,G,H] values.
      q_segments: i32[...,Tq]; None means no segment mask.
      kv_segments: i32[...,Tk].
      causal: masks keys after the query, by index.
      q_offset: index of the first query among the keys.
      query_chunk: XLA handles this many queries at a time, so that memory stays linear in Tq;
        0 = all at once.
      weights_fn: applied to the softmax weights [...,G,Tq,N/G,Tk] (dropout); XLA only.
      kernel: Runtime.attention.  Where the kernel it stands for does not take the shapes, the
        dtype, an offset or a ``weights_fn``, XLA computes.
      mask: what `segment_mask` made of the same arguments, outside the scan over the blocks.
      rules: the layout of the batch and of the heads on the mesh; None is one device.

    Returns:
      [...,Tq,N,H] in q's dtype.

    Raises:
      ValueError: an unknown kernel, or ``weights_fn`` together with chunks of queries.
    """
    plain = weights_fn is None and isinstance(q_offset, int) and q_offset == 0
    name = kernel_for(kernel, q.dtype, q.shape[-3], k.shape[-3], q.shape[-1], causal)
    if plain and name == "cudnn":
        if mask is None:
            mask = _segment_mask(q_segments, kv_segments)

        def attend(q, k, v, mask):
            return attention_cudnn.attend(q, k, v, mask, causal)

        return _on_mesh(attend, rules, q, k, v, (mask,))
    if plain and name == "splash":
        interpret = platform() != "tpu"

        def attend(q, k, v, segments):
            return attention_splash.attend(q, k, v, segments, causal, interpret)

        return _on_mesh(attend, rules, q, k, v, (q_segments,))
    packed = q_segments is not None and q_segments is kv_segments
    if plain and packed and platform() == "cpu" and attention_xla.has_windows(q.shape[-3]):

        def attend(q, k, v, segments):
            return attention_xla.attend_windows(q, k, v, segments, causal, query_chunk)

        return _on_mesh(attend, rules, q, k, v, (q_segments,))
    return attention_xla.attend(
        q, k, v, q_segments, kv_segments, causal, q_offset, query_chunk, weights_fn
    )


def kernel_for(
    choice: str, dtype: jnp.dtype, q_len: int, kv_len: int, head_dim: int, causal: bool = False
) -> str:
    """The kernel that computes attention of these shapes: "xla", "cudnn" or "splash".

    "auto" is the platform's kernel: of the mesh in `jax.set_mesh`, which may be a topology that is
    only compiled for, else of the default device.

    Raises:
      ValueError: unknown ``choice``.
    """
    if choice not in ATTENTION_KERNELS:
        raise ValueError(
            f"unknown attention kernel {choice!r} (there are {', '.join(ATTENTION_KERNELS)})"
        )
    if choice == "auto":
        choice = _platform_kernel()
    fits = {
        "xla": True,
        "cudnn": attention_cudnn.supports(dtype, q_len, kv_len, head_dim)
        and not (causal and q_len != kv_len),
        "splash": attention_splash.supports(q_len, kv_len),
    }
    return choice if fits[choice] else "xla"


def segment_mask(
    kernel: str,
    dtype: jnp.dtype,
    head_dim: int,
    q_segments: Array,
    kv_segments: Array,
    causal: bool = False,
) -> Array | None:
    """The mask bool[...,1,Tq,Tk] that cuDNN wants; None where another kernel computes.

    Make it once, outside the scan over the blocks: inside, every block would make it again, and
    rematerialisation once more.  Arguments as in `attention`.
    """
    lengths = q_segments.shape[-1], kv_segments.shape[-1]
    if kernel_for(kernel, dtype, *lengths, head_dim, causal) != "cudnn":
        return None
    return _segment_mask(q_segments, kv_segments)


def _segment_mask(q_segments, kv_segments):
    if q_segments is None:
        return None
    return (q_segments[..., :, None] == kv_segments[..., None, :])[..., None, :, :]


def platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _platform_kernel() -> str:
    name = platform()
    if name == "tpu":
        return "splash"
    if name == "gpu" and attention_cudnn.device_has_kernel():
        return "cudnn"
    return "xla"


def _on_mesh(
    attend: Callable[..., Array],
    rules: Rules | None,
    q: Array,
    k: Array,
    v: Array,
    per_row: Sequence[Array | None],
) -> Array:
    """Runs ``attend(q, k, v, *per_row)`` on every device's own rows and heads.

    The partitioner cannot split a kernel: it would gather its operands.  Grouped key/value heads
    that the rules leave whole are cut to those that the device's query heads read.  ``per_row`` are
    arrays (or None) with the batch as first axis, the same for all heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.size == 1:
        return attend(q, k, v, *per_row)
    heads, groups = q.shape[-2], k.shape[-2]

    def split(name, size):
        axes = rules.mesh_axes(name)
        shards = math.prod(mesh.shape[a] for a in axes)
        return ((), 1) if size % shards else (axes, shards)

    batch, _ = split("batch", q.shape[0])
    head_axes, shards = split("act_heads", heads)
    if groups % shards and shards % groups:
        head_axes, shards = (), 1  # a device's queries would straddle two key/value heads
    split_kv = groups == heads or (rules.mesh_axes("act_kv_heads") and not groups % shards)
    kv_axes = head_axes if split_kv else ()

    def local(q, k, v, *per_row):
        if head_axes and not kv_axes:
            first = jax.lax.axis_index(head_axes) * (heads // shards) // (heads // groups)
            size = max(1, groups // shards)
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=-2) for x in (k, v))
        return attend(q, k, v, *per_row)

    def spec(axes):
        return PartitionSpec(batch or None, *(None,) * (q.ndim - 3), axes or None, None)

    rows = tuple(PartitionSpec(batch or None) for _ in per_row)
    specs = (spec(head_axes), spec(kv_axes), spec(kv_axes), *rows)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(q, k, v, *per_row)
