"""TPU flash attention: JAX's splash kernel with segment ids, over packed rows of any length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

Array = jax.Array

LANES = 128  # the kernel's blocks of keys are multiples of this
_MAX_BLOCK = 512
_FILL = -1  # segment of the slots that pad a row to whole blocks; batches have ids from 0 on


def supports(q_len: int, kv_len: int) -> bool:
    """Whether the kernel is worth it: self-attention over at least one block of keys.

    Vision windows (64 slots) stay with XLA: their scores are linear in the row.  At B=8, P=2560,
    N=16, H=80 the v5p compiler counts 3.5 GB of HBM traffic, forward and backward, or 1.3 ms; the
    kernel's three passes over blocks of 128 x 128 would take 7,680 grid steps of some 0.4 us
    (estimated), for scores of which half are wanted.
    """
    return q_len == kv_len >= LANES


def _block(length: int) -> int:
    """The largest block, a multiple of 128 up to 512, that divides a padded length."""
    return next(b for b in range(_MAX_BLOCK, 0, -LANES) if length % b == 0)


def attend(
    q: Array, k: Array, v: Array, segments: Array | None, causal: bool, interpret: bool
) -> Array:
    """Self-attention on one device.

    Rows are filled up to whole blocks with slots of a segment of their own, which see each other
    only, so that no row of the softmax is empty.

    Args:
      q: [B,T,N,H].
      k: [B,T,G,H].
      v: [B,T,G,H].
      segments: i32[B,T], not negative; None = all of one segment.
      causal: a query sees no key of a higher index; such blocks are skipped.
      interpret: runs the kernel in Pallas's interpreter, on any platform (tests).

    Returns:
      [B,T,N,H] in q's dtype.
    """
    rows, length, heads, dim = q.shape
    fill = -length % LANES
    padded = length + fill
    if segments is None:
        segments = jnp.zeros((rows, length), jnp.int32)
    segments = jnp.pad(segments, ((0, 0), (0, fill)), constant_values=_FILL)

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2)

    shape, size = (padded, padded), _block(padded)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size,
            block_kv_dkv=size, block_kv_dkv_compute=size, block_q_dq=size, block_kv_dq=size,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip

    def row(q, k, v, ids):
        return kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids))

    # The kernel does not scale the scores.  The factor itself stays f32: in bf16 its rounding would
    # be an error of up to 0.4 % common to all scores.
    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    out = jax.vmap(row)(*(heads_first(x) for x in (q, k, v)), segments)
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)
