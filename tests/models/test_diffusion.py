import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.models.diffusion import (
    ddim_indices,
    ddim_sample,
    guided,
    make_alphas_cumprod,
    make_betas,
    q_sample,
    sample_keys,
    training_draws,
)
from tests.reference import golden


@pytest.mark.parity
def test_schedule_equals_golden(shared):
    want = golden.load(shared)
    np.testing.assert_allclose(make_betas(), want["betas"], rtol=1e-12)
    np.testing.assert_allclose(make_alphas_cumprod(), want["alphas_cumprod"], rtol=1e-9)
    spaced = make_alphas_cumprod()[list(ddim_indices(10))]
    np.testing.assert_allclose(spaced, want["ddim10_spaced_alphas_cumprod"], rtol=1e-9)


@pytest.mark.parity
def test_q_sample_equals_golden(shared):
    x0, noise = golden.wave((2, 16, 7), 0.8, 0.2), golden.wave((2, 16, 7), 1, 2.0)
    got = q_sample(jnp.asarray(x0), jnp.asarray(noise), jnp.asarray([3, 77]))
    golden.assert_matches(got, golden.load(shared)["q_sample"]["out"], 1e-5)


def test_q_sample_broadcasts_over_repeats():
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.normal(size=(2, 3, 1, 4, 5)), jnp.float32)
    noise = jnp.asarray(rng.normal(size=(2, 3, 6, 4, 5)), jnp.float32)
    t = jnp.asarray(rng.integers(0, 100, (2, 3, 6)), jnp.int32)
    got, kept = q_sample(x0, noise, t), make_alphas_cumprod()[np.asarray(t)]
    for i in np.ndindex(t.shape):
        want = np.sqrt(kept[i]) * x0[i[:2]][0] + np.sqrt(1 - kept[i]) * noise[i]
        np.testing.assert_allclose(got[i], want, atol=1e-6)


# spec/upstream.md 1.8, run on upstream's code.
STRIDES = {3: 34, 4: 25, 5: 20, 6: 17, 7: 15, 8: 13, 10: 10, 15: 7, 20: 5, 25: 4, 50: 2, 100: 1}


@pytest.mark.parity
@pytest.mark.parametrize(("count", "stride"), STRIDES.items())
def test_ddim_index_rule(count, stride):
    assert ddim_indices(count) == tuple(range(0, 100, stride))


def test_ddim_index_rule_at_its_ends():
    assert ddim_indices(1) == (50,)
    assert ddim_indices(2) == (0, 50)


@pytest.mark.parametrize("count", [0, 16, 19, 30, 101, -1])
def test_unreachable_ddim_counts_name_the_reachable_ones(count):
    with pytest.raises(ValueError, match=r"choose one of 1, 2, 3, .*17, 20, 25, 34, 50, 100$"):
        ddim_indices(count)


@pytest.mark.parametrize("count", [1, 5, 10, 100])
def test_ddim_equals_a_numpy_loop(count):
    rng = np.random.default_rng(0)
    noise, mix = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(5, 5)) / 5

    def eps(x, t, module):
        return module.tanh(x @ mix) + 0.01 * t[..., None, None]

    kept, x = make_alphas_cumprod(), noise
    indices = ddim_indices(count)
    for n in reversed(range(count)):
        e = eps(x, np.full((2, 3), indices[n]), np)
        before = kept[indices[n - 1]] if n else 1.0
        x0 = (x - np.sqrt(1 - kept[indices[n]]) * e) / np.sqrt(kept[indices[n]])
        x = np.sqrt(before) * x0 + np.sqrt(1 - before) * e
    got = jax.jit(lambda z: ddim_sample(lambda x, t: eps(x, t, jnp), z, count))(
        jnp.asarray(noise, jnp.float32)
    )
    # 100 steps start at an abar of 2.4e-7, which multiplies rounding by 2000
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


def test_guidance_combines_both_predictions_in_one_call():
    calls = []

    def denoise(x, t, condition):
        calls.append((x.shape, t.shape, condition.shape))
        return x * jnp.mean(condition, axis=(-1, -2))[..., None, None] + t[..., None, None]

    x, t = jnp.ones((2, 3, 4, 5)), jnp.full((2, 3), 7)
    condition = jnp.arange(6.0).reshape(2, 3, 1, 1) * jnp.ones((2, 3, 8, 6))
    got = guided(denoise, condition, jnp.full((8, 6), -1.0), 1.5)(x, t)
    want = np.broadcast_to(7 - 1 + 1.5 * (condition.mean((-1, -2)) + 1)[..., None, None], x.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert calls == [((2, 3, 2, 4, 5), (2, 3, 2), (2, 3, 2, 8, 6))]


def test_guidance_of_one_never_evaluates_the_unconditional():
    got = guided(lambda x, t, c: x + c.sum(), jnp.ones((2, 3)), None, 1.0)(jnp.zeros((4, 5)), 0)
    np.testing.assert_array_equal(got, 6)
    with pytest.raises(ValueError, match="at least 1"):
        guided(None, None, None, 0.5)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    keys = sample_keys(jax.random.key(3), 4, 2)
    draw = jax.jit(lambda k: training_draws(k, 3, 4, 5, 100, 0.5))
    whole = draw(keys)
    parts = [draw(keys[i : i + 2]) for i in (0, 2)]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert whole.noise.shape == (4, 2, 3, 4, 5)
    assert len(np.unique(whole.noise)) == whole.noise.size  # no two samples share a draw
    other = draw(sample_keys(jax.random.key(4), 4, 2))
    assert not np.any(np.asarray(other.noise) == np.asarray(whole.noise))


def test_draws_have_the_distributions_they_should():
    draw = jax.jit(lambda k: training_draws(sample_keys(k, 20, 25), 8, 4, 5, 100, 0.1))
    draws = draw(jax.random.key(0))
    noise, drop = np.asarray(draws.noise), np.asarray(draws.drop)
    assert draws.timesteps.shape == drop.shape == (20, 25, 8)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert draws.timesteps.min() == 0
    assert draws.timesteps.max() == 99
    counts = np.bincount(np.asarray(draws.timesteps).ravel() // 10, minlength=10)
    assert np.abs(counts / 400 - 1).max() < 0.25
    assert abs(drop.mean() - 0.1) < 0.02
