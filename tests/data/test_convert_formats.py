"""What each format becomes, compared with readings of the original; test_convert.py has faults."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from st4vla_jax.data.convert import main
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.image import decode_image
from st4vla_jax.data.oxe import SPECS, robot_spec
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import Part, RobotSpec
from st4vla_jax.data.writer import RECORDS
from tests.reference import shards as reference


def convert(source, out, *more):
    main(["--from", str(source), "--out", str(out), *map(str, more)])
    return out


def manifest(out):
    return json.loads((out / "conversion.json").read_text())


def records(out, split="train"):
    found = []
    for path in sorted(out.glob(f"*-{split}.array_record*")):
        reader = ArrayRecordReader(str(path))
        found += [reader.read([i])[0] for i in range(reader.num_records())]
    return found


def episodes_by_tfds(out, split="train"):
    import tensorflow_datasets as tfds

    assert "tensorflow" not in sys.modules
    source = tfds.builder_from_directory(str(out)).as_data_source()[split]
    return [[dict(step) for step in episode["steps"]] for episode in source]


def jpeg(pixels):
    """The re-encoded image, decoded."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return np.asarray(Image.open(io.BytesIO(out.getvalue())))


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


# --- HDF5 ---------------------------------------------------------------------------------------

DEMOS = (4, 7, 5)


def libero_file(path, text="put the bowl on the plate"):
    """LIBERO's layout; returns the demonstrations as dictionaries."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    demos = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": [*f'"{text}"']})
        for number in (2, 0, 10):  # h5py lists them as 0, 10, 2
            steps = DEMOS[len(demos)]
            demos.append({
                "actions": rng.uniform(-1, 1, (steps, 7)),
                "dones": np.arange(steps) == steps - 1,
                "rewards": (np.arange(steps) == steps - 1).astype(np.uint8),
                "robot_states": rng.normal(size=(steps, 9)),
                "states": rng.normal(size=(steps, 11)),
                "obs/agentview_rgb": rng.integers(0, 256, (steps, 16, 16, 3), np.uint8),
                "obs/eye_in_hand_rgb": rng.integers(0, 256, (steps, 16, 16, 3), np.uint8),
                "obs/ee_states": rng.normal(size=(steps, 6)),
                "obs/ee_pos": rng.normal(size=(steps, 3)),
                "obs/ee_ori": rng.normal(size=(steps, 3)),
                "obs/gripper_states": rng.normal(size=(steps, 2)),
                "obs/joint_states": rng.normal(size=(steps, 7)),
                "number": number,
            })  # fmt: skip
            for name, values in demos[-1].items():
                if name != "number":
                    data[f"demo_{number}/{name}"] = values
    return sorted(demos, key=lambda demo: demo.pop("number"))


@pytest.mark.parity
def test_libero(tmp_path):
    demos = libero_file(tmp_path / "libero_goal/a_demo.hdf5")
    libero_file(tmp_path / "libero_goal/b_demo.hdf5", "open the drawer")
    out = convert(tmp_path / "libero_goal", tmp_path / "out/1.0.0", "--shard_records", 4)
    about = manifest(out)
    assert about["settings"]["layout"] == "libero" and about["settings"]["rotate180"]
    assert about["left_out"] == ["obs/ee_ori", "obs/ee_pos"]
    assert (about["splits"]["train"]["records"], about["splits"]["train"]["steps"]) == (6, 32)
    assert len(about["splits"]["train"]["shards"]) == 2
    episodes = episodes_by_tfds(out)
    for number, steps in enumerate(episodes):
        demo = demos[number % 3]
        for t, step in enumerate(steps):
            seen = step["observation"]
            upright = demo["obs/agentview_rgb"][t][::-1, ::-1]
            np.testing.assert_array_equal(seen["image"], jpeg(np.ascontiguousarray(upright)))
            joined = [demo["obs/ee_states"][t], demo["obs/gripper_states"][t]]
            np.testing.assert_array_equal(seen["state"], np.concatenate(joined))
            np.testing.assert_array_equal(seen["joint_state"], demo["obs/joint_states"][t])
            np.testing.assert_array_equal(step["action"], demo["actions"][t])
            np.testing.assert_array_equal(step["states"], demo["states"][t])
            assert step["reward"] == demo["rewards"][t]
            assert step["is_terminal"] == demo["dones"][t]
            text = "put the bowl on the plate" if number < 3 else "open the drawer"
            assert step["language_instruction"].decode() == text
    spec = SPECS["libero_goal_no_noops"]
    source = RldsSource(out, spec, chunk=3, views=("primary", "wrist"))
    assert len(source) == 32
    actions = demos[0]["actions"].astype(np.float32)
    np.testing.assert_array_equal(source[0].robot.actions[:, :6], actions[:3, :6])
    gripper = 1 - np.clip(actions[:3, 6], 0, 1)
    np.testing.assert_array_equal(source[0].robot.actions[:, 6], gripper)


def robomimic_file(path, **attributes):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(1)
    demos = []
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift"})
        for number, steps in enumerate(DEMOS):
            demos.append({
                "actions": rng.uniform(-1, 1, (steps, 7)),
                "dones": np.zeros(steps, np.int64),
                "rewards": rng.random(steps),
                "states": rng.normal(size=(steps, 32)),
                "obs/agentview_image": rng.integers(0, 256, (steps, 20, 24, 3), np.uint8),
                "obs/agentview_depth": rng.random((steps, 20, 24, 1)).astype(np.float32),
                "obs/robot0_eef_pos": rng.normal(size=(steps, 3)),
                "obs/object": rng.normal(size=(steps, 10)).astype(np.float32),
                "next_obs/object": rng.normal(size=(steps, 10)),
            })  # fmt: skip
            for name, values in demos[-1].items():
                data[f"demo_{number}/{name}"] = values
            for name, value in attributes.items():
                data[f"demo_{number}"].attrs[name] = value
        file["mask/train"] = np.array([b"demo_0", b"demo_1"])
    return demos


def test_robomimic(tmp_path):
    demos = robomimic_file(tmp_path / "low_dim.hdf5")
    out = convert(tmp_path / "low_dim.hdf5", tmp_path / "out", "--instruction", "lift the cube")
    left_out = manifest(out)["left_out"]
    assert left_out == ["next_obs/object", "obs/agentview_depth"]
    for demo, steps in zip(demos, episodes_by_tfds(out), strict=True):
        assert len(steps) == len(demo["actions"])
        for t, step in enumerate(steps):
            seen = step["observation"]
            np.testing.assert_array_equal(
                seen["agentview_image"], jpeg(demo["obs/agentview_image"][t])
            )
            np.testing.assert_array_equal(seen["robot0_eef_pos"], demo["obs/robot0_eef_pos"][t])
            np.testing.assert_array_equal(seen["object"], demo["obs/object"][t])
            assert (seen["object"].dtype, step["states"].dtype) == (np.float32, np.float64)
            assert step["reward"] == np.float32(demo["rewards"][t]) and not step["is_terminal"]
            assert step["language_instruction"] == b"lift the cube"


def test_instructions_of_demonstrations_and_float32(tmp_path):
    demos = robomimic_file(tmp_path / "a.hdf5", ep_meta=json.dumps({"lang": "close the door"}))
    out = convert(tmp_path / "a.hdf5", tmp_path / "out", "--float32", "--rotate180")
    step = episodes_by_tfds(out)[1][2]
    assert step["language_instruction"] == b"close the door"
    assert step["action"].dtype == np.float32
    np.testing.assert_array_equal(step["action"], demos[1]["actions"][2].astype(np.float32))
    turned = np.ascontiguousarray(demos[1]["obs/agentview_image"][2][::-1, ::-1])
    np.testing.assert_array_equal(step["observation"]["agentview_image"], jpeg(turned))


def test_hdf5_faults(tmp_path):
    h5py = pytest.importorskip("h5py")
    path, out = tmp_path / "a.hdf5", tmp_path / "out"
    robomimic_file(path)
    with pytest.raises(SystemExit, match="no instruction for 3 demonstrations"):
        convert(path, out)
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/object"]
        del file["data/demo_2/actions"]
        file["data/demo_2/actions"] = np.zeros((3, 7))
    with pytest.raises(SystemExit) as error:
        convert(path, out, "--instruction", "x", "--shard_records", 1)
    assert "demo_1: " in str(error.value) and "object" in str(error.value)
    assert "demo_2: " in str(error.value) and "same length" in str(error.value)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="not a readable HDF5 file"):
        convert(path, out, "--instruction", "x")
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file["data/run/actions"] = np.zeros((3, 7))
    with pytest.raises(SystemExit, match="data/run is not named demo_N"):
        convert(tmp_path / "b.hdf5", out, "--instruction", "x")
    assert not out.exists()


# --- Grounding ----------------------------------------------------------------------------------


def grounding_file(root):
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for number in range(5):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"images/{number}.jpg")
    Image.fromarray(pixels[..., 0]).save(root / "images/gray.png")
    Image.fromarray(pixels).save(root / "images/other.bmp")

    def record(images, value, **more):
        human = {"from": "human", "value": "<image>" * len(images) + "find it"}
        answer = {"from": "gpt", "value": value, **more}
        return {"images": images, "conversations": [human, answer], "id": len(lines)}

    lines = []
    for number in range(5):
        x = 3 * number + 0.5
        region = {"kind": "box", "coordinates": [[x, 4], [x + 9, 20]], "image": 0, "label": "it"}
        images = [f"images/{number}.jpg"]
        lines.append(record(images, "<region>", regions=[region]))
    lines.append(record(["images/gray.png", "images/0.jpg"], "nothing"))
    lines.append(record(["images/other.bmp"], "at [0.25, 0.5]"))
    lines.append(record([], "no image"))
    path = root / "set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_sources_equal(a, b):
    assert len(a) == len(b)
    for index in range(len(a)):
        x, y = a[index], b[index]
        for one, other in zip(x.images, y.images, strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(x.turns, y.turns, strict=True):
            assert (one.role, one.text) == (other.role, other.text)
            for r, s in zip(one.regions, other.regions, strict=True):
                assert (r.kind, r.image, r.label) == (s.kind, s.image, s.label)
                np.testing.assert_array_equal(r.coordinates, s.coordinates)


@pytest.mark.parity
def test_grounding_and_back(tmp_path):
    import tensorflow_datasets as tfds

    path = grounding_file(tmp_path / "in")
    options = ["--coordinates", "fraction"]
    out = convert(path, tmp_path / "out", "--shard_records", 3, *options)
    train = manifest(out)["splits"]["train"]
    assert [shard["records"] for shard in train["shards"]] == [3, 3, 2]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    read = list(tfds.builder_from_directory(str(out)).as_data_source()["train"])
    for line, entry in zip(lines, read, strict=True):
        stored = json.loads(entry["record"])
        assert stored["id"] == line["id"]
        assert len(entry["images"]) == len(line["images"])
        for name, pixels in zip(line["images"], entry["images"], strict=True):
            np.testing.assert_array_equal(pixels, decode_image(tmp_path / "in" / name))
    original = (tmp_path / "in/images/2.jpg").read_bytes()
    feature = reference.parse(records(out)[2]).features.feature
    assert list(feature["images"].bytes_list.value) == [original]

    before = GroundingSource(path, name="a", coordinates="fraction")
    for source, folder in ((path, "direct"), (out, "back")):
        more = options if source == path else []
        again = convert(source, tmp_path / folder, "--to", "jsonl", *more)
        assert_sources_equal(before, GroundingSource(again / RECORDS, name="a"))


@pytest.mark.parity
def test_real_llava_records(shared, tmp_path):
    shutil.copytree(shared / "data/llava_demo", tmp_path / "in")
    path = tmp_path / "in/single_images.json"
    out = convert(path, tmp_path / "out")
    assert manifest(out)["splits"]["train"]["records"] == 3
    convert(out, tmp_path / "back", "--to", "jsonl")
    before = GroundingSource(path, name="a")
    assert_sources_equal(before, GroundingSource(tmp_path / "back" / RECORDS, name="a"))


def test_grounding_faults(tmp_path):
    path, out = grounding_file(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "in/images/3.jpg").unlink()
    with pytest.raises(SystemExit, match="images/3.jpg"):
        convert(path, out)
    convert(grounding_file(tmp_path / "b"), out)
    with pytest.raises(SystemExit, match="no such setting"):
        convert(out, tmp_path / "back", "--to", "jsonl", "--shard_records", 3)
    reference_root = reference.write_folder(tmp_path / "r", {}, {"train": []})
    with pytest.raises(SystemExit, match="not a folder of this converter"):
        convert(reference_root, tmp_path / "back", "--to", "jsonl")
    assert not (tmp_path / "back").exists()


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
