"""inspect: what is said about real folders, and each finding on data made wrong on purpose."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data import findings, inspect
from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.robot_spec import StandardEpisode
from st4vla_jax.data.sheet import Cell, Strip, contact_sheet, thumbnail
from st4vla_jax.data.source import Region

BRIDGE = SPECS["bridge_orig"]  # poses as state, so motion can be compared


def episodes(count=6, steps=12, scale=1.0, grip=None, seed=0):
    """Episodes whose commands are ``scale`` times the measured motion."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        position = np.cumsum(rng.normal(0, 0.02, (steps, 3)), axis=0)
        state = np.concatenate([position, np.zeros((steps, 5))], axis=1)
        moved = np.diff(position, axis=0, append=position[-1:])
        opening = np.where(np.arange(steps) < steps // 2, 1.0, 0.0)
        opening = opening if grip is None else grip(opening)
        actions = np.concatenate([scale * moved, np.zeros((steps, 3)), opening[:, None]], axis=1)
        made.append(
            StandardEpisode(actions.astype(np.float32), state.astype(np.float32), np.arange(steps))
        )
    return made


def test_sound_data_has_no_findings():
    made = episodes()
    assert findings.gripper_findings(BRIDGE, made) == []
    assert findings.motion_findings(BRIDGE, made) == []
    assert findings.rate_findings(BRIDGE, 5.1) == []


@pytest.mark.parametrize(
    "grip,message",
    [
        (lambda g: 2 * g - 1, "gripper runs from -1 to 1"),
        (lambda g: 1 - g, "starts closed in 100%"),
        (lambda g: 0 * g + 1, "is 1 at every step"),
    ],
)
def test_gripper(grip, message):
    (found,) = findings.gripper_findings(BRIDGE, episodes(grip=grip))
    assert message in found


@pytest.mark.parametrize("scale,message", [(100.0, "1e+02 times"), (-1.0, "against the measured")])
def test_motion(scale, message):
    found = findings.motion_findings(BRIDGE, episodes(scale=scale))
    assert len(found) == 3 and all(message in text for text in found)


def test_motion_says_nothing_without_poses_or_without_relation():
    joints = dataclasses.replace(BRIDGE, state_encoding="joint")
    assert findings.motion_findings(joints, episodes(scale=100)) == []
    unrelated = [
        dataclasses.replace(a, actions=b.actions)
        for a, b in zip(episodes(seed=1), episodes(seed=2, scale=100), strict=True)
    ]
    assert findings.motion_findings(BRIDGE, unrelated) == []


def test_rate_and_cameras():
    assert "30 Hz, the spec says 5" in findings.rate_findings(BRIDGE, 30.0)[0]
    rng = np.random.default_rng(0)
    lively = [rng.integers(0, 255, (8, 8, 3), np.uint8) for _ in range(3)]
    black = [np.zeros((8, 8, 3), np.uint8)] * 3
    found = findings.camera_findings({"a": lively, "b": black, "c": [lively[0]] * 3})
    assert [text.split()[1] for text in found] == ["b", "c"]


def test_duplicates():
    pairs = [("train", 1), ("train", 2), ("val", 2), ("val", 3), ("val", 3)]
    assert findings.duplicate_findings(pairs) == [
        "1 episodes are in each of train and val: held out by split name they would be trained on; "
        "hold out by content (holdout)",
        "1 episodes of val are repeats",
    ]


def test_the_real_bridge_folder(shared, tmp_path, capsys):
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    argv = [str(shared / "data/bridge_dataset"), "--index-dir", str(tmp_path / "index")]
    assert inspect.main([*argv, "--sheet", str(sheet), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "50 episodes of 8 to 8 steps" in out and "spec bridge_orig" in out
    found = json.loads(report.read_text())["findings"]
    assert len(found) == 2
    assert "observation/image_3 is black" in found[0]
    assert "25 episodes are in each of split train and split val" in found[1]
    assert np.asarray(Image.open(sheet)).std() > 10


def test_the_real_lerobot_folder_names_missing_videos(shared, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    folder = shared / "data/lerobot_sim_pick_place"
    assert inspect.main([str(folder), "--index-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 episodes, 1667 steps, 30 Hz" in out and out.count("- missing video") == 6

    spec = {
        "name": "sim", "embodiment": "franka", "control_hz": 5.0, "language": "task",
        "images": {"primary": "video.ego_view", "base": "video.base_view"},
        "action": [{"column": "action.delta_joints"}, {"column": "action.gripper_close"}],
        "names": [*(f"joint_{i}" for i in range(7)), "gripper"], "units": ["rad"] * 7 + [""],
        "gripper": [7], "absolute": [7],
    }  # fmt: skip
    path, sheet = tmp_path / "spec.json", tmp_path / "sheet.png"
    path.write_text(json.dumps(spec))
    argv = [str(folder), "--spec", str(path), "--sheet", str(sheet), "--index-dir", str(tmp_path)]
    assert inspect.main(argv) == 0
    out = capsys.readouterr().out
    assert "4 episodes of 398 to 446 steps, 1667 in all" in out
    assert "gripper runs from -1 to 1" in out and "30 Hz, the spec says 5" in out
    assert sheet.is_file()


def test_grounding_records(tmp_path, capsys):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    records = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>where?"},
                {"from": "gpt", "value": '{"bbox_2d": [5, 6, 30, 20], "label": "cube"}'},
            ],
        },
        {"image": "absent.png", "conversations": []},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    sheet = tmp_path / "sheet.png"
    assert inspect.main([str(path), "--coordinates", "pixels", "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "1 of them usable" in out and "absent.png" in out and "set/box" in out
    assert sheet.is_file()


def test_an_unknown_path(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 1
    assert "no features.json (RLDS), no meta/info.json (LeRobot)" in capsys.readouterr().err


def test_regions_are_drawn_where_they_are():
    image = np.zeros((100, 200, 3), np.uint8)
    box = Region("box", np.array([[50.0, 20.0], [150.0, 80.0]], np.float32))
    picture = np.asarray(thumbnail(Cell(image, regions=(box,))))
    ys, xs = np.nonzero(picture[:88].any(-1))  # the image fills 176 x 88 of the square
    assert (xs.min(), ys.min()) == (44, 17) and abs(xs.max() - 132) <= 1


def test_a_sheet_holds_every_strip():
    cells = tuple(Cell(np.full((10, 10, 3), 200, np.uint8), "step") for _ in range(4))
    curves = np.random.default_rng(0).normal(size=(20, 7))
    plain = contact_sheet([Strip("a", cells)])
    both = contact_sheet([Strip("a", cells), Strip("b", cells, curves, BRIDGE.names)])
    assert both.width == plain.width and both.height > 2 * plain.height
