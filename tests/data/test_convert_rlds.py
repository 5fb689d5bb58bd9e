"""RLDS and LeRobot folders, converted and compared; test_convert.py has the faults."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data.oxe import SPECS, robot_spec
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import Part, RobotSpec
from tests.reference import shards as reference
from tests.reference.converted import convert, episodes_by_tfds, jpeg, manifest, records


def assert_samples_equal(a, b):
    assert a.turns == b.turns
    for x, y in zip(a.images, b.images, strict=True):
        np.testing.assert_array_equal(x, y)
    for name in ("actions", "action_mask", "state"):
        np.testing.assert_array_equal(getattr(a.robot, name), getattr(b.robot, name))


# --- RLDS ---------------------------------------------------------------------------------------


@pytest.mark.parity
def test_real_bridge(shared, tmp_path):
    root = shared / "data/bridge_dataset"
    out = convert(root, tmp_path / "bridge/1.0.0")
    for split in ("train", "val"):
        (shard,) = (root / "1.0.0").glob(f"*-{split}.tfrecord*")
        original = reference.tfrecord_records(shard)
        assert records(out, split) == original and len(original) == 25
        assert manifest(out)["splits"][split]["steps"] == 250
        episodes = episodes_by_tfds(out, split)
        for data, steps in zip(original, episodes, strict=True):
            feature = reference.parse(data).features.feature
            actions = np.array(feature["steps/action"].float_list.value, np.float32).reshape(10, 7)
            images = feature["steps/observation/image_1"].bytes_list.value
            for t in (0, 9):
                np.testing.assert_array_equal(steps[t]["action"], actions[t])
                pixels = np.asarray(Image.open(io.BytesIO(images[t])))
                np.testing.assert_array_equal(steps[t]["observation"]["image_1"], pixels)
    spec = SPECS["bridge_orig"]
    before = RldsSource(root, spec, views=("primary", "secondary"), index_dir=tmp_path / "i")
    after = RldsSource(out, spec, views=("primary", "secondary"))
    assert len(before) == len(after) > 0
    for index in range(0, len(before), 7):
        assert_samples_equal(before[index], after[index])


def test_zlib_packed_columns_and_class_labels(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [reference.kuka(rng, 4), reference.kuka(rng, 6)]
    root = reference.write_folder(tmp_path / "in", reference.KUKA, {"train": episodes})
    (root / "steps.labels.txt").write_text("one\ntwo\n")
    out = convert(root, tmp_path / "out")
    assert records(out) == [reference.serialize(episode) for episode in episodes]
    assert manifest(out)["splits"]["train"]["steps"] == 10
    assert (out / "steps.labels.txt").read_text() == "one\ntwo\n"
    features = [json.loads((f / "features.json").read_text()) for f in (root, out)]
    assert features[0] == features[1]


# --- LeRobot ------------------------------------------------------------------------------------

FRAMES = 9


def short_lerobot(source, target, episodes=(0, 2)):
    """The real set with the first FRAMES rows of two episodes; videos are those of the source."""
    pq = pytest.importorskip("pyarrow.parquet")
    for name in ("data/chunk-000", "meta", "videos/chunk-000/video.ego_view"):
        (target / name).mkdir(parents=True)
    for name in ("info.json", "tasks.jsonl"):
        shutil.copy(source / "meta" / name, target / "meta" / name)
    lines = [{"episode_index": i, "length": FRAMES} for i in episodes]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (target / "meta/episodes.jsonl").write_text(text)
    for i in episodes:
        name = f"data/chunk-000/episode_{i:06d}.parquet"
        pq.write_table(pq.read_table(source / name).slice(0, FRAMES), target / name)
        name = f"videos/chunk-000/video.ego_view/episode_{i:06d}.mp4"
        (target / name).symlink_to(source / name)
    return target


DEMO_SPEC = RobotSpec(
    name="demo",
    embodiment="franka",
    images={"primary": "video.ego_view"},
    language="task",
    action=(Part("action.delta_joints"), Part("action.gripper_close", ops=("invert",))),
    state=(Part("state.joints"),),
    names=(*(f"joint_{i}" for i in range(7)), "gripper"),
    units=(*("rad" for _ in range(7)), ""),
    control_hz=30.0,
    gripper=(7,),
    absolute=(7,),
)


@pytest.mark.parity
def test_real_lerobot(shared, tmp_path):
    av = pytest.importorskip("av")
    pq = pytest.importorskip("pyarrow.parquet")
    from st4vla_jax.data.lerobot import LeRobotSource

    real = shared / "data/lerobot_sim_pick_place"
    root = short_lerobot(real, tmp_path / "in")
    out = convert(root, tmp_path / "out", "--images", "video.ego_view", "--shard_records", 1)
    about = manifest(out)
    assert (about["splits"]["train"]["records"], about["splits"]["train"]["steps"]) == (2, 18)
    assert "annotation.ego_view.bbox2d_tight" in about["left_out"]
    assert "video.base_view" in about["left_out"] and about["settings"]["control_hz"] == 30
    for number, steps in zip((0, 2), episodes_by_tfds(out), strict=True):
        table = pq.read_table(root / f"data/chunk-000/episode_{number:06d}.parquet")
        video = root / f"videos/chunk-000/video.ego_view/episode_{number:06d}.mp4"
        with av.open(str(video)) as container:
            decoded = container.decode(video=0)
            frames = [next(decoded).to_ndarray(format="rgb24") for _ in range(FRAMES)]
        for t, step in enumerate(steps):
            np.testing.assert_array_equal(step["video"]["ego_view"], jpeg(frames[t]))
            for group, name in (("action", "delta_joints"), ("state", "gripper_width")):
                expected = np.array(table[f"{group}.{name}"][t].as_py())
                assert step[group][name].dtype == np.float64
                np.testing.assert_array_equal(step[group][name], expected)
            assert bool(step["is_last"]) == (t == FRAMES - 1)
        tasks = (real / "meta/tasks.jsonl").read_text().splitlines()
        text = json.loads(tasks[table["task_index"][0].as_py()])["task"]
        assert steps[0]["language_instruction"].decode() == text

    (tmp_path / "spec.json").write_text(json.dumps(DEMO_SPEC.to_dict()))
    selected = convert(root, tmp_path / "selected", "--spec", tmp_path / "spec.json")
    converted = robot_spec(selected / "robot_spec.json")
    assert converted.images == {"primary": "video/ego_view"}
    assert converted.language == "language_instruction"
    before = LeRobotSource(root, DEMO_SPEC, chunk=4, index_dir=tmp_path / "i")
    after = RldsSource(selected, converted, chunk=4)
    assert len(before) == len(after) == 2 * FRAMES
    for index in range(len(before)):
        a, b = before[index], after[index]
        np.testing.assert_array_equal(jpeg(a.images[0]), b.images[0])
        assert_samples_equal(a.__class__((), a.turns, a.robot), b.__class__((), b.turns, b.robot))


def test_lerobot_faults(shared, tmp_path, capsys):
    pytest.importorskip("av")
    root = short_lerobot(shared / "data/lerobot_sim_pick_place", tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="video.base_view/episode_000000.mp4"):
        convert(root, out)
    with pytest.raises(SystemExit, match="no columns of numbers action.jonts"):
        convert(root, out, "--images", "video.ego_view", "--columns", "action.jonts")
    with pytest.raises(SystemExit, match=r"no episodes \[1\]"):
        convert(root, out, "--images", "video.ego_view", "--episodes", 1)
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    late = pa.array(table["timestamp"].to_numpy() + np.float32(0.5 / 30))
    moved = table.set_column(table.schema.get_field_index("timestamp"), "timestamp", late)
    pq.write_table(moved, path)
    with pytest.raises(SystemExit, match="episode 0: .*has no frame at 9 times, first 0.017 s"):
        convert(root, out, "--images", "video.ego_view")
    pq.write_table(table, path)
    shutil.rmtree(tmp_path / ".out.converting")
    video = root / "videos/chunk-000/video.ego_view/episode_000002.mp4"
    whole = video.read_bytes()
    video.unlink()
    video.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="episode 2.*episode_000002.mp4"):
        convert(root, out, "--images", "video.ego_view")
    assert not out.exists()


def test_frames_of_long_groups_of_pictures(tmp_path):
    """One keyframe, B-frames, an episode in the middle of the video, a time asked for twice."""
    av = pytest.importorskip("av")
    from st4vla_jax.data.convert_lerobot import _frames
    from st4vla_jax.data.video import VideoReader, frame_table

    path = tmp_path / "a.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.options = {"g": "250", "bf": "2"}
        for _ in range(30):
            pixels = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    table = frame_table(path)
    wanted = table.pts[[12, 13, 13, 17, 29]]
    found = list(_frames(path, wanted))
    assert len(found) == 5
    for pts, frame in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(frame, VideoReader().frame(path, int(pts)))


def test_converters_import_neither_tensorflow_torch_nor_jax(pytestconfig):
    code = (
        "import sys\n"
        "import st4vla_jax.data.convert_lerobot, st4vla_jax.data.convert_hdf5\n"
        "import st4vla_jax.data.convert_rlds, st4vla_jax.data.convert_grounding\n"
        "import st4vla_jax.data.convert\n"
        "print(sorted({'tensorflow', 'torch', 'jax', 'grain'} & set(sys.modules)))"
    )
    pytest.importorskip("av")
    pytest.importorskip("h5py")
    root = pytestconfig.rootpath.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
