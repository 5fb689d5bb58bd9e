"""The real LeRobot v2.1 set: frames, actions, boxes, missing videos, hostile annotations."""

import json
import pickle
import shutil

import numpy as np
import pytest

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402

from st4vla_jax.data.encoder import SampleEncoder  # noqa: E402
from st4vla_jax.data.lerobot import LeRobotGrounding, LeRobotSource  # noqa: E402
from st4vla_jax.data.robot_spec import Part, RobotSpec  # noqa: E402
from st4vla_jax.data.source_files import SourceError  # noqa: E402
from st4vla_jax.data.tokenizer import byte_level_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def real(shared):
    return shared / "data/lerobot_sim_pick_place"


SIM = RobotSpec(
    name="sim_pick_place",
    embodiment="franka_robotiq",
    images={"primary": "video.ego_view", "base": "video.base_view"},
    language="task",
    action=(Part("action.delta_joints"), Part("action.gripper_close")),
    state=(Part("state.joints"), Part("state.gripper_width", dims=(0, 1))),
    names=(*(f"joint_{i}" for i in range(7)), "gripper"),
    units=("rad",) * 7 + ("",),
    control_hz=30.0,
    gripper=(7,),
    absolute=(7,),
)


def test_real_frames_and_actions(real, tmp_path):
    source = LeRobotSource(real, SIM, chunk=16, index_dir=tmp_path)
    assert len(source) == 1667
    assert len(pickle.dumps(source)) < 1000
    rng = np.random.default_rng(0)
    first = 0
    for episode in range(4):
        name = f"episode_{episode:06d}"
        path = real / f"data/chunk-000/{name}.parquet"
        table = pq.read_table(path)
        actions = np.concatenate([np.stack(table[c].to_numpy(zero_copy_only=False)) for c in
                                  ("action.delta_joints", "action.gripper_close")], 1)  # fmt: skip
        length = len(actions)
        steps = {0, length - 1, length - 2, *rng.integers(0, length, 4).tolist()}
        with av.open(str(real / f"videos/chunk-000/video.ego_view/{name}.mp4")) as video:
            for step, frame in enumerate(video.decode(video=0)):  # in order, from the start
                if step not in steps:
                    continue
                sample = source[first + step]
                np.testing.assert_array_equal(sample.images[0], frame.to_ndarray(format="rgb24"))
                count = min(16, length - step)
                expected = actions[step : step + count].astype(np.float32)
                np.testing.assert_array_equal(sample.robot.actions[:count], expected)
                assert sample.robot.action_mask.sum() == 8 * count
                steps.remove(step)
        assert not steps
        task = json.loads((real / "meta/tasks.jsonl").read_text().splitlines()[episode])["task"]
        assert source[first].turns[0].text == task
        first += length


def test_real_missing_videos(real, tmp_path):
    with pytest.raises(SourceError) as e:
        LeRobotSource(real, SIM, chunk=16, views=("primary", "base"), index_dir=tmp_path)
    for episode in (0, 1, 3):
        assert f"video.base_view/episode_{episode:06d}.mp4" in str(e.value)
    assert "episodes=[2]" in str(e.value)
    both = LeRobotSource(
        real, SIM, chunk=16, views=("primary", "base"), episodes=[2], index_dir=tmp_path
    )
    assert len(both) == 398
    assert [image.shape for image in both[200].images] == [(480, 640, 3)] * 2


def test_real_boxes(real, tmp_path):
    """Against pickle itself, which may be trusted with this one set."""
    boxes = LeRobotGrounding(real, name="sim", video="video.ego_view", stride=5, index_dir=tmp_path)
    assert len(pickle.dumps(boxes)) < 1000
    prefix, row, hidden = "annotation.ego_view.bbox2d_tight", 0, 0
    columns = [prefix, f"{prefix}_id2labels", "annotation.pick_obj_uid", "annotation.place_obj_uid"]
    for episode in range(4):
        table = pq.read_table(
            real / f"data/chunk-000/episode_{episode:06d}.parquet", columns=columns
        )
        for step in range(0, table.num_rows, 5):
            found, labels, *uids = (pickle.loads(table[c][step].as_py()) for c in columns)
            expected = {}
            for key, uid in zip(("pick", "place"), uids, strict=True):
                for b in found:
                    shown = b["x_max"] > b["x_min"] and b["y_max"] > b["y_min"]
                    if shown and labels[str(b["semanticId"])]["class"] == uid:
                        expected[key] = [b["x_min"], b["y_min"], b["x_max"], b["y_max"]]
            if not expected:
                hidden += 1
                continue
            user, assistant = boxes.turns(row)
            assert list(json.loads(assistant.text.replace("<region>", "0"))) == list(expected)
            got = [region.coordinates.ravel().tolist() for region in assistant.regions]
            assert got == list(expected.values())
            assert user.text.startswith("<image>Your task is Move the ")
            row += 1
    assert row == len(boxes)
    assert boxes.left_out["no object in view"] == hidden

    sample = boxes[40]
    assert sample.images[0].shape == (480, 640, 3)
    assert (sample.group, sample.robot) == ("sim/box", None)
    encoder = SampleEncoder(byte_level_tokenizer(), groups=boxes.groups)
    encoded, _ = encoder(sample, np.random.default_rng(0))
    assert len(encoded.tokens) == boxes.lengths(encoder).tokens[40]


def test_annotations_that_would_run_code(real, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(real / "meta", root / "meta")
    for name in ("data/chunk-000", "videos/chunk-000/video.ego_view"):
        shutil.copytree(real / name, root / name)
    path = root / "data/chunk-000/episode_000002.parquet"
    path.chmod(0o644)
    table = pq.read_table(path)
    at = table.column_names.index("annotation.pick_obj_uid")
    attack = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    cells = [attack] + table.column(at).to_pylist()[1:]
    pq.write_table(table.set_column(at, "annotation.pick_obj_uid", pa.array(cells)), path)
    with pytest.raises(SourceError, match=r"episode 2: .*asks for (os|posix)\.system"):
        LeRobotGrounding(root, name="sim", video="video.ego_view", stride=40, index_dir=tmp_path)
    assert not (tmp_path / "ran").exists()
