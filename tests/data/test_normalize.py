"""Normalisation: upstream's formulas, exact inverses, errors that name the key."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.normalize import (
    MODES,
    MOMENTS,
    ActionSpec,
    Statistics,
    StatisticsError,
)

# Dimension 2 never varied; dimension 3 is the gripper.
TREE = {
    "oxe_bridge": {
        "action": {
            "mean": [0.1, -0.2, 0.5, 0.6],
            "std": [0.3, 2.0, 0.0, 0.4],
            "max": [1.5, 4.0, 0.5, 1.0],
            "min": [-1.0, -8.0, 0.5, 0.0],
            "q01": [-0.5, -6.0, 0.5, 0.0],
            "q99": [1.0, 2.0, 0.5, 1.0],
            "mask": [True, True, True, False],
        },
        "state": {name: [0.0, 1.0] for name in MOMENTS},
        "num_transitions": 250,
        "num_trajectories": 25,
    }
}
ACTION = Statistics.from_dict(TREE)["oxe_bridge"].action


def reference(x, mode):
    """Spec upstream.md 4.3, one number at a time."""
    out = []
    for i, value in enumerate(x):
        stat = {name: TREE["oxe_bridge"]["action"][name][i] for name in (*MOMENTS, "mask")}
        if not stat["mask"]:
            out.append(1.0 if value > 0.5 else 0.0)
        elif mode == "mean_std":
            out.append((value - stat["mean"]) / stat["std"] if stat["std"] else value)
        elif mode == "min_max":
            low, high = stat["min"], stat["max"]
            out.append(2 * (value - low) / (high - low) - 1 if high > low else 0.0)
        else:
            low, high = stat["q01"], stat["q99"]
            y = 2 * (value - low) / (high - low) - 1 if high > low else value
            out.append(min(max(y, -1.0), 1.0))
    return out


VALUES = st.lists(st.floats(-20, 20), min_size=4, max_size=4)


@pytest.mark.parametrize("mode", MODES)
@given(x=VALUES)
def test_formulas(mode, x):
    ours = ACTION.normalize(np.array(x), mode)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference(x, mode), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=100)
@given(fraction=st.lists(st.floats(0, 1), min_size=2, max_size=2), gripper=st.sampled_from([0, 1]))
def test_inverse_within_the_range(mode, fraction, gripper):
    low, high = (ACTION.q01, ACTION.q99) if mode == "q99" else (ACTION.min, ACTION.max)
    x = np.array([*(low + (high - low) * [*fraction, 0, 0])[:2], 0.5, gripper])
    y = ACTION.normalize(x, mode)
    np.testing.assert_allclose(ACTION.unnormalize(y, mode), x, rtol=1e-5, atol=1e-6)


@given(y=VALUES)
def test_unnormalize_equals_upstream_under_q99(y):
    ours = ACTION.unnormalize(np.array(y), "q99")
    # Spec upstream.md 5.4, with the mask in the place of index 6.
    clipped = np.clip(y, -1, 1)
    expected = 0.5 * (clipped + 1) * (ACTION.q99 - ACTION.q01) + ACTION.q01
    expected[3] = 0.0 if clipped[3] < 0.5 else 1.0
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_clipping_by_mode():
    y = np.array([3.0, -3.0, 3.0, 0.4])
    np.testing.assert_allclose(ACTION.unnormalize(y, "q99"), [1.0, -6.0, 0.5, 0.0])
    np.testing.assert_allclose(ACTION.unnormalize(y, "min_max"), [1.5, -8.0, 0.5, 0.0])
    np.testing.assert_allclose(ACTION.unnormalize(y, "mean_std"), [1.0, -6.2, 0.5, 0.0], rtol=1e-6)


def test_a_gripper_exactly_at_the_threshold():
    """Spec upstream.md 4.3 and 5.4: 0.5 is normalised to 0, and un-normalised to 1."""
    half = np.full(4, 0.5)
    assert ACTION.normalize(half, "q99")[3] == 0
    assert ACTION.unnormalize(half, "q99")[3] == 1


def test_any_leading_shape_and_any_gripper_index():
    tree = copy.deepcopy(TREE)
    tree["oxe_bridge"]["action"]["mask"] = [False, True, True, True]
    action = Statistics.from_dict(tree)["oxe_bridge"].action
    x = np.zeros((2, 3, 4))
    x[1, 2] = (0.7, 2.0, 0.5, 0.5)
    y = action.normalize(x, "q99")
    assert y.shape == (2, 3, 4)
    np.testing.assert_allclose(y[1, 2], [1.0, 1.0, 0.5, 0.0])
    with pytest.raises(StatisticsError, match="4 dimensions"):
        action.normalize(np.zeros((2, 7)), "q99")
    with pytest.raises(StatisticsError, match="q99, min_max, mean_std"):
        action.normalize(x, "quantile")


def test_save_and_load_keep_upstreams_schema(tmp_path):
    path = tmp_path / "dataset_statistics.json"
    Statistics.from_dict(TREE).save(path)
    assert json.loads(path.read_text()) == TREE
    loaded = Statistics.load(path)
    assert loaded.to_dict() == TREE
    assert list(loaded) == ["oxe_bridge"]
    assert len(loaded) == 1
    assert "oxe_bridge" in loaded
    assert "franka" not in loaded
    np.testing.assert_array_equal(loaded["oxe_bridge"].action.q99, ACTION.q99)


def test_state_is_optional():
    tree = copy.deepcopy(TREE)
    del tree["oxe_bridge"]["state"]
    loaded = Statistics.from_dict(tree)
    assert loaded["oxe_bridge"].state is None
    assert loaded.to_dict() == tree


def test_unknown_embodiment_lists_those_there_are():
    with pytest.raises(StatisticsError, match="'franka'; there are oxe_bridge"):
        Statistics.from_dict(TREE)["franka"]


def edited(key, value):
    tree = copy.deepcopy(TREE)
    node = tree["oxe_bridge"]
    *path, last = key.split(".")
    for name in path:
        node = node[name]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("action.q01", None, "oxe_bridge.action.q01: expected a flat list"),
        ("action.q99", [1.0, float("nan"), 0.5, 1.0], r"action.q99: not finite in dimensions \[1"),
        ("action.q99", [1.0, 10**400, 0.5, float("inf")], r"q99: not finite in dimensions \[1, 3"),
        ("action.mean", [[0.1], [0.2], [0.3], [0.4]], "action.mean: expected a flat list"),
        ("action.mean", ["0.1"] * 4, "action.mean: expected a flat list"),
        ("action.std", [0.1] * 3, "oxe_bridge.action: lists of different lengths"),
        ("action.std", [0.1, -1, 0.1, 0.1], r"action.std: negative in dimensions \[1\]"),
        ("action.q01", [2.0, -6.0, 0.5, 0.0], r"action.q01: over q99 in dimensions \[0\]"),
        ("action.mask", None, "oxe_bridge.action.mask: expected a list of true and false"),
        ("action.mask", [1, 1, 1, 0], "oxe_bridge.action.mask"),
        ("state.min", [], "oxe_bridge.state.min"),
        ("action", None, "oxe_bridge.action: expected an object"),
        ("num_transitions", 2.5, "oxe_bridge.num_transitions: expected a count"),
    ],
)
def test_bad_statistics_name_the_key(key, value, message):
    with pytest.raises(StatisticsError, match=message):
        Statistics.from_dict(edited(key, value))


def test_all_problems_at_once_and_the_file_is_named(tmp_path):
    tree = edited("action.q01", [float("nan")] * 4)
    tree["oxe_bridge"]["num_trajectories"] = -1
    tree["franka"] = []
    path = tmp_path / "s.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(StatisticsError) as e:
        Statistics.load(path)
    for text in (str(path), "action.q01", "num_trajectories", "franka: expected an object"):
        assert text in str(e.value)
    for content in ("{", "[]", "{}", "3"):
        path.write_text(content)
        with pytest.raises(StatisticsError, match=r"s\.json"):
            Statistics.load(path)


def test_action_spec():
    spec = ActionSpec()
    assert len(spec.names) == 7
    assert spec.gripper == (6,)
    arm = ActionSpec(("a", "b", "c", "grip"), ("m", "m", "m", ""), 10.0, (3,))
    arm.check(ACTION, "oxe_bridge")
    with pytest.raises(StatisticsError, match=r"'oxe_bridge' have 4 and mask out \(3,\)"):
        spec.check(ACTION, "oxe_bridge")
    with pytest.raises(StatisticsError) as e:
        ActionSpec(("a",), (), 0.0, (1,), "quantile")
    for text in ("1 names but 0 units", "control_hz", "gripper", "mode"):
        assert text in str(e.value)
