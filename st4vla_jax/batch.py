"""The packed batch: the contract between the data pipeline and the models.

Legend, used in every shape of this package:

  B packed sequences     T tokens of a sequence      P vision slots of a sequence (multiple of 64)
  M supervised tokens    K robot samples             L tokens of one robot sample
  V camera views         C action chunk steps        A action dimensions     S state dimensions
  D model width          N query heads               G key/value heads       H head dimension
  F mlp width            Q learned queries           R noise draws a sample

Every leaf is batch-first.  Masks are True where valid.  Id 0 in ``segment_ids``, ``patch_image``
and ``patch_window`` means padding; padding attends to padding only, so no softmax row is empty.
"""

from __future__ import annotations

from typing import Any

from flax import struct

Array = Any  # numpy on the host, jax.Array on devices: the same structure travels through both.

VISION_BIN = 64  # slots of one attention window: 8x8 patches (DESIGN.md D3)


@struct.dataclass
class VlmInputs:
    """Packed tokens, image patches and next-token targets.

    Attributes:
      tokens: i32[B,T] token ids.
      positions: i32[B,T,3] mRoPE ids (time, height, width), counted from 0 in each segment.
      segment_ids: i32[B,T] 1, 2, ... one for each packed sample; 0 = padding.
      patches: u8[B,P,14*14*3] raw pixels, flattened (channel, row, column), in window order.
      patch_hw: i32[B,P,2] row and column of the patch in its image's patch grid.
      patch_image: i32[B,P] image number within the sequence; 0 = padding.
      patch_window: i32[B,P] attention window within the bin of 64 slots; 0 = padding.
      vision_index: i32[B,T] merged cell (slot // 4) whose feature replaces the token; -1 = text.
      target_index: i32[B,M] position in T whose hidden state predicts the target.
      targets: i32[B,M] token id to predict.
      target_weight: f32[B,M] weight in the loss; 0 = unused slot (index 0).
      target_group: i32[B,M] data set and answer kind, for metrics only.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    patches: Array
    patch_hw: Array
    patch_image: Array
    patch_window: Array
    vision_index: Array
    target_index: Array
    targets: Array
    target_weight: Array
    target_group: Array


@struct.dataclass
class ActionInputs:
    """Robot samples, addressed inside their packed sequence.

    Attributes:
      token_index: i32[B,K,L] positions in T of the sample's tokens; 0 where unused.
      token_mask: bool[B,K,L].
      dino_images: u8[B,K,V,h,w,3] RGB views for DINOv2.
      view_mask: bool[B,K,V].
      state: f32[B,K,S] normalised proprioception, or None.
      actions: f32[B,K,C,A] normalised action chunk; finite where ``valid``, masked or not, since
        the DiT reads all of it.
      action_mask: bool[B,K,C,A] entries that count in the loss.
      valid: bool[B,K] False for an unused robot slot.
      embodiment: i32[B,K] selects statistics and metrics only.
      sample_group: i32[B,K] data set, for metrics only.
    """

    token_index: Array
    token_mask: Array
    dino_images: Array
    view_mask: Array
    state: Array | None
    actions: Array
    action_mask: Array
    valid: Array
    embodiment: Array
    sample_group: Array


@struct.dataclass
class Batch:
    """One update's input.  ``action`` is None in stage 1; M = 0 means no next-token loss."""

    vlm: VlmInputs
    action: ActionInputs | None = None
