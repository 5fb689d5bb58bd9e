"""Action chunks: the C actions from a step on, padded where they run past the episode's end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# neutral: relative dimensions stay still (0), absolute ones hold their last value; zero: as
# InternVLA-M1, gripper included; repeat: the last action.
PADS = ("neutral", "zero", "repeat")


def action_chunk(
    actions: np.ndarray,
    start: int,
    chunk: int,
    pad: str = "neutral",
    absolute: Sequence[int] = (6,),
    masked: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The chunk that starts at a step.

    differs: upstream pads with zeros and counts the padding in the loss (spec upstream.md 4.3);
    ``pad="zero", masked=False`` does the same.  Padding is in raw units, before normalisation.

    Args:
      actions: f32[T,A] of one episode, after standardisation.
      start: row of the first action.
      chunk: actions of a chunk (C).
      pad: one of PADS.
      absolute: dimensions that hold their last value under "neutral".
      masked: keep the padding out of the loss.

    Returns:
      f32[C,A] actions, bool[C,A] True where the loss counts.

    Raises:
      ValueError: a start outside the episode, an empty chunk or an unknown ``pad``.
    """
    if pad not in PADS:
        raise ValueError(f"pad {pad!r} is not one of {', '.join(PADS)}")
    if not 0 <= start < len(actions) or chunk < 1:
        raise ValueError(f"a chunk of {chunk} from step {start} of {len(actions)}")
    real = actions[start : start + chunk]
    size = actions.shape[1]
    padded = np.zeros((chunk, size), np.float32)
    padded[: len(real)] = real
    held = {"neutral": list(absolute), "zero": [], "repeat": list(range(size))}[pad]
    padded[len(real) :, held] = actions[-1, held]
    mask = np.ones((chunk, size), bool)
    mask[len(real) :] = not masked
    return padded, mask
