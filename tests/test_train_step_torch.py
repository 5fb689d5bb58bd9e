"""Whole updates against PyTorch: packed samples here, padded batches of the same samples there.

Every number of three updates in a row: losses, gradients, both moments, learning rates, parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from st4vla_jax.config import FLOAT32, model_config
from st4vla_jax.data.packing import Capacity, pack
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.optim import Group, OptimConfig, Optimizer
from st4vla_jax.state import leaves_by_path
from st4vla_jax.train_step import NORM_MODULES, StepConfig, update_key
from tests.reference.policy import TOKENIZER, grounding_sample, random_params, robot_sample
from tests.reference.torch_update import Recipe, TorchUpdate, torch_policy
from tests.reference.training import run_steps

pytestmark = pytest.mark.parity

UPDATES = 3  # at rate 0, at the peak, on the cosine
RTOL = 1e-5  # of a number; of each leaf's largest value
# Not Adam's 1e-8: the decoder's key biases have hardly a gradient under their slowest rotary
# frequencies, and an update divided by it would be rounding.
EPS = 1e-4
RECIPE = Recipe(
    rate_vlm=1e-3, rate_rest=3e-3, decay_vlm=0.01, decay_rest=0.02, warmup=1, steps=4,
    min_ratio=0.1, eps=EPS,
)  # fmt: skip
OPTIM = OptimConfig(
    {
        "vlm": Group("vlm/", lr=1e-3, weight_decay=0.01, min_ratio=0.1),
        "rest": Group("(dino|bridge|dit)/", lr=3e-3, weight_decay=0.02, min_ratio=0.1),
    },
    warmup=1,
    eps=EPS,
)
CFG = StepConfig(repeats=2, accumulation=2)
# Biases [layers,3,N,H] whose keys' part (1) has a true gradient of zero (see test_train_step.py).
ZERO_GRADIENT = (
    "dino/blocks/attn/qkv/bias",
    "bridge/blocks/cross_attn/in_proj/bias",
    "dit/blocks/attn/qkv/bias",
)


class Recording(Optimizer):
    """The optimizer, keeping the gradients that it was given."""

    def init(self, params):
        return {"adam": super().init(params), "grads": jax.tree.map(jnp.zeros_like, params)}

    def update(self, grads, norm, opt_state, params, step):
        params, adam = super().update(grads, norm, opt_state["adam"], params, step)
        return params, {"adam": adam, "grads": grads}


def tiny_model() -> ST4VLA:
    """Two layers a tower; a Q-Former over two hidden states, without dropout of its own."""
    cfg = model_config(
        "tiny", "tiny", "tiny", bridge={"dropout": 0.0}, action={"condition_dropout": 0.5}
    )
    cfg = dataclasses.replace(
        cfg,
        vision=dataclasses.replace(cfg.vision, depth=2, fullatt_block_indexes=(1,)),
        text=dataclasses.replace(cfg.text, num_hidden_layers=2),
        bridge=dataclasses.replace(cfg.bridge, start_layer=1, end_layer=3),
    ).check()
    return ST4VLA(cfg, dataclasses.replace(FLOAT32, remat="none"))


def weighted(sample, weights):
    """A grounding sample whose targets weigh differently."""
    encoded, robot = sample
    weight = np.resize(np.float32(weights), encoded.target_weight.shape)
    return dataclasses.replace(encoded, target_weight=weight), robot


def uneven_rows(cfg):
    """Two microbatches with other numbers of samples, views, counted actions and weights."""
    return [
        [
            robot_sample(cfg, 0),
            grounding_sample(1),
            robot_sample(cfg, 2, sizes=((56, 56), (84, 56))),
        ],
        [
            weighted(grounding_sample(30, size=(56, 84)), (1, 0.5)),
            robot_sample(cfg, 5, sizes=((84, 84),)),
            weighted(grounding_sample(400), (2, 1, 1)),
        ],
    ]


@pytest.fixture(scope="module")
def both():
    """[(our state, our metrics, PyTorch's outcome)] after each update."""
    torch.set_num_threads(1)
    model = tiny_model()
    rows = uneven_rows(model.cfg)
    packed = pack(rows, Capacity.fit(rows, token_multiple=16), pad_id=TOKENIZER.pad)
    batch = jax.tree.map(jnp.asarray, packed)
    ours = run_steps(model, Recording(OPTIM, RECIPE.steps), [batch] * UPDATES, cfg=CFG)

    policy = torch_policy(model.cfg, random_params(model))
    update = TorchUpdate(model.cfg, policy, [sample for row in rows for sample in row], RECIPE)
    found = []
    for step, (state, metrics) in enumerate(ours):
        draws = model.draw(update_key(CFG.seed, step), batch, CFG.repeats).diffusion
        drawn = (draws.noise, draws.timesteps, draws.drop)
        noise, t, drop = (torch.from_numpy(np.array(x)[packed.action.valid]) for x in drawn)
        assert 0 < drop.sum() < drop.numel()
        found.append((state, metrics, update.step((noise, t.long(), drop))))
    return found


def test_losses_norms_and_rates(both):
    for _, metrics, want in both:
        for name, value in want.metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=RTOL, err_msg=name)
        for path, name in NORM_MODULES.items():
            own = [g for p, g in want.grads.items() if p.startswith(path + "/")]
            norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in own))
            np.testing.assert_allclose(metrics[f"grad/{name}"], norm, rtol=RTOL, err_msg=name)
    assert all(metrics["grad/norm"] > OPTIM.clip for _, metrics, _ in both)


@pytest.mark.parametrize("what", ["grads", "first", "second", "params"])
def test_every_leaf(both, what):
    for update, (state, _, want) in enumerate(both):
        adam = state.opt_state["adam"]
        trees = {"grads": state.opt_state["grads"], "first": adam.mu, "second": adam.nu}
        got = dict(leaves_by_path(trees.get(what, state.params)))
        wanted = getattr(want, what)
        assert got.keys() == wanted.keys()
        for path, value in got.items():
            ours, theirs = value, wanted[path]
            if path in ZERO_GRADIENT:
                ours, theirs = ours[:, [0, 2]], theirs[:, [0, 2]]
            scale = np.abs(theirs).max()
            assert scale > 0, path
            message = f"{what} of {path} after update {update}"
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=RTOL * scale, err_msg=message)
