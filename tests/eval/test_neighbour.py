"""The nearest-neighbour baseline against a search by hand."""

import jax
import numpy as np
import pytest

from st4vla_jax.eval.actions import HeldOutError
from st4vla_jax.eval.neighbour import NearestNeighbour
from tests.reference.policy import tiny_batch, tiny_config


def batch_of(seed, rows=2):
    batch = jax.tree.map(np.array, tiny_batch(tiny_config(), rows=rows))
    rng = np.random.default_rng(seed)
    action = batch.action
    images = rng.integers(0, 256, action.dino_images.shape, dtype=np.uint8)
    actions = rng.standard_normal(action.actions.shape).astype(np.float32)
    actions[~action.action_mask] = np.nan
    return batch.replace(action=action.replace(dino_images=images, actions=actions))


def test_the_chunk_of_the_most_alike_picture_is_used():
    train, held = [batch_of(0), batch_of(1)], batch_of(2)
    # Held-out pictures are nearly those of training samples 5, 0, 3, 3, in this order.
    pool = np.concatenate([t.action.dino_images.reshape(-1, *held.action.dino_images.shape[2:])
                           for t in train])  # fmt: skip
    chunks = np.concatenate([t.action.actions.reshape(-1, 8, 7) for t in train])
    picks = [5, 0, 3, 3]
    images = pool[picks].reshape(held.action.dino_images.shape)
    held = held.replace(action=held.action.replace(dino_images=images ^ 1))
    got = NearestNeighbour(train).metrics([held])
    mask = held.action.action_mask.reshape(-1, 8, 7)
    error = np.square(np.nan_to_num(chunks[picks]) - held.action.actions.reshape(-1, 8, 7))
    assert got == {"eval/action_mse_neighbour_baseline": pytest.approx(error[mask].mean())}


def test_unused_slots_are_no_samples():
    train = batch_of(0)
    valid = np.array([[True, False], [False, False]])
    one = train.replace(action=train.action.replace(valid=valid))
    exact = NearestNeighbour([train]).metrics([one])
    assert exact["eval/action_mse_neighbour_baseline"] == 0
    nothing = train.replace(action=train.action.replace(valid=np.zeros((2, 2), bool)))
    assert NearestNeighbour([train]).metrics([nothing]) == {}
    for batches in ([], [nothing], [train.replace(action=None)]):
        with pytest.raises(HeldOutError, match="training robot samples"):
            NearestNeighbour(batches)
