"""Each registered data set against a second, plain-NumPy writing of spec data.md section 5."""

import json
import zlib

import numpy as np
import pytest

from st4vla_jax.data.oxe import SPECS, robot_spec
from st4vla_jax.data.robot_spec import SpecError

T = 6
WV, RD = "action/world_vector", "action/rotation_delta"
GR = "action/gripper_closedness_action"
STATE = "observation/state"
GOOGLE = {WV: 3, RD: 3, GR: 1}


def flat(c, key):
    return c[key].reshape(T, -1).astype(np.float32)


def move(c):
    return np.hstack([c[WV], c[RD]])


def clipped(x):
    return np.minimum(np.maximum(x, 0), 1)


def commanded(c):
    """Relative closing commands, for episodes that begin with an event."""
    state, out = None, []
    for value in c[GR].reshape(T):
        state = 0 if value > 0.1 else 1 if value < -0.1 else state
        out.append([state])
    return np.array(out)


def rotated(c):
    from scipy.spatial.transform import Rotation

    euler = Rotation.from_quat(c["action"][:, 3:7].astype(float)).as_euler("xyz")
    return np.hstack([c["action"][:, :3], euler])


def external(gripper):
    return lambda c: np.hstack([c["action"][:, :6], gripper(c["action"][:, -1:])])


def moved(c):
    return c[STATE][2:, :6] - c[STATE][1:-1, :6]


def first_six_and_last(c):
    return np.hstack([c[STATE][:, :6], np.zeros((T, 1)), c[STATE][:, -1:]])


def stored(gripper):
    return np.where(gripper > 0.95, 1, np.where(gripper < 0.05, 0, np.nan))


def unpacked(values):
    return np.stack([np.frombuffer(zlib.decompress(v), np.float32) for v in values])


ZEROS = np.zeros((T, 8), np.float32)
invert_clipped = external(lambda g: 1 - clipped(g))
invert = external(lambda g: 1 - g)
KUKA = "observation/clip_function_input/base_pose_tool_reached"

# Layout of the raw columns (width; "bool", "packed N"), action, state or None.
CASES = {
    "fractal20220817_data": (
        {**GOOGLE, "observation/base_pose_tool_reached": 7, "observation/gripper_closed": 1},
        lambda c: np.hstack([move(c), commanded(c)]),
        lambda c: np.hstack([
            c["observation/base_pose_tool_reached"], c["observation/gripper_closed"]
        ]),
    ),
    "kuka": (
        {**GOOGLE, KUKA: "packed 7", "observation/gripper_closed": "packed 1"},
        lambda c: np.hstack([move(c), commanded(c)]),
        lambda c: np.hstack([unpacked(c[KUKA]), unpacked(c["observation/gripper_closed"])]),
    ),
    "bridge_orig": (
        {"action": 7, STATE: 7},
        lambda c: np.hstack([moved(c), stored(c["action"][1:-1, 6:])]),
        lambda c: first_six_and_last(c)[1:-1],
    ),
    "bridge_oxe": (
        {**GOOGLE, "action/open_gripper": "bool", STATE: 7},
        lambda c: np.hstack([moved(c), flat(c, "action/open_gripper")[1:-1]]),
        lambda c: first_six_and_last(c)[1:-1],
    ),
    "taco_play": (
        {"action/rel_actions_world": 7, "observation/robot_obs": 15},
        lambda c: np.hstack([
            c["action/rel_actions_world"][:, :6], clipped(c["action/rel_actions_world"][:, 6:])
        ]),
        lambda c: np.hstack([
            c["observation/robot_obs"][:, :6], ZEROS[:, :1], c["observation/robot_obs"][:, 7:8]
        ]),
    ),
    "jaco_play": (
        {WV: 3, GR: 1, "observation/end_effector_cartesian_pos": 7},
        lambda c: np.hstack([c[WV], ZEROS[:, :3], commanded(c)]),
        lambda c: np.hstack([
            c["observation/end_effector_cartesian_pos"][:, :6], ZEROS[:, :1],
            c["observation/end_effector_cartesian_pos"][:, 6:],
        ]),
    ),
    "berkeley_cable_routing": (
        {WV: 3, RD: 3, "observation/robot_state": 7},
        lambda c: np.hstack([move(c), ZEROS[:, :1]]),
        lambda c: np.hstack([c["observation/robot_state"], ZEROS[:, :1]]),
    ),
    "roboturk": (GOOGLE, lambda c: np.hstack([move(c), 1 - clipped(c[GR])]), None),
    "viola": (
        {WV: 3, RD: 3, GR: 0, "observation/joint_states": 7, "observation/gripper_states": 1},
        lambda c: np.hstack([move(c), 1 - clipped(flat(c, GR))]),
        lambda c: np.hstack([c["observation/joint_states"], c["observation/gripper_states"]]),
    ),
    "berkeley_autolab_ur5": (
        {WV: 3, RD: 3, GR: 0, "observation/robot_state": 15},
        lambda c: np.hstack([move(c), commanded(c)]),
        lambda c: c["observation/robot_state"][:, 6:14],
    ),
    "toto": (
        {WV: 3, RD: 3, "action/open_gripper": "bool", STATE: 7},
        lambda c: np.hstack([move(c), flat(c, "action/open_gripper")]),
        lambda c: np.hstack([c[STATE], ZEROS[:, :1]]),
    ),
    "language_table": (
        {"action": 2, "observation/effector_translation": 2},
        lambda c: np.hstack([c["action"], ZEROS[:, :4], ZEROS[:, :1] + 1]),
        lambda c: np.hstack([c["observation/effector_translation"], ZEROS[:, :6]]),
    ),
    "stanford_hydra_dataset*": (
        {"action": 7, STATE: 27},
        invert,
        lambda c: np.hstack([
            c[STATE][:, :3], c[STATE][:, 7:10], ZEROS[:, :1], c[STATE][:, 24:25]
        ]),
    ),
    "austin_buds_dataset*": ({"action": 7, STATE: 24}, invert_clipped, lambda c: c[STATE][:, :8]),
    "nyu_franka_play_dataset*": (
        {"action": 15, STATE: 13},
        lambda c: np.hstack([c["action"][:, 7:13], clipped(c["action"][:, 13:14])]),
        lambda c: np.hstack([c[STATE][:, 7:], ZEROS[:, :2]]),
    ),
    "furniture_bench_dataset*": (
        {"action": 8, STATE: 35},
        lambda c: np.hstack([rotated(c), 1 - clipped(c["action"][:, 7:])]),
        lambda c: np.hstack([c[STATE][:, :7], c[STATE][:, 34:]]),
    ),
    "ucsd_kitchen_dataset*": (
        {"action": 8, STATE: 21},
        lambda c: c["action"][:, :7],
        lambda c: np.hstack([c[STATE][:, :7], ZEROS[:, :1]]),
    ),
    "austin_sailor_dataset*": ({"action": 7, STATE: 8}, invert_clipped, lambda c: c[STATE]),
    "austin_sirius_dataset*": ({"action": 7, STATE: 8}, invert_clipped, lambda c: c[STATE]),
    "dlr_edan_shared_control*": (
        {"action": 7, STATE: 7}, invert, lambda c: np.hstack([c[STATE], ZEROS[:, :1]])
    ),
    "iamlab_cmu_pickup_insert*": (
        {"action": 8, STATE: 20},
        lambda c: np.hstack([rotated(c), c["action"][:, 7:]]),
        lambda c: c[STATE][:, :8],
    ),
    "utaustin_mutex": ({"action": 7, STATE: 24}, invert_clipped, lambda c: c[STATE][:, :8]),
    "berkeley_fanuc_manipulation": (
        {"action": 6, STATE: 13},
        lambda c: np.hstack([c["action"], 1 - c[STATE][:, 6:7]]),
        lambda c: np.hstack([c[STATE][:, :6], ZEROS[:, :1], c[STATE][:, 6:7]]),
    ),
    "cmu_stretch": (
        {"action": 8, STATE: 4},
        lambda c: c["action"][:, :7],
        lambda c: np.hstack([c[STATE][:, :3], ZEROS[:, :4], c[STATE][:, 3:]]),
    ),
    "bc_z": (
        {
            "action/future/xyz_residual": 30, "action/future/axis_angle_residual": 30,
            "action/future/target_close": 10, "observation/present/xyz": 3,
            "observation/present/axis_angle": 3, "observation/present/sensed_close": 1,
        },
        lambda c: np.hstack([
            c["action/future/xyz_residual"][:, :3], c["action/future/axis_angle_residual"][:, :3],
            1 - c["action/future/target_close"][:, :1],
        ]),
        lambda c: np.hstack([
            c["observation/present/xyz"], c["observation/present/axis_angle"], ZEROS[:, :1],
            c["observation/present/sensed_close"],
        ]),
    ),
    "fmb_dataset": (
        {"action": 7, "observation/eef_pose": 7, "observation/state_gripper_pose": 0},
        lambda c: c["action"],
        lambda c: np.hstack([c["observation/eef_pose"], flat(c, "observation/state_gripper_pose")]),
    ),
    "dobbe": ({"action": 7, STATE: 7}, lambda c: c["action"], lambda c: c[STATE]),
    "droid": (
        {
            "action_dict/cartesian_velocity": 6, "action_dict/gripper_position": 1,
            "observation/cartesian_position": 6, "observation/gripper_position": 1,
        },
        lambda c: np.hstack([
            c["action_dict/cartesian_velocity"], 1 - c["action_dict/gripper_position"]
        ]),
        lambda c: np.hstack([
            c["observation/cartesian_position"], c["observation/gripper_position"]
        ]),
    ),
    **{
        f"libero_{suite}_no_noops": (
            {"action": 7, STATE: 8}, invert_clipped, lambda c: c[STATE]
        )
        for suite in ("spatial", "object", "goal", "10", "90")
    },
}  # fmt: skip


def full_name(name):
    return name.replace("*", "_converted_externally_to_rlds")


def is_gripper(key):
    return key == GR or "gripper" in key or "close" in key


def episode_of(layout):
    """Raw columns; every gripper column holds the extremes 0 and 1 (relative ones -1, 0 and 1)."""
    rng = np.random.default_rng(len(layout))
    grips = np.array([1, 1, 0, 0, 1, 0], np.float32)
    columns = {}
    for key, width in layout.items():
        if width == "bool":
            columns[key] = grips.astype(bool)
            continue
        packed = isinstance(width, str)
        size = int(width.split()[1]) if packed else width
        values = rng.normal(size=(T, size)).astype("f") if size else grips.copy()
        if size and is_gripper(key):
            values[:] = grips[:, None]
        elif size and key in ("action", "action/rel_actions_world", STATE):
            # Grippers sit last, franka_play's, kitchen's and stretch's before a last flag.
            values[:, -2 if size in (8, 15) and key == "action" else -1] = grips
            if size == 8 and key == "action":
                values[:, -1] = grips
            if size == 13 and key == STATE:
                values[:, 6] = grips
        columns[key] = values
        if packed:
            rows = np.empty(T, object)
            rows[:] = [zlib.compress(row.tobytes()) for row in values]
            columns[key] = rows
    return columns


def test_every_registered_data_set_has_a_case():
    # Not of Open-X: this package's environment and a LeRobot folder have their own tests.
    others = {"tabletop", "sim_pick_place"}
    assert {full_name(name) for name in CASES} == set(SPECS) - others


@pytest.mark.parametrize("name", CASES)
def test_standardised_episode_equals_a_plain_reading(name):
    layout, action, state = CASES[name]
    spec, columns = robot_spec(full_name(name)), episode_of(layout)
    assert set(spec.columns) <= set(layout)
    episode = spec.standardize(columns)
    rows = slice(1, T - 1) if "bridge" in name else slice(0, T)
    np.testing.assert_array_equal(episode.steps, np.arange(T)[rows])
    assert episode.actions.shape == (len(episode.steps), 7)
    np.testing.assert_allclose(episode.actions, action(columns), rtol=0, atol=3e-7)
    assert set(np.unique(episode.actions[:, 6])) <= {0, 1}
    if state is None:
        assert episode.state is None
    else:
        np.testing.assert_array_equal(episode.state, state(columns).astype(np.float32))
        assert episode.state.shape[1] == (7 if name in ("dobbe", "droid") else 8)


def test_grippers_open_where_the_raw_columns_say_so():
    # 1 = open: by hand, one data set of each gripper rule.
    grips = np.array([1, 1, 0, 0, 1, 0])
    for name, expected in (
        ("kuka", [0, 0, 0, 0, 0, 0]),  # closes, never opens
        ("bridge_orig", grips[1:-1]),
        ("roboturk", 1 - grips),
        ("dlr_edan_shared_control*", 1 - grips),
        ("taco_play", grips),
        ("berkeley_cable_routing", 0 * grips),
        ("language_table", 0 * grips + 1),
        ("droid", 1 - grips),
    ):
        episode = robot_spec(full_name(name)).standardize(episode_of(CASES[name][0]))
        np.testing.assert_array_equal(episode.actions[:, 6], expected, err_msg=name)


def test_control_rates_views_and_languages_of_some_sets():
    assert {n: SPECS[n].control_hz for n in ("bridge_orig", "fractal20220817_data", "droid")} == {
        "bridge_orig": 5,
        "fractal20220817_data": 3,
        "droid": 15,
    }
    assert SPECS["bridge_orig"].images == {
        "primary": "observation/image_0",
        "secondary": "observation/image_1",
    }
    assert SPECS["droid"].images["wrist"] == "observation/wrist_image_left"
    assert SPECS["bridge_orig"].language == "language_instruction"
    table = SPECS["language_table"]
    assert table.language == "observation/instruction"
    assert table.instruction(np.array([104, 105, 0, 7])) == "hi"
    # The tags of released checkpoints.
    tags = {SPECS[n].embodiment for n in ("bridge_orig", "fractal20220817_data", "droid")}
    assert tags == {"oxe_bridge", "oxe_rt1", "oxe_droid"}


def test_sets_that_share_an_embodiment_agree_on_actions_and_state():
    for name, spec in SPECS.items():
        if name == "sim_pick_place":
            continue  # upstream gives it LIBERO's tag; merging their statistics is refused
        first = next(s for s in SPECS.values() if s.embodiment == spec.embodiment)
        assert (spec.action_spec, spec.state_encoding, spec.absolute) == (
            first.action_spec,
            first.state_encoding,
            first.absolute,
        ), name


def test_a_users_own_robot_is_a_short_file(tmp_path):
    """A joint-controlled arm with a gripper of 0..0.08 m: nothing registered, no source edit."""
    text = """
    {"name": "my_arm", "embodiment": "my_arm", "control_hz": 20,
     "images": {"primary": "observation/front", "wrist": "observation/hand"},
     "language": "language_instruction",
     "action": [{"column": "observation/joints", "ops": ["relabel"]},
                {"column": "action/gripper_width", "scale": 12.5, "ops": ["clip", "binarize"]}],
     "state": [{"column": "observation/joints"}], "state_encoding": "joint",
     "names": ["j1", "j2", "gripper"], "units": ["rad", "rad", "1 = open"],
     "gripper": [2], "absolute": [2], "mode": "min_max"}
    """
    assert len(text.splitlines()) < 20
    (tmp_path / "arm.json").write_text(text)
    spec = robot_spec(tmp_path / "arm.json")
    joints = np.array([[0, 1], [0.5, 1], [0.5, 0.75]], np.float32)
    episode = spec.standardize(
        {"observation/joints": joints, "action/gripper_width": np.array([0.08, 0.04, 0.0])}
    )
    np.testing.assert_allclose(episode.actions, [[0.5, 0, 1], [0, -0.25, 0]], atol=1e-6)
    np.testing.assert_array_equal(episode.state, joints[:2])


def test_bad_spec_files_are_named(tmp_path):
    with pytest.raises(
        SpecError, match="no robot spec 'bridge_origin', did you mean 'bridge_orig'"
    ):
        robot_spec("bridge_origin")
    with pytest.raises(SpecError, match="missing.json: not a readable JSON file"):
        robot_spec(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"name": ')
    with pytest.raises(SpecError, match="cut.json: not a readable JSON file"):
        robot_spec(tmp_path / "cut.json")
    tree = SPECS["kuka"].to_dict() | {"control_hz": 0}
    (tmp_path / "zero.json").write_text(json.dumps(tree))
    with pytest.raises(SpecError, match=r"zero.json: .*\n.*control_hz 0 is not positive"):
        robot_spec(tmp_path / "zero.json")
