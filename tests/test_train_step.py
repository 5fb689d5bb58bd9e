"""The update: accumulation, repeats, skipping, freezing, averages; the same on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.models.st4vla import Denominators, LossWeights
from st4vla_jax.optim import Group, OptimConfig, Optimizer
from st4vla_jax.state import leaves_by_path
from st4vla_jax.train_step import StepConfig, by_group, make_loss_norms, update_key
from tests.reference.policy import tiny_batch, tiny_policy
from tests.reference.training import OPTIM, STEPS, Sgd, make_state, run_steps

ROWS = 8
CFG = StepConfig(repeats=2, groups=("", "other"))
# Their true gradient is zero: a constant added to all keys of a softmax changes nothing where no
# rotary embedding turns them.  Adam would divide their rounding by itself.
ZERO_GRADIENT = ("attn/qkv/bias", "cross_attn/in_proj/bias")


@pytest.fixture(scope="module")
def model():
    return tiny_policy()


@pytest.fixture(scope="module")
def batch(model):
    return tiny_batch(model.cfg, rows=ROWS)


@pytest.fixture(scope="module")
def plain_run(model, batch):
    """Two updates, and two more on a batch that holds an infinite action.

    The first one is run 30 times more and must be the same each time: it was not on CPUs without
    the barrier between gradients and their norms.
    """
    actions = batch.action.actions.at[0, 0, 0, 0].set(jnp.inf)
    bad = batch.replace(action=batch.action.replace(actions=actions))
    optimizer = Optimizer(OPTIM, STEPS)
    return run_steps(model, optimizer, [batch, batch, bad, bad], cfg=CFG, again=30)


def assert_close_to_largest(got, want, rtol, skip=()):
    """Each leaf to ``rtol`` of its largest value."""
    want = dict(leaves_by_path(want))
    for path, value in leaves_by_path(got):
        if not path.endswith(skip):
            scale = max(np.abs(want[path]).max(), 1e-12)
            np.testing.assert_allclose(value, want[path], rtol=0, atol=rtol * scale, err_msg=path)


def test_metrics(plain_run, batch):
    first, second = (metrics for _, metrics in plain_run[:2])
    assert second["loss/total"] != first["loss/total"]  # other noise, other parameters
    np.testing.assert_allclose(
        first["loss/total"], first["loss/action"] + 0.1 * first["loss/text"], rtol=1e-6
    )
    modules = ("vlm/visual", "vlm/language_model", "dino", "qformer", "dit")
    total = np.sqrt(sum(first[f"grad/{m}"] ** 2 for m in modules))
    np.testing.assert_allclose(first["grad/norm"], total, rtol=1e-6)
    assert first["grad/bridge"] > 0 and first["grad/text_hidden"] > 0
    # All samples of the batch are of group 0: its mean is the loss.
    named = by_group(dict(first), CFG.groups)
    np.testing.assert_allclose(named["loss/action/"], first["loss/action"], rtol=1e-5)
    np.testing.assert_allclose(named["loss/text/"], first["loss/text"], rtol=1e-5)
    assert "loss/text/other" not in named


def test_accumulation_equals_the_whole_batch(model, batch, plain_run):
    cfg = dataclasses.replace(CFG, accumulation=4)
    (state, metrics), _ = run_steps(model, Optimizer(OPTIM, STEPS), [batch] * 2, cfg=cfg)
    want_state, want = plain_run[0]
    for name in ("loss/total", "loss/action", "loss/text", "grad/norm", "grad/bridge"):
        np.testing.assert_allclose(metrics[name], want[name], rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(metrics["group/text"], want["group/text"], rtol=1e-5)
    assert_close_to_largest(state.opt_state.mu, want_state.opt_state.mu, 1e-5, ZERO_GRADIENT)


def test_repeats_equal_explicit_draws(model, batch):
    """R = 4 is the mean of four losses with one of the draws each."""
    params = make_state(model, Optimizer(OPTIM, STEPS)).params
    draws = jax.jit(model.draw, static_argnums=2)(update_key(0, 0), batch, 4)
    loss = jax.jit(lambda d, n: model.loss(params, batch, d, n, LossWeights(1.0, 0.0))[0])
    single = [
        dataclasses.replace(
            draws, diffusion=jax.tree.map(lambda x, r=r: x[:, :, r : r + 1], draws.diffusion)
        )
        for r in range(4)
    ]
    whole = loss(draws, Denominators.of(batch, 4))
    parts = [loss(one, Denominators.of(batch, 1)) for one in single]
    np.testing.assert_allclose(whole, np.mean(parts), rtol=1e-6)
    assert np.std(parts) > 1e-3


def test_draws_follow_from_seed_and_step():
    keys = [jax.random.key_data(update_key(*pair)) for pair in ((0, 0), (0, 1), (1, 0), (0, 1))]
    assert (keys[1] == keys[3]).all()
    assert not (keys[0] == keys[1]).all() and not (keys[0] == keys[2]).all()


def test_frozen_parameters_and_moving_average(model, batch):
    groups = {"all": Group("", lr=1e-2), "vision": Group("vlm/visual/", freeze=True),
              "dino": Group("dino/", freeze=True)}  # fmt: skip
    optimizer = Optimizer(OptimConfig(groups, warmup=0, ema=0.75), STEPS)
    start = jax.device_get(make_state(model, optimizer))
    (one, metrics), (two, _) = run_steps(model, optimizer, [batch] * 2, cfg=CFG)
    assert set(start.frozen) == {"vlm", "dino"} and set(start.frozen["vlm"]) == {"visual"}
    jax.tree.map(np.testing.assert_array_equal, two.frozen, start.frozen)
    trained = {path for path, _ in leaves_by_path(start.params)}
    assert {path for path, _ in leaves_by_path(one.opt_state.mu)} == trained
    assert not any(path.startswith(("vlm/visual", "dino")) for path in trained)
    assert "grad/dino" not in metrics and "grad/dit" in metrics
    want = jax.tree.map(
        lambda a, b, c: 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c,
        start.params, one.params, two.params,
    )  # fmt: skip
    assert_close_to_largest(two.ema, want, 1e-6)


def test_gradients_that_are_not_finite_skip_the_update(plain_run):
    (_, _), (good, _), (one, first), (two, second) = plain_run
    assert [int(m["train/skipped"]) for m in (first, second)] == [1, 2]
    assert not np.isfinite(first["loss/total"])
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(two, name), getattr(good, name))
    assert int(two.step) == 4 and int(one.skipped) == 1 and int(good.skipped) == 0


@pytest.mark.parametrize(
    "mesh", [(2, 2, 2), *(pytest.param(m, marks=pytest.mark.slow) for m in ((1, 8, 1), (8, 1, 1)))]
)
def test_every_mesh_gives_the_same_update(mesh, model, batch, plain_run):
    (state, metrics), (_, second) = run_steps(
        model, Optimizer(OPTIM, STEPS), [batch] * 2, cfg=CFG, mesh=mesh
    )
    want_state, want = plain_run[0]
    for name in ("loss/total", "loss/action", "loss/text", "grad/norm", "grad/bridge"):
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, err_msg=name)
    for moment in ("mu", "nu"):
        got, wanted = (getattr(s.opt_state, moment) for s in (state, want_state))
        assert_close_to_largest(got, wanted, 1e-5, ZERO_GRADIENT)
    np.testing.assert_allclose(second["loss/total"], plain_run[1][1]["loss/total"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (8, 1, 1)])
def test_three_steps_of_gradient_descent_on_every_mesh(mesh, model, batch):
    optimizer = Sgd(OPTIM, STEPS)
    want = run_steps(model, optimizer, [batch] * 3, cfg=CFG)[-1][0].params
    got = run_steps(model, optimizer, [batch] * 3, cfg=CFG, mesh=mesh)[-1][0].params
    assert_close_to_largest(got, want, 1e-6)


def test_loss_norms_add_up(model, batch, plain_run):
    params = make_state(model, Optimizer(OPTIM, STEPS)).params
    key = update_key(CFG.seed, 0)
    norms = jax.device_get(jax.jit(make_loss_norms(model, CFG))(params, batch, key))
    action, text = norms["grad/vlm_action"], norms["grad/vlm_text"]
    total = action**2 + text**2 + 2 * norms["grad/vlm_cosine"] * action * text
    metrics = plain_run[0][1]
    want = metrics["grad/vlm/visual"] ** 2 + metrics["grad/vlm/language_model"] ** 2
    np.testing.assert_allclose(total, want, rtol=1e-4)
