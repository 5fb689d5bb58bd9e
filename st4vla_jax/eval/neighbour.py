"""The nearest-neighbour baseline: the chunk of the training sample whose picture is most alike.

A policy that beats the per-horizon mean but not this one has learned to look, not to act.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from st4vla_jax.batch import Batch
from st4vla_jax.eval.actions import HeldOutError

_CELLS = 8  # a picture becomes 8 x 8 mean colours


class NearestNeighbour:
    """Training samples by the mean colours of their first view."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        """Keeps the chunks of training batches (numpy); raises HeldOutError if there are none."""
        parts = [part for batch in batches for part in _samples(batch)]
        if not parts:
            raise HeldOutError("the nearest-neighbour baseline needs training robot samples")
        self._keys, self._chunks = (np.stack(column) for column in zip(*parts, strict=True))

    def metrics(self, batches: Iterable[Batch]) -> dict[str, float]:
        """eval/action_mse_neighbour_baseline over held-out batches, in normalised units.

        Entries that the neighbour's own mask leaves out count as zero actions.
        """
        total = count = 0.0
        for batch in batches:
            masks = batch.action.action_mask[batch.action.valid]
            for (key, actions), mask in zip(_samples(batch), masks, strict=True):
                nearest = np.argmin(np.sum(np.square(self._keys - key), axis=1))
                total += np.sum(np.square(self._chunks[nearest] - actions)[mask], dtype=np.float64)
                count += mask.sum()
        return {"eval/action_mse_neighbour_baseline": float(total / count)} if count else {}


def _samples(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(key f32[n], chunk f32[C,A] with masked entries 0) of each valid sample."""
    if batch.action is None:
        return
    action, valid = batch.action, batch.action.valid
    images = action.dino_images[:, :, 0][valid].astype(np.float32)
    cell = images.shape[1] // _CELLS
    images = images[:, : cell * _CELLS, : cell * _CELLS]
    blocks = images.reshape(len(images), _CELLS, cell, _CELLS, cell, 3)
    keys = blocks.mean(axis=(2, 4)).reshape(len(images), _CELLS * _CELLS * 3)
    yield from zip(keys, np.where(action.action_mask, action.actions, 0)[valid], strict=True)
