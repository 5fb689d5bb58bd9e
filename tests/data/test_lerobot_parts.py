"""Which steps of a LeRobot folder are samples: held-out episodes and pauses."""

import dataclasses
import json

import numpy as np
import pytest

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402

from st4vla_jax import compute_stats  # noqa: E402
from st4vla_jax.data.episode_table import Filters  # noqa: E402
from st4vla_jax.data.lerobot import LeRobotGrounding, LeRobotSource  # noqa: E402
from st4vla_jax.data.normalize import Statistics  # noqa: E402
from st4vla_jax.data.settings import (  # noqa: E402
    DataSettings,
    SettingsError,
    open_held_out,
    open_pipeline,
)
from tests.data.test_lerobot_real import SIM  # noqa: E402


@pytest.fixture(scope="session")
def real(shared):
    return shared / "data/lerobot_sim_pick_place"


def numbers(source):
    """Episodes of a source's samples, by their records."""
    names = {source[int(i)].record for i in np.linspace(0, len(source) - 1, 12)}
    return {name.split("episode ")[1].split(" ")[0] for name in names}


def test_robot_and_boxes_hold_out_the_same_episodes(real, tmp_path):
    held = LeRobotSource(real, SIM, chunk=4, holdout=0.25, part="held_out", index_dir=tmp_path)
    train = LeRobotSource(real, SIM, chunk=4, holdout=0.25, index_dir=tmp_path)
    assert len(np.unique(held.episodes())) == 1 and len(np.unique(train.episodes())) == 3
    assert len(held) + len(train) == 1667 and not numbers(held) & numbers(train)
    assert train.left_out["held out episode"] == len(held)
    assert sum(len(e.actions) for e in train.standard_episodes()) == len(train)
    video = {"name": "sim", "video": "video.ego_view", "stride": 40, "holdout": 0.25}
    boxes = {
        part: LeRobotGrounding(real, part=part, index_dir=tmp_path, **video)
        for part in ("train", "held_out")
    }
    assert numbers(boxes["held_out"]) == numbers(held)
    assert numbers(boxes["train"]) == numbers(train)
    assert len(set(held.contents().tolist())) == 4


def settings(real, tmp_path, **boxes):
    spec = tmp_path / "sim.json"
    spec.write_text(json.dumps(SIM.to_dict()))
    sim = {"kind": "lerobot", "path": str(real), "spec": str(spec), "holdout": 0.25, "pause": 1e-4}
    shown = {"kind": "lerobot_grounding", "path": str(real), "video": "video.ego_view",
             "stride": 40} | boxes  # fmt: skip
    return DataSettings.from_dict({
        "sets": {"sim": sim, "shown": shown}, "action_dim": 8, "index_dir": str(tmp_path),
        "schedule": {"robot_samples": 4, "grounding_samples": 2, "window": 2},
    })  # fmt: skip


def test_pipeline_of_both_parts(real, tmp_path):
    both = settings(real, tmp_path, holdout=0.25)
    held = open_held_out(both, open_pipeline(both))
    batches = held.batches()
    batch = next(batches)
    batches.close()
    assert batch.action.valid.sum() == 4 and (batch.vlm.target_weight > 0).any()
    with pytest.raises(SettingsError, match="sets.shown trains on 1 episodes that sets.sim holds"):
        open_pipeline(settings(real, tmp_path))
    # The command's statistics of the training part are those of the settings.
    out = tmp_path / "stats.json"
    argv = ["--data", str(real), "--spec", str(tmp_path / "sim.json"), "--out", str(out)]
    assert compute_stats.main([*argv, "--holdout", "0.25"]) == 0
    entry = Statistics.load(out)["franka_robotiq"]
    ours = held.data_sets[-1].encoders[0].statistics["franka_robotiq"]
    assert entry.num_trajectories == ours.num_trajectories == 3
    np.testing.assert_array_equal(entry.action.q99, ours.action.q99)


@pytest.mark.parametrize("absolute", [False, True])
def test_pauses_are_left_out_as_a_loop_finds_them(real, tmp_path, absolute):
    """Deltas rest at 0, absolute positions where they were; the gripper must not move either."""
    spec = SIM
    if absolute:
        spec = dataclasses.replace(
            SIM, absolute=tuple(range(8)),
            action=(dataclasses.replace(SIM.action[0], column="action.joints"), SIM.action[1]),
        )  # fmt: skip
    every = LeRobotSource(real, spec, chunk=1, index_dir=tmp_path)
    expected, threshold = [], 2e-3
    for number in range(4):
        table = pq.read_table(real / f"data/chunk-000/episode_{number:06d}.parquet")
        values = np.stack(table[spec.action[0].column].to_numpy(zero_copy_only=False))
        values = values.astype(np.float32)
        gripper = np.stack(table["action.gripper_close"].to_numpy(zero_copy_only=False))
        for step, joints in enumerate(values):
            moved = joints - values[step - 1] if absolute else joints
            same = step == 0 or (gripper[step] == gripper[step - 1]).all()
            first = absolute and step == 0
            if first or not same or (np.abs(moved) > threshold).any():
                expected.append((number, step))
    source = LeRobotSource(
        real, spec, chunk=1, filters=Filters(pause=threshold), index_dir=tmp_path
    )
    assert 100 < len(expected) < 1600
    rows = np.asarray(source._part.rows)
    found = zip(source._index["episode"][rows], source._index["step"][rows], strict=True)
    assert [(int(a), int(b)) for a, b in found] == expected
    assert source.left_out["pause"] == len(every) - len(expected)
    assert source.fingerprint() != every.fingerprint()
