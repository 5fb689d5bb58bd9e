"""Intervals and tests against scipy, closed forms and enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from st4vla_jax.eval.statistics import Rate, compare, mcnemar, paired_bootstrap


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 50), (50, 50), (1, 400), (104, 400), (7, 9)]
)
def test_wilson_equals_scipy(successes, trials):
    want = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    got = Rate(successes, trials).interval()
    np.testing.assert_allclose(got, (want.low, want.high), atol=1e-12)


def test_wilson_ends_solve_the_score_equation():
    rate = Rate(3, 17)
    for end in rate.interval(z=1.5):
        assert abs(rate.value - end) == pytest.approx(1.5 * math.sqrt(end * (1 - end) / 17))


def test_rate_is_written_with_interval_and_count():
    assert str(Rate(104, 400)) == "0.26 [0.22, 0.31] n=400"
    assert str(Rate(0, 0)) == "nan [0.00, 1.00] n=0"
    assert Rate(0, 0).interval() == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes out of 4"):
        Rate(5, 4)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (1, 9), (9, 1), (40, 61), (700, 750)])
def test_mcnemar_equals_the_binomial_test(b, c):
    want = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(want, rel=1e-9)


def test_mcnemar_equals_enumeration():
    """All outcomes of 7 fair coins that are at least as one-sided as 6 to 1."""
    extreme = sum(abs(2 * sum(s) - 7) >= 5 for s in itertools.product((0, 1), repeat=7))
    assert mcnemar(1, 6) == pytest.approx(extreme / 2**7)


def test_compare_counts_pairs():
    first, second = [True, True, True, False, False], [True, False, False, True, False]
    got = compare(first, second)
    assert (got.first, got.second) == (Rate(3, 5), Rate(2, 5))
    assert (got.first_only, got.second_only, got.p_value) == (2, 1, 1.0)
    assert compare([], []).p_value == 1.0
    with pytest.raises(ValueError, match="same seeds"):
        compare([True], [True, False])


def test_bootstrap_interval_of_a_mean():
    """Close to the normal interval of the mean difference, and the pairing matters."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(400)
    noise = rng.standard_normal(400) * 0.1
    mean, low, high = paired_bootstrap(shared + 0.05 + noise, shared, resamples=2000)
    half = 1.96 * noise.std() / math.sqrt(400)
    assert mean == pytest.approx(0.05 + noise.mean())
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.2 * half)
    again = paired_bootstrap(shared + 0.05 + noise, shared, resamples=2000)
    assert again == (mean, low, high)
    for bad in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired_bootstrap(*bad)
