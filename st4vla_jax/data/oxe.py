"""Open-X Embodiment and LIBERO as data: one `RobotSpec` for each data set.

Facts of spec data.md section 5 (openvla's transforms, control rates from RDT).  Every
action becomes f32[7]: delta xyz (m), delta roll-pitch-yaw (rad), gripper 1 = open.  A set that is
not here needs no entry: `robot_spec` also reads a JSON file.

Statistics are keyed by data set, except where released checkpoints use a tag of their own (spec
upstream.md 2.6).  differs: droid's exterior cameras change places by a hash of episode and step,
not drawn anew in each epoch (and for a whole episode); its all-zero chunks are left to the pause
filter of the index instead of fixed quantiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from st4vla_jax.data.robot_spec import Part, RobotSpec, SpecError, nearest

_RLDS = "_converted_externally_to_rlds"
_GOOGLE_LANGUAGE = "observation/natural_language_instruction"


def _part(column: str, start: int | None = None, stop: int | None = None, *ops: str) -> Part:
    return Part(column, (start, stop), ops=ops)


def _zeros(count: int) -> Part:
    return Part(constant=(0.0,) * count)


def _views(primary: str, secondary: str = "", wrist: str = "") -> dict[str, str]:
    views = {"primary": primary, "secondary": secondary, "wrist": wrist}
    return {view: f"observation/{image}" for view, image in views.items() if image}


def _spec(
    name: str,
    images: dict[str, str],
    hz: float,
    action: tuple[Part, ...],
    state: tuple[Part, ...] = (),
    *,
    encoding: str = "other",
    embodiment: str = "",
    language: str = "language_instruction",
    language_encoding: str = "text",
    skip_first: int = 0,
    swap: tuple[str, ...] = (),
) -> RobotSpec:
    return RobotSpec(
        name, embodiment or name, images, language, action, state, state_encoding=encoding,
        language_encoding=language_encoding, control_hz=hz, skip_first=skip_first, swap=swap,
    )  # fmt: skip


# The Google format: separate arrays for translation, rotation and gripper.
_MOVE = (_part("action/world_vector"), _part("action/rotation_delta"))
_GRIPPER = "action/gripper_closedness_action"
# The external format: one array of 6 deltas and a gripper.
_DELTA = _part("action", 0, 6)
_ROTATED = (_part("action", 0, 3), _part("action", 3, 7, "quaternion_to_euler"))
_CLOSES = (_DELTA, _part("action", -1, None, "invert"))  # stored gripper: 1 = closed
_CLOSES_CLIPPED = (_DELTA, _part("action", -1, None, "clip", "invert"))
_STATE = "observation/state"
_STATE_DELTA = _part(_STATE, 0, 6, "relabel")
_POSE_AND_GRIPPER = (_part(_STATE, 0, 6), _zeros(1), _part(_STATE, -1))
LIBERO_SUITES = ("spatial", "object", "goal", "10", "90")

_SPECS = (
    _spec(
        "fractal20220817_data",
        _views("image"),
        3,
        (*_MOVE, _part(_GRIPPER, None, None, "rel2abs")),
        (_part("observation/base_pose_tool_reached"), _part("observation/gripper_closed")),
        embodiment="oxe_rt1",
        language=_GOOGLE_LANGUAGE,
        encoding="pos_quat",
    ),
    _spec(
        "kuka",
        _views("image"),
        10,
        (*_MOVE, _part(_GRIPPER, None, None, "rel2abs")),
        (
            Part("observation/clip_function_input/base_pose_tool_reached", encoding="zlib_f32"),
            Part("observation/gripper_closed", encoding="zlib_f32"),
        ),
        language=_GOOGLE_LANGUAGE,
        encoding="pos_quat",
    ),
    _spec(  # skip_first=0 is octo's convention, 1 openvla's: the first action is all zeros
        "bridge_orig",
        _views("image_0", "image_1"),
        5,
        (_STATE_DELTA, _part("action", -1, None, "binarize")),
        _POSE_AND_GRIPPER,
        embodiment="oxe_bridge",
        skip_first=1,
        encoding="pos_euler",
    ),
    _spec(
        "bridge_oxe",
        _views("image", "image_1"),
        5,
        (_STATE_DELTA, _part("action/open_gripper")),
        _POSE_AND_GRIPPER,
        embodiment="oxe_bridge",
        language=_GOOGLE_LANGUAGE,
        skip_first=1,
        encoding="pos_euler",
    ),
    _spec(
        "taco_play",
        _views("rgb_static", wrist="rgb_gripper"),
        15,
        (
            _part("action/rel_actions_world", 0, 6),
            _part("action/rel_actions_world", -1, None, "clip"),
        ),
        (_part("observation/robot_obs", 0, 6), _zeros(1), _part("observation/robot_obs", 7, 8)),
        language=_GOOGLE_LANGUAGE,
        encoding="pos_euler",
    ),
    _spec(
        "jaco_play",
        _views("image", wrist="image_wrist"),
        10,
        (_MOVE[0], _zeros(3), _part(_GRIPPER, None, None, "rel2abs")),
        (
            _part("observation/end_effector_cartesian_pos", 0, 6),
            _zeros(1),
            _part("observation/end_effector_cartesian_pos", -1),
        ),
        language=_GOOGLE_LANGUAGE,
        encoding="pos_euler",
    ),
    _spec(
        "berkeley_cable_routing",
        _views("image", "top_image", "wrist45_image"),
        10,
        (*_MOVE, _zeros(1)),
        (_part("observation/robot_state"), _zeros(1)),
        language=_GOOGLE_LANGUAGE,
        encoding="joint",
    ),
    _spec(
        "roboturk",
        _views("front_rgb"),
        10,
        (*_MOVE, _part(_GRIPPER, None, None, "clip", "invert")),
        language=_GOOGLE_LANGUAGE,
    ),
    _spec(
        "viola",
        _views("agentview_rgb", wrist="eye_in_hand_rgb"),
        20,
        (*_MOVE, _part(_GRIPPER, None, None, "clip", "invert")),
        (_part("observation/joint_states"), _part("observation/gripper_states")),
        language=_GOOGLE_LANGUAGE,
        encoding="joint",
    ),
    _spec(
        "berkeley_autolab_ur5",
        _views("image", wrist="hand_image"),
        5,
        (*_MOVE, _part(_GRIPPER, None, None, "rel2abs")),
        (_part("observation/robot_state", 6, 14),),
        language=_GOOGLE_LANGUAGE,
        encoding="pos_quat",
    ),
    _spec(
        "toto",
        _views("image"),
        30,
        (*_MOVE, _part("action/open_gripper")),
        (_part(_STATE), _zeros(1)),
        language=_GOOGLE_LANGUAGE,
        encoding="joint",
    ),
    _spec(  # two dimensions in the plane of the table, no gripper
        "language_table",
        _views("rgb"),
        10,
        (_part("action"), _zeros(4), Part(constant=(1.0,))),
        (_part("observation/effector_translation"), _zeros(6)),
        language="observation/instruction",
        language_encoding="code_points",
        encoding="pos_euler",
    ),
    _spec(
        "stanford_hydra_dataset" + _RLDS,
        _views("image", wrist="wrist_image"),
        10,
        _CLOSES,
        (_part(_STATE, 0, 3), _part(_STATE, 7, 10), _zeros(1), _part(_STATE, -3, -2)),
        encoding="pos_euler",
    ),
    _spec(
        "austin_buds_dataset" + _RLDS,
        _views("image", wrist="wrist_image"),
        20,
        _CLOSES_CLIPPED,
        (_part(_STATE, 0, 8),),
        encoding="joint",
    ),
    _spec(
        "nyu_franka_play_dataset" + _RLDS,
        _views("image", "image_additional_view"),
        3,
        (_part("action", -8, -2), _part("action", -2, -1, "clip")),
        (_part(_STATE, -6), _zeros(2)),
        encoding="pos_euler",
    ),
    _spec(
        "furniture_bench_dataset" + _RLDS,
        _views("image", wrist="wrist_image"),
        10,
        (*_ROTATED, _part("action", -1, None, "clip", "invert")),
        (_part(_STATE, 0, 7), _part(_STATE, -1)),
        encoding="pos_quat",
    ),
    _spec(
        "ucsd_kitchen_dataset" + _RLDS,
        _views("image"),
        2,
        (_part("action", 0, -1),),
        (_part(_STATE, 0, 7), _zeros(1)),
        encoding="joint",
    ),
    *(
        _spec(
            name + _RLDS,
            _views("image", wrist="wrist_image"),
            20,
            _CLOSES_CLIPPED,
            (_part(_STATE),),
            encoding="pos_quat",
        )
        for name in ("austin_sailor_dataset", "austin_sirius_dataset")
    ),
    _spec(
        "dlr_edan_shared_control" + _RLDS,
        _views("image"),
        5,
        _CLOSES,
        (_part(_STATE), _zeros(1)),
        encoding="pos_euler",
    ),
    _spec(
        "iamlab_cmu_pickup_insert" + _RLDS,
        _views("image", wrist="wrist_image"),
        20,
        (*_ROTATED, _part("action", 7, 8)),
        (_part(_STATE, 0, 8),),
        encoding="joint",
    ),
    _spec(
        "utaustin_mutex",
        _views("image", wrist="wrist_image"),
        20,
        _CLOSES_CLIPPED,
        (_part(_STATE, 0, 8),),
        encoding="joint",
    ),
    _spec(  # actions have no gripper: the measured one stands for it
        "berkeley_fanuc_manipulation",
        _views("image", wrist="wrist_image"),
        10,
        (_DELTA, _part(_STATE, 6, 7, "invert")),
        (_part(_STATE, 0, 6), _zeros(1), _part(_STATE, 6, 7)),
        encoding="joint",
    ),
    _spec(
        "cmu_stretch",
        _views("image"),
        10,
        (_part("action", 0, -1),),
        (_part(_STATE, 0, 3), _zeros(4), _part(_STATE, -1)),
        encoding="pos_euler",
    ),
    _spec(  # use v0.1.0
        "bc_z",
        _views("image"),
        10,
        (
            _part("action/future/xyz_residual", 0, 3),
            _part("action/future/axis_angle_residual", 0, 3),
            _part("action/future/target_close", 0, 1, "invert"),
        ),
        (
            _part("observation/present/xyz"),
            _part("observation/present/axis_angle"),
            _zeros(1),
            _part("observation/present/sensed_close"),
        ),
        language=_GOOGLE_LANGUAGE,
        encoding="pos_euler",
    ),
    _spec(
        "fmb_dataset",
        _views("image_side_1", "image_side_2", "image_wrist_1"),
        10,
        (_part("action"),),
        (_part("observation/eef_pose"), _part("observation/state_gripper_pose")),
        encoding="pos_euler",
    ),
    _spec(
        "dobbe",
        _views("wrist_image"),
        30,
        (_part("action"),),
        (_part(_STATE),),
        encoding="pos_euler",
    ),
    _spec(  # openvla says pos_quat, of a pose of six numbers
        "droid",
        _views("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"),
        15,
        (
            _part("action_dict/cartesian_velocity", 0, 6),
            _part("action_dict/gripper_position", None, None, "invert"),
        ),
        (_part("observation/cartesian_position"), _part("observation/gripper_position")),
        embodiment="oxe_droid",
        swap=("primary", "secondary"),
        encoding="pos_euler",
    ),
    *(
        _spec(  # the stored gripper is -1 = open, 1 = closed
            f"libero_{suite}_no_noops",
            _views("image", wrist="wrist_image"),
            20,
            _CLOSES_CLIPPED,
            (_part(_STATE, 0, 8),),
            embodiment="franka",
            encoding="pos_euler",
        )
        for suite in LIBERO_SUITES
    ),
    RobotSpec(  # the environment of st4vla_jax/tabletop
        "tabletop",
        "tabletop",
        _views("image", wrist="wrist_image"),
        "language_instruction",
        (_part("action"),),
        (_part(_STATE),),
        state_encoding="pos_euler",
        control_hz=5,
        mode="min_max",
    ),
    RobotSpec(  # InternVLA-M1's simulated pick-and-place (LeRobot v2.1; spec upstream.md 4.1, 4.2)
        "sim_pick_place",
        "franka",
        {"primary": "video.ego_view", "base": "video.base_view"},
        "task",
        (_part("action.delta_joints"), _part("action.gripper_close")),
        (_part("state.joints"),),
        names=(*(f"joint_{i}" for i in range(7)), "gripper"),
        units=("rad",) * 7 + ("1 = closed, -1 = open",),
        gripper=(7,),
        absolute=(7,),
        control_hz=30,
        mode="min_max",
    ),
)

SPECS: Mapping[str, RobotSpec] = {spec.name: spec for spec in _SPECS}


def robot_spec(name_or_path: str | Path) -> RobotSpec:
    """A registered data set by name, or a user's own from a .json file.

    Raises:
      SpecError: no such name, or a file that is not a spec.
    """
    if str(name_or_path) in SPECS:
        return SPECS[str(name_or_path)]
    path = Path(name_or_path)
    if path.suffix != ".json":
        raise SpecError(
            f"no robot spec {str(name_or_path)!r}{nearest(str(name_or_path), SPECS)}; or give a "
            ".json file"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SpecError(f"robot spec {path}: not a readable JSON file ({e})") from e
    try:
        return RobotSpec.from_dict(tree)
    except SpecError as e:
        raise SpecError(f"{path}: {e}") from e
