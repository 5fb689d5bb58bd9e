"""Demonstrations synthesised in LIBERO's and robomimic's layouts, converted and compared."""

import json

import numpy as np
import pytest

from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.rlds import RldsSource
from tests.reference.converted import convert, episodes_by_tfds, jpeg, manifest

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
