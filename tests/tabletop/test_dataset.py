import dataclasses
import json
import logging

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from st4vla_jax.data.conversion import MANIFEST
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.oxe import robot_spec
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import Part
from st4vla_jax.data.settings import DataSettings, open_pipeline
from st4vla_jax.data.shards import open_array_record
from st4vla_jax.tabletop import dataset
from st4vla_jax.tabletop.dataset import DatasetError, main, write_dataset
from st4vla_jax.tabletop.environment import Tabletop
from st4vla_jax.tabletop.episodes import NAME, VERSION
from st4vla_jax.tabletop.grounding import robot_example
from st4vla_jax.tabletop.tasks import TASKS

SIZE = 56
EPISODES = 18


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    write_dataset(out, episodes=EPISODES, grounding=24, generic=24, image_size=SIZE)
    return out


def metadata(out):
    """(task, split, seed) of each stored episode, read with tfds' own message."""
    found = []
    for shard in sorted((out / NAME / VERSION).glob("*array_record*")):
        reader = open_array_record(shard)
        for number in range(reader.num_records()):
            example = tf_example_pb2.Example.FromString(reader.read([number])[0])
            feature = example.features.feature
            task, split = (
                feature[f"episode_metadata/{key}"].bytes_list.value[0].decode()
                for key in ("task", "split")
            )
            found.append((task, split, feature["episode_metadata/seed"].int64_list.value[0]))
    return found


def source(out, **changes):
    spec = dataclasses.replace(robot_spec("tabletop"), **changes)
    return RldsSource(
        out / NAME / VERSION, spec, chunk=4, views=("primary", "wrist"), index_dir=out / "index"
    )


def test_executed_actions_replayed_open_loop_succeed(written):
    """Read by the pipeline's own source; pictures and states are those of the replay, exactly."""
    executed = source(written, action=(Part("executed_action"),))
    episodes = list(executed.standard_episodes())
    stored = metadata(written)
    assert [task for task, _, _ in stored] == [TASKS[i % len(TASKS)] for i in range(EPISODES)]
    assert len(episodes) == len(stored) == EPISODES
    env, successes, sample = Tabletop(SIZE), [], 0
    for (task, split, seed), episode in zip(stored, episodes, strict=True):
        observation = env.reset(seed, task, split)
        for action, state in zip(episode.actions, episode.state, strict=True):
            read = executed[sample]
            assert read.turns[0].text == observation.instruction
            np.testing.assert_array_equal(read.images[0], observation.images["primary"])
            np.testing.assert_array_equal(read.images[1], observation.images["wrist"])
            np.testing.assert_array_equal(state, observation.state)
            observation, done, success, _ = env.step(action)
            sample += 1
        assert done
        successes.append(success)
    assert sample == len(executed)
    assert np.mean(successes) >= 0.98


def test_labels_are_stored_beside_what_was_executed(written):
    labels = np.concatenate([e.actions for e in source(written).standard_episodes()])
    executed = source(written, action=(Part("executed_action"),))
    disturbed = np.concatenate([e.actions for e in executed.standard_episodes()])
    assert labels.shape == disturbed.shape
    assert 0 < np.abs(labels - disturbed)[:, :3].mean() < 0.02


def test_the_action_spec_travels(written):
    read = source(written)
    assert read.spec.action_spec.mode == "min_max"
    assert read.spec.control_hz == 5
    assert read[0].robot.state.shape == (7,)
    assert read[0].robot.actions.shape == (4, 7)


def test_grounding_records_are_read_back(written):
    read = GroundingSource(
        written / "grounding/records.jsonl", name="robot", index_dir=written / "index"
    )
    assert len(read) == 24
    assert not read.bad
    for number in range(24):
        example, sample = robot_example(0, number, "train", SIZE), read[number]
        np.testing.assert_array_equal(sample.images[0], example.image)
        assert [turn.text for turn in sample.turns] == [turn.text for turn in example.turns]
        for a, b in zip(sample.turns[1].regions, example.turns[1].regions, strict=True):
            np.testing.assert_allclose(a.coordinates, b.coordinates, atol=1e-4)
        assert read.record(number)["kind"] == example.info["kind"]


def test_the_pipeline_batches_it(written):
    """All three parts through the pipeline, statistics computed from the episodes."""
    grounding = {
        name: {"kind": "grounding", "path": str(written / name / "records.jsonl")}
        for name in ("grounding", "generic")
    }
    robot = {
        "kind": "rlds", "path": str(written / NAME / VERSION), "spec": "tabletop",
        "views": ("primary", "wrist"),
    }  # fmt: skip
    settings = DataSettings.from_dict(
        {
            "sets": {"robot": robot, **grounding},
            "image": {"size": (SIZE, SIZE), "min_pixels": 784, "max_pixels": 50_176},
            "schedule": {
                "robot_samples": 4, "grounding_samples": 4, "tokens": 768, "multiple": 2,
                "window": 2, "views": 2,
            },
            "dino_size": 28, "chunk": 4, "state_dim": 7, "threads": 0,
            "index_dir": str(written / "index"),
        }
    )  # fmt: skip
    batches = open_pipeline(settings).batches(0)
    batch = next(batches)
    batches.close()
    actions = batch.action.actions[batch.action.valid]
    assert actions.shape[1:] == (4, 7)
    assert np.abs(actions).max() <= 1.0 + 1e-6  # min_max of the labels
    assert (batch.vlm.target_weight > 0).any()


# --- Resuming -----------------------------------------------------------------------------------


def hashes(out):
    manifest = json.loads((out / NAME / VERSION / MANIFEST).read_text())
    return [s["sha256"] for s in manifest["splits"]["train"]["shards"]]


def test_a_run_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_SHARD_EPISODES", 2)
    settings = {"episodes": 6, "generic": 3, "image_size": 28, "tasks": ("reach", "pick")}
    write_dataset(tmp_path / "whole", **settings)
    made, make = [], dataset.successful

    def killed(env, seed, task, split):
        if seed == 5 and len(made) == 5:
            raise KeyboardInterrupt
        made.append(seed)
        return make(env, seed, task, split)

    monkeypatch.setattr(dataset, "successful", killed)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "cut", **settings)
    assert made == [0, 1, 2, 3, 4]
    assert not (tmp_path / "cut" / NAME / VERSION).exists()
    made.append(-1)
    write_dataset(tmp_path / "cut", **settings)
    assert made[6:] == [4, 5]  # the unfinished shard alone
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    write_dataset(tmp_path / "cut", **settings)
    assert len(made) == 8


def test_other_settings_are_refused(tmp_path):
    write_dataset(tmp_path / "set", episodes=0, generic=2, image_size=28)
    with pytest.raises(DatasetError, match=r"(?s)other settings.*generic: 2 there, 3 asked.*seed"):
        write_dataset(tmp_path / "set", episodes=0, generic=3, image_size=28, seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(DatasetError, match="not empty"):
        write_dataset(tmp_path / "other", episodes=0, generic=2)


def test_other_code_is_refused(tmp_path, monkeypatch):
    write_dataset(tmp_path / "set", episodes=0, generic=2, image_size=28)
    monkeypatch.setattr(dataset, "_code_digest", lambda: "changed")
    with pytest.raises(DatasetError, match="code: another version"):
        write_dataset(tmp_path / "set", episodes=0, generic=2, image_size=28)


def test_all_wrong_flags_are_named_at_once(tmp_path):
    arguments = ["--episodes=-1", "--image_size=8", "--split=moon", "--tasks=fly", "--workers=0"]
    with pytest.raises(SystemExit) as error:
        main([*arguments, f"--out={tmp_path / 'set'}"])
    text = str(error.value)
    for part in ("--episodes -1", "--image_size 8", "--split 'moon'", "--tasks fly"):
        assert part in text
    assert "--workers 0" in text
    assert not (tmp_path / "set").exists()
    with pytest.raises(SystemExit, match="nothing to write: give --episodes"):
        main([f"--out={tmp_path / 'set'}"])


def test_only_training_sets_have_lists(tmp_path):
    def kinds(split):
        out = tmp_path / split
        write_dataset(out, episodes=0, generic=40, grounding=40, split=split, image_size=28)
        files = [out / name / "records.jsonl" for name in ("generic", "grounding")]
        return ['{\\"label\\": ' in file.read_text() for file in files]

    assert kinds("train") == [True, True] and kinds("val") == [False, False]


def test_a_split_leaves_out_tasks_it_means_nothing_for(tmp_path):
    write_dataset(
        tmp_path / "set", episodes=7, split="spatial", image_size=28,
        tasks=("open_slider", "reach", "pick"),
    )  # fmt: skip
    assert {task for task, _, _ in metadata(tmp_path / "set")} == {"reach", "pick"}
    with pytest.raises(DatasetError, match="has no meaning for open_slider"):
        write_dataset(tmp_path / "no", episodes=1, split="spatial", tasks=("open_slider",))


def test_it_says_how_far_it_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(dataset, "_PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        write_dataset(tmp_path / "set", episodes=2, generic=3, image_size=28, tasks=("reach",))
    assert "1 of 1 shards" in caplog.text
    assert "generic: 2 of 3 records" in caplog.text


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    settings = {"episodes": 4, "generic": 40, "grounding": 40, "image_size": 28}
    write_dataset(tmp_path / "one", **settings)
    write_dataset(tmp_path / "two", **settings, workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    for name in ("generic", "grounding"):
        one, two = ((tmp_path / run / name / "records.jsonl").read_text() for run in ("one", "two"))
        assert one == two
