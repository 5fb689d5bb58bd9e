"""From files to gradients: real robot episodes and grounding records through pipeline and model."""

import jax
import numpy as np
import optax
import pytest

from st4vla_jax.data.settings import DataSettings, open_pipeline
from st4vla_jax.models.st4vla import Denominators
from tests.reference.policy import random_params, tiny_policy

STEPS = 3


@pytest.fixture(scope="module")
def batches(shared, tmp_path_factory):
    model = tiny_policy()
    settings = DataSettings.from_dict({
        "sets": {
            "bridge": {
                "kind": "rlds", "path": str(shared / "data/bridge_dataset/1.0.0"),
                "spec": "bridge_orig",
            },
            "llava": {
                "kind": "grounding", "path": str(shared / "data/llava_demo/single_images.json"),
                "images": str(shared / "data/llava_demo"),
            },
        },
        "schedule": {
            "robot_samples": 4, "grounding_samples": 1, "tokens": 640, "window": 4, "seed": 0,
        },
        "image": {"size": (56, 56), "min_pixels": 784, "max_pixels": 12_544},
        "dino_size": model.cfg.dino.image_size, "chunk": model.cfg.dit.chunk,
        "prompts": ("none",), "threads": 2, "index_dir": str(tmp_path_factory.mktemp("index")),
    })  # fmt: skip
    stream = iter(open_pipeline(settings).batches(0))
    return [next(stream) for _ in range(STEPS)]


def test_every_batch_has_the_same_shapes(batches):
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), batch) for batch in batches]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(batch.action.valid.sum() == 4 for batch in batches)
    assert all((batch.vlm.target_weight > 0).any() for batch in batches)


def test_both_losses_fall_on_one_batch_with_one_compilation(batches):
    model = tiny_policy()
    params, optimizer = random_params(model), optax.adam(2e-3)

    @jax.jit
    def step(params, state, batch):
        draws = model.draw(jax.random.key(0), batch, 2, train=False)
        denominators = Denominators.of(batch, 2)
        (_, parts), grads = jax.value_and_grad(model.loss, has_aux=True)(
            params, batch, draws, denominators
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, (parts.action, parts.text)

    state = optimizer.init(params)
    losses = []
    for _ in range(12):
        params, state, loss = step(params, state, batches[0])
        losses.append(loss)
    for batch in batches[1:]:
        assert np.isfinite(step(params, state, batch)[2]).all()
    losses = np.array(losses)
    assert (losses[-1] < 0.7 * losses[0]).all(), losses
    assert step._cache_size() == 1
