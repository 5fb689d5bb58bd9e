import dataclasses
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.primitives import (
    binarize,
    decode_instruction,
    quaternion_to_euler,
    rel2abs,
    relabel,
    unpack_zlib,
)
from st4vla_jax.data.robot_spec import Part, RobotSpec, SpecError
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.stats import accumulate

GRIPPERS = st.lists(
    st.sampled_from([-1.0, -0.5, -0.1, -0.05, 0.0, 0.04, 0.05, 0.1, 0.11, 0.5, 0.95, 0.96, 1.0]),
    min_size=1,
    max_size=12,
)


def column(*values):
    return np.array(values, np.float32)[:, None]


def spec(**changes):
    settings = {
        "name": "mine", "embodiment": "arm", "images": {"primary": "observation/image"},
        "language": "language_instruction", "action": (Part("action"),),
    }  # fmt: skip
    return RobotSpec(**settings | changes)


# The primitives in their published form: one step after another, in Python.


def scan_binarize(values):
    carry, out = float(values[-1]), []
    for value in values[::-1]:
        if value > 0.95 or value < 0.05:
            carry = float(value > 0.95)
        out.append(carry)
    return out[::-1]


def scan_rel2abs(values):
    events = [(-1 if value > 0 else 1) if abs(value) > 0.1 else 0 for value in values]
    first = next((event for event in events if event), 0)
    carry, out = -first if first else 1, []
    for event in events:
        carry = event or carry
        out.append((carry + 1) / 2)
    return out


@settings(max_examples=200, deadline=None)
@given(GRIPPERS)
def test_grippers_equal_a_scan_over_the_steps(values):
    values = np.array(values, np.float32)
    two = np.stack([values, values[::-1]], axis=1)
    for primitive, scan in ((binarize, scan_binarize), (rel2abs, scan_rel2abs)):
        expected = np.stack([scan(two[:, 0]), scan(two[:, 1])], axis=1)
        result = primitive(two)
        np.testing.assert_array_equal(result, expected.astype(np.float32))
        assert result.dtype == np.float32


def test_grippers_by_hand():
    np.testing.assert_array_equal(
        binarize(column(0.5, 0.99, 0.6, 0.4, 0.01, 0.96, 0.3)), column(1, 1, 0, 0, 0, 1, 0.3)
    )
    np.testing.assert_array_equal(
        rel2abs(column(0, 0.05, 1, 0, -0.2, 0.1, -0.05)), column(1, 1, 0, 0, 1, 1, 1)
    )
    np.testing.assert_array_equal(rel2abs(column(0, -1, 0)), column(0, 1, 1))
    np.testing.assert_array_equal(rel2abs(column(0, 0.1)), column(1, 1))


@pytest.mark.parity
def test_euler_angles_are_scipys():
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(0)
    quaternion = rng.normal(size=(2000, 4)).astype(np.float32)
    expected = Rotation.from_quat(quaternion.astype(np.float64)).as_euler("xyz")
    assert abs(quaternion_to_euler(quaternion) - expected).max() < 2e-7


def test_euler_angles_rebuild_the_rotation():
    rng = np.random.default_rng(1)
    quaternion = rng.normal(size=(300, 4)).astype(np.float32)
    locked = [[0.5, s * 0.5, t * 0.5, u * 0.5] for s in (1, -1) for t in (1, -1) for u in (1, -1)]
    quaternion = np.concatenate([quaternion, np.array(locked, np.float32)])
    for q, (roll, pitch, yaw) in zip(quaternion, quaternion_to_euler(quaternion), strict=True):
        x, y, z, w = q / np.linalg.norm(q)
        # Rodrigues: R = I + 2 w K + 2 K K with K the cross product matrix.
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        expected = np.eye(3) + 2 * w * cross + 2 * cross @ cross
        c, s = np.cos, np.sin
        about_x = np.array([[1, 0, 0], [0, c(roll), -s(roll)], [0, s(roll), c(roll)]])
        about_y = np.array([[c(pitch), 0, s(pitch)], [0, 1, 0], [-s(pitch), 0, c(pitch)]])
        about_z = np.array([[c(yaw), -s(yaw), 0], [s(yaw), c(yaw), 0], [0, 0, 1]])
        np.testing.assert_allclose(about_z @ about_y @ about_x, expected, atol=2e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_straight_up_or_down_has_no_yaw(sign):
    half = np.pi / 4
    for roll in np.linspace(-3, 3, 13):
        # (0, sin, 0, cos)(pitch / 2) after (sin, 0, 0, cos)(roll / 2), x y z w.
        s, c = np.sin(roll / 2), np.cos(roll / 2)
        q = [np.cos(half) * s, sign * np.sin(half) * c, -sign * np.sin(half) * s, np.cos(half) * c]
        euler = quaternion_to_euler(np.array([q], np.float32))[0]
        np.testing.assert_allclose(euler, [roll, sign * np.pi / 2, 0], atol=5e-4)
        assert euler[2] == 0


def test_relabelling_does_not_wrap_angles():
    state = np.array([[0.0, 3.1], [0.5, -3.1], [0.25, -3.0]], np.float32)
    np.testing.assert_allclose(relabel(state), [[0.5, -6.2], [-0.25, 0.1]], atol=1e-6)


def test_packed_floats():
    rows = np.arange(6, dtype="<f4").reshape(2, 3)
    packed = np.array([zlib.compress(row.tobytes()) for row in rows], object)
    np.testing.assert_array_equal(unpack_zlib(packed), rows)
    for bad in (b"not zlib", zlib.compress(b"12345"), zlib.compress(rows.tobytes()), 3.0):
        with pytest.raises(BadRecordError, match="zlib-packed"):
            unpack_zlib(np.array([packed[0], bad], object))


def test_instructions():
    points = np.zeros(16, np.int32)
    points[:4] = [ord("p"), ord("ü"), 0, ord("x")]
    assert decode_instruction(points, "code_points") == "pü"
    assert decode_instruction(np.zeros(4, np.int32), "code_points") == ""
    assert decode_instruction(" pick ü\n".encode(), "text") == "pick ü"
    assert decode_instruction("pick", "text") == "pick"
    for value, encoding in ((b"\xff", "text"), (np.array([-1]), "code_points")):
        with pytest.raises(BadRecordError, match=encoding):
            decode_instruction(value, encoding)


# Recipes.


def test_parts_slice_scale_and_apply_operations_in_order():
    recipe = (
        Part("a", (-3, -1), scale=0.5, offset=1),
        Part("b", ops=("clip", "invert")),
        Part(constant=(7, 8)),
    )
    toy = spec(action=recipe, names=tuple("abcde"), units=("",) * 5, gripper=(), absolute=())
    episode = toy.standardize({"a": np.arange(8).reshape(2, 4), "b": np.array([3, 0.25])})
    np.testing.assert_array_equal(episode.actions, [[1.5, 2, 0, 7, 8], [3.5, 4, 0.75, 7, 8]])
    assert episode.actions.dtype == np.float32
    assert episode.state is None
    np.testing.assert_array_equal(episode.steps, [0, 1])
    assert toy.columns == ("a", "b")


@pytest.mark.parametrize(("skip_first", "kept"), [(0, [0, 1, 2]), (1, [1, 2])])
def test_relabelled_steps_keep_their_numbers(skip_first, kept):
    state = np.array([[0, 0.0], [1, 0], [3, 1], [6, 1]], np.float32)
    toy = spec(
        action=(Part("s", (0, 1), ops=("relabel",)), Part("s", (1, 2))), state=(Part("s"),),
        names=("x", "grip"), units=("m", ""), gripper=(1,), absolute=(1,), skip_first=skip_first,
    )  # fmt: skip
    episode = toy.standardize({"s": state, "unused": np.zeros(1)})
    np.testing.assert_array_equal(episode.steps, kept)
    np.testing.assert_array_equal(episode.state, state[kept])
    np.testing.assert_array_equal(episode.actions[:, 0], np.array([1, 2, 3])[kept])
    np.testing.assert_array_equal(episode.actions[:, 1], state[kept, 1])
    short = {"s": state[: 1 + skip_first]}
    with pytest.raises(BadRecordError, match=f"of {1 + skip_first} steps; mine needs at least"):
        toy.standardize(short)


def test_unusable_episodes_name_column_and_steps():
    actions = np.zeros((5, 7), np.float32)
    actions[3, 2] = np.nan
    with pytest.raises(BadRecordError, match=r"column action: not finite at steps \[3\]"):
        spec(skip_first=1).standardize({"action": actions})
    with pytest.raises(BadRecordError, match="different lengths"):
        spec(state=(Part("s"),)).standardize({"action": actions[:2], "s": actions})
    with pytest.raises(BadRecordError, match="episode of 0 steps"):
        spec().standardize({"action": actions[:0]})
    with pytest.raises(SpecError, match="reads columns action; there are other"):
        spec().standardize({"other": actions})
    with pytest.raises(SpecError, match="gives 6 dimensions for 7 names"):
        spec(action=(Part("action", (0, 6)),)).standardize({"action": actions[:3]})


# A user's own robot.


def test_a_spec_survives_json():
    for entry in SPECS.values():
        assert RobotSpec.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry


def test_all_problems_of_a_config_are_listed_at_once():
    tree = {
        "name": "mine",
        "embodimnt": "arm",
        "images": ["observation/image"],
        "action": [{"colum": "action"}, "clip"],
    }
    with pytest.raises(SpecError) as error:
        RobotSpec.from_dict(tree)
    for text in (
        "unknown key 'embodimnt', did you mean 'embodiment'?",
        "missing 'embodiment'",
        "missing 'language'",
        "action[0]: unknown key 'colum', did you mean 'column'?",
        "action[1]: expected an object",
        "images: expected an object",
    ):
        assert text in str(error.value)
    with pytest.raises(SpecError) as error:
        spec(
            action=(Part(constant=(1,)), Part("a", ops=("binarise",)), Part(), Part("a", (0, "3"))),
            state=(Part("s", encoding="gzip", scale="2"),),
            language="",
            language_encoding="utf-7",
            state_encoding="quat",
            names=("x",),
            mode="q98",
            absolute=(1,),
            skip_first=-1,
        )
    for text in (
        "action[1].ops: unknown 'binarise', did you mean 'binarize'?",
        "action[2]: needs either a column or a constant",
        "action[3].dims: expected",
        "state[0].encoding: 'gzip'",
        "state[0]: scale, offset and constant must be numbers",
        "language: expected text",
        "language_encoding: 'utf-7'",
        "state_encoding: 'quat'",
        "1 names but 7 units",
        "gripper (6,) is outside 0..0",
        "mode 'q98'",
        "absolute: (1,) is outside 0..0",
        "skip_first: expected a count",
    ):
        assert text in str(error.value), text
    with pytest.raises(SpecError, match="no part reads a column"):
        spec(action=(Part(constant=(0,) * 7),))


# The real Bridge episodes, read by hand.


def bridge_episodes(shared: Path, split="train"):
    path = shared / f"data/bridge_dataset/1.0.0/bridge_dataset-{split}.tfrecord-00000-of-00001"
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        example = tf_example_pb2.Example.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        features = example.features.feature
        yield {
            path: np.array(features[f"steps/{path}"].float_list.value, "f").reshape(-1, 7)
            for path in ("action", "observation/state")
        }


def expected_bridge(columns, first):
    """openvla's bridge_orig, step by step in Python."""
    state, action = columns["observation/state"][first:], columns["action"][first:]
    gripper = scan_binarize(action[:, 6])
    rows = []
    for t in range(len(state) - 1):
        movement = [np.float32(state[t + 1][d] - state[t][d]) for d in range(6)]
        rows.append([*movement, gripper[t]])
    proprioception = [[*s[:6], 0, s[6]] for s in state[:-1]]
    return np.array(rows, np.float32), np.array(proprioception, np.float32)


@pytest.mark.parametrize("first", [1, 0])
def test_real_bridge_episodes_equal_an_independent_reading(shared, first):
    bridge = dataclasses.replace(SPECS["bridge_orig"], skip_first=first)
    episodes = list(bridge_episodes(shared))
    assert len(episodes) == 25
    for columns in episodes:
        episode = bridge.standardize(columns)
        actions, state = expected_bridge(columns, first)
        assert actions.shape == (9 - first, 7)
        np.testing.assert_array_equal(episode.actions, actions)
        np.testing.assert_array_equal(episode.state, state)
        np.testing.assert_array_equal(episode.steps, np.arange(first, 9))
        assert set(np.unique(episode.actions[:, 6])) <= {0, 1}


def test_statistics_of_real_bridge(shared):
    bridge = SPECS["bridge_orig"]
    episodes = [bridge.standardize(columns) for columns in bridge_episodes(shared)]
    result = accumulate(bridge, episodes).result()
    assert (result.num_transitions, result.num_trajectories) == (200, 25)
    # Of spec data.md section 5, to the digits given there.
    np.testing.assert_array_equal(result.action.q01[:3].round(3), [-0.014, -0.019, -0.017])
    np.testing.assert_array_equal(result.action.q99[:3].round(3), [0.016, 0.009, 0.015])
    rows = np.concatenate([expected_bridge(c, 1)[0] for c in bridge_episodes(shared)])
    for name, expected in (
        ("q01", np.quantile(rows.astype(np.float64), 0.01, axis=0)),
        ("q99", np.quantile(rows.astype(np.float64), 0.99, axis=0)),
        ("mean", rows.astype(np.float64).mean(axis=0)),
        ("std", rows.astype(np.float64).std(axis=0)),
    ):
        np.testing.assert_allclose(getattr(result.action, name), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(result.action.mask, [True] * 6 + [False])
