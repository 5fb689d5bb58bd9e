import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.normalize import MOMENTS, Statistics, StatisticsError
from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.robot_spec import Part, RobotSpec, StandardEpisode
from st4vla_jax.data.stats import (
    EmbodimentAccumulator,
    FieldAccumulator,
    accumulate,
    foreign_statistics,
)

SPEC = RobotSpec(
    "toy", "arm", {"primary": "image"}, "text", (Part("action"),), names=("x", "grip"),
    units=("m", ""), gripper=(1,), absolute=(1,),
)  # fmt: skip
SCALES = np.array([1e-3, 1, 3e4, 1e-30, 0], np.float32)


def rows_of(seed, count):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, size=(count, len(SCALES))) * SCALES + [0, 5, 0, 0, 2]).astype("f")


def filled(pieces, exact_rows):
    accumulator = FieldAccumulator(pieces[0].shape[1], exact_rows)
    for piece in pieces:
        accumulator.update(piece)
    return accumulator


def assert_same(one, two):
    for name in (*MOMENTS, "mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def episodes(seed, count, state=None):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        steps = int(rng.integers(1, 9))
        actions = rng.normal(size=(steps, 2)).astype(np.float32)
        proprioception = None if state is None else rng.normal(size=(steps, state)).astype("f")
        yield StandardEpisode(actions, proprioception, np.arange(steps))


@pytest.mark.parametrize("count", [1, 2, 100, 101, 5000])
def test_statistics_are_numpys(count):
    rows = rows_of(0, count)
    result = filled(np.array_split(rows, 7), 10_000).result([True, True, True, True, False])
    wide = rows.astype(np.float64)
    q01, q99 = np.quantile(wide, [0.01, 0.99], axis=0)
    expected = {
        "mean": wide.mean(0), "std": wide.std(0), "min": wide.min(0), "max": wide.max(0),
        "q01": q01, "q99": q99,
    }  # fmt: skip
    for name, value in expected.items():
        # The reference is summed in f64: its error scales with the size of the numbers.
        slack = 1e-14 * abs(wide).max(0)
        assert np.all(abs(getattr(result, name) - value) <= slack), name
    assert result.std[4] == 0 and result.mean[4] == 2
    np.testing.assert_array_equal(result.mask, [True, True, True, True, False])


@pytest.mark.parametrize("exact_rows", [10**6, 200])
def test_buckets_keep_quantiles_within_the_documented_error(exact_rows):
    rows = rows_of(1, 3000)
    result = filled([rows], exact_rows).result(np.ones(5, bool))
    # At ranks that are order statistics, so that no interpolation hides the error.
    wide = np.sort(rows.astype(np.float64), axis=0)
    for name, rank in (("q01", 0.01 * 2999), ("q99", 0.99 * 2999)):
        low, high = wide[int(rank)], wide[int(rank) + 1]
        slack = 2.0**-12 * np.maximum(abs(low), abs(high)) * (exact_rows < 3000)
        value = getattr(result, name)
        assert np.all((value >= low - slack) & (value <= high + slack))
    if exact_rows < 3000:
        exact = filled([rows], 10**6).result(np.ones(5, bool))
        assert np.any(result.q99 != exact.q99)
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_array_equal(getattr(result, name), getattr(exact, name))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 120), max_size=4),
    exact_rows=st.sampled_from([10, 60, 10**6]),
    data=st.data(),
)
def test_merging_equals_one_pass_bit_for_bit(seed, count, cuts, exact_rows, data):
    rows = rows_of(seed, count)[:, :2]
    whole = filled([rows], exact_rows).result([True, False])
    pieces = np.split(rows, sorted(min(cut, count) for cut in cuts))
    pieces = [pieces[i] for i in data.draw(st.permutations(range(len(pieces))))]
    parts = [filled([piece], exact_rows) for piece in pieces]
    while len(parts) > 1:  # any tree of merges
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i].merge(parts.pop(i + 1))
    assert parts[0].rows == count
    assert_same(parts[0].result([True, False]), whole)


def test_merging_leaves_the_other_as_it_was():
    one, two = filled([rows_of(0, 20)], 50), filled([rows_of(1, 40)], 50)
    before = two.result(np.ones(5, bool))
    one.merge(two)
    assert_same(two.result(np.ones(5, bool)), before)


@pytest.mark.parametrize("exact_rows", [10, 1])
def test_zeros_and_subnormals(exact_rows):
    rows = np.array([[-0.0, 1e-42], [0.0, -3e-45], [0.0, 0.0]], np.float32)
    result = filled([rows], exact_rows).result([True] * 2)
    assert result.mean[0] == result.std[0] == result.q01[0] == result.q99[0] == 0
    np.testing.assert_allclose(result.mean[1], rows[:, 1].astype(float).mean(), rtol=1e-15)
    assert result.min[1] <= result.q01[1] <= 0 <= result.q99[1] <= result.max[1]


def test_short_numbers_lose_nothing_in_buckets():
    rows = np.repeat(np.array([[-0.5, 0.25]], np.float32), 101, axis=0)
    rows[0], rows[1] = -8, 8
    result = filled([rows], 1).result([True, True])
    np.testing.assert_array_equal(result.q01, [-0.5, 0.25])
    np.testing.assert_array_equal(result.q99, [-0.5, 0.25])


def test_unusable_rows_are_refused():
    accumulator = FieldAccumulator(2)
    with pytest.raises(StatisticsError, match="finite"):
        accumulator.update(np.array([[0, np.nan]], np.float32))
    with pytest.raises(StatisticsError, match=r"\(1, 3\) for 2"):
        accumulator.update(np.zeros((1, 3), np.float32))
    with pytest.raises(StatisticsError, match="no rows"):
        accumulator.result([True, True])
    with pytest.raises(StatisticsError, match="cannot merge"):
        accumulator.merge(FieldAccumulator(2, exact_rows=3))


def test_embodiments_merge_and_travel_through_upstreams_schema(tmp_path):
    whole = accumulate(SPEC, [*episodes(0, 30, state=3), *episodes(1, 20, state=3)])
    merged = accumulate(SPEC, episodes(0, 30, state=3))
    merged.merge(accumulate(SPEC, episodes(1, 20, state=3)))
    one, two = whole.result(), merged.result()
    assert_same(one.action, two.action)
    assert_same(one.state, two.state)
    assert (two.num_trajectories, two.num_transitions) == (50, one.num_transitions)
    np.testing.assert_array_equal(two.action.mask, [True, False])
    SPEC.action_spec.check(two.action, "arm")
    Statistics({"arm": two}).save(tmp_path / "s.json")
    loaded = Statistics.load(tmp_path / "s.json")["arm"]
    assert_same(loaded.action, two.action)
    assert loaded.num_transitions == two.num_transitions


def test_an_empty_accumulator_merges_into_and_with_anything():
    full, empty = accumulate(SPEC, episodes(0, 5, state=3)), EmbodimentAccumulator(SPEC)
    expected = full.result()
    full.merge(EmbodimentAccumulator(SPEC))
    empty.merge(full)
    assert_same(empty.result().state, expected.state)
    with pytest.raises(StatisticsError, match="no rows"):
        EmbodimentAccumulator(SPEC).result()


def test_states_and_actions_of_one_embodiment_must_agree():
    for other in (None, 4):
        accumulator = accumulate(SPEC, episodes(0, 5, state=3))
        with pytest.raises(StatisticsError, match="arm: states of 3 and"):
            accumulator.merge(accumulate(SPEC, episodes(1, 5, state=other)))
        with pytest.raises(StatisticsError, match="arm: states of 3 and"):
            accumulator.update(next(episodes(1, 1, state=other)))
    with pytest.raises(StatisticsError, match="bridge_orig and toy share the embodiment 'arm'"):
        accumulate(SPEC, episodes(0, 1)).merge(EmbodimentAccumulator(SPECS["bridge_orig"]))


def test_statistics_of_other_data_are_told():
    own = list(episodes(0, 5, state=3))
    entry = accumulate(SPEC, own).result()
    assert foreign_statistics("arm", own, entry) is None
    assert foreign_statistics("arm", list(episodes(1, 5, state=3)), entry) is None
    for factor, named in ((30.0, "lie outside"), (0.001, "spread is 0.001")):
        other = [dataclasses.replace(e, actions=e.actions * factor) for e in own]
        text = foreign_statistics("arm", other, entry)
        assert text.startswith("arm: the statistics are of other data") and named in text
