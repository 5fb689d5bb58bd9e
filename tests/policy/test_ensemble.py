"""Executors against upstream's loop, written out, and hand-computed cases."""

import numpy as np
import pytest

from st4vla_jax.policy.ensemble import AdaptiveEnsemble, RecedingHorizon, TemporalEnsemble


def chunks(count, steps=4, size=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, steps, size)).astype(np.float32)


def test_receding_horizon_executes_the_start_of_each_chunk():
    executor, (a, b) = RecedingHorizon(2), chunks(2)
    assert executor.hungry
    executor.add(a)
    assert not executor.hungry
    np.testing.assert_array_equal([executor.next(), executor.next()], a[:2])
    assert executor.hungry
    executor.add(b)
    np.testing.assert_array_equal(executor.next(), b[0])
    with pytest.raises(ValueError, match="execute 5, but the policy's chunks have 4"):
        RecedingHorizon(5).add(a)
    with pytest.raises(ValueError, match="at least 1"):
        RecedingHorizon(0)


def reference_adaptive(history, horizon, alpha):
    """Upstream's adaptive_ensemble.py, rewritten: history of all chunks, the newest last."""
    recent = history[-horizon:]
    n = len(recent)
    predictions = np.stack([recent[i][n - 1 - i] for i in range(n)])
    ref = predictions[n - 1]
    dots = np.sum(predictions * ref, axis=1)
    cos = dots / (np.linalg.norm(predictions, axis=1) * np.linalg.norm(ref) + 1e-7)
    weights = np.exp(alpha * cos)
    weights = weights / weights.sum()
    return np.sum(weights[:, None] * predictions, axis=0)


@pytest.mark.parametrize(("horizon", "alpha"), [(7, 0.1), (2, 0.1), (3, 5.0), (1, 0.1)])
def test_adaptive_equals_upstream(horizon, alpha):
    executor, history = AdaptiveEnsemble(horizon, alpha), []
    for chunk in chunks(12, steps=8):
        assert executor.hungry
        executor.add(chunk)
        history.append(chunk)
        want = reference_adaptive(history, horizon, alpha)
        np.testing.assert_allclose(executor.next(), want, rtol=1e-5, atol=1e-6)


def test_adaptive_prefers_the_mode_of_the_newest():
    executor = AdaptiveEnsemble(3, alpha=20.0)
    for direction in (1, -1, 1):
        executor.add(np.full((4, 2), direction, np.float32))
    np.testing.assert_allclose(executor.next(), [1, 1], atol=1e-6)
    zero = AdaptiveEnsemble(2)
    zero.add(np.zeros((2, 3), np.float32))
    assert np.isfinite(zero.next()).all()


def test_temporal_weights_the_oldest_most():
    executor = TemporalEnsemble(horizon=8, decay=np.log(2))
    values = [(1, 10, 100), (2, 20, 200), (4, 40, 400), (8, 80, 800)]
    got = []
    for steps in values:
        executor.add(np.array(steps, np.float32)[:, None])
        got.append(float(executor.next()[0]))
    # Step 2 hears 100, 20 and 4 with weights 1, 1/2, 1/4; at step 3 the first chunk has ended.
    want = [1, (10 + 2 / 2) / 1.5, (100 + 20 / 2 + 4 / 4) / 1.75, (200 + 40 / 2 + 8 / 4) / 1.75]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_plain_mean_and_horizon():
    for executor in (TemporalEnsemble(2, decay=0), AdaptiveEnsemble(2, alpha=0)):
        a, b, c = chunks(3)
        for chunk in (a, b, c):
            executor.add(chunk)
        np.testing.assert_allclose(executor.next(), (b[1] + c[0]) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        TemporalEnsemble(0)


def test_an_action_that_is_not_finite_stays_visible():
    executor = AdaptiveEnsemble(2)
    executor.add(np.full((3, 2), np.nan, np.float32))
    assert np.isnan(executor.next()).all()
