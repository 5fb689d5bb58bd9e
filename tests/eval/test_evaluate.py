"""The evaluate command on a tiny checkpoint, and its suites on made-up environments."""

import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from configs.tabletop import get_config
from st4vla_jax import evaluate
from st4vla_jax.checkpoint import Meta, write_checkpoint
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec
from st4vla_jax.eval.closed_loop import Episode, LoopConfig
from st4vla_jax.eval.runner import checkpoint_hash, run_closed_loop, versions
from st4vla_jax.policy.ensemble import AdaptiveEnsemble, RecedingHorizon, TemporalEnsemble
from st4vla_jax.tabletop.dataset import write_dataset
from st4vla_jax.tabletop.environment import Observation, Transition
from st4vla_jax.train_config import plain
from tests.reference.policy import PROMPT, TOKENIZER, random_params, tiny_policy

LIMITS = {"mean": 0.0, "std": 1.0, "max": 1.0, "min": -1.0, "q01": -0.5, "q99": 0.5}
ENTRY = {
    "action": {k: [v] * 7 for k, v in LIMITS.items()} | {"mask": [True] * 6 + [False]},
    "num_transitions": 3,
    "num_trajectories": 1,
}


def write_policy(folder, files=None):
    model = tiny_policy()
    leaves = [
        ("/".join(k.key for k in path), np.asarray(x))
        for path, x in jax.tree_util.tree_leaves_with_path(random_params(model))
    ]
    files = {f"tokenizer/{name}": content for name, content in TOKENIZER.files().items()} | (
        files or {}
    )
    meta = Meta(model.cfg, PROMPT, ImageConfig(size=(56, 56), min_pixels=3136), ActionSpec())
    write_checkpoint(folder, leaves, meta, files)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    statistics = {"dataset_statistics.json": json.dumps({"tabletop": ENTRY}).encode()}
    return write_policy(tmp_path_factory.mktemp("policy") / "ckpt", statistics)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    lines = []
    for i in range(3):
        picture = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        region = {"kind": "box", "coordinates": [[4 + i, 4], [20, 20]], "image": 0}
        answer = {"from": "gpt", "value": "<region>", "regions": [region]}
        asked = {"from": "human", "value": "<image>where?"}
        record = {"image": f"{i}.png", "conversations": [asked, answer], "things": 1 + i % 2}
        lines.append(json.dumps(record))
    (folder / "boxes.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "boxes.jsonl"


def run(checkpoint, out, *flags):
    return evaluate.main(["--checkpoint", str(checkpoint), "--out", str(out), *map(str, flags)])


def test_grounding_and_tabletop(checkpoint, records, tmp_path, capsys):
    flags = ["--suite", "grounding", "tabletop", "--data", records, "--prior", records]
    flags += ["--by", "things"]
    flags += ["--batch-size", 2, "--max-new-tokens", 4, "--tasks", "reach", "--episodes", 2]
    flags += ["--num-envs", 2, "--execute", 8, "--image-size", 56, "--ddim-steps", 2]
    assert run(checkpoint, tmp_path / "a", *flags) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    metrics = summary["metrics"]
    assert metrics["eval/boxes/iou50"] == 0 and metrics["eval/boxes/iou50_floor"] > 0.9
    assert 0 <= metrics["eval/success/split/train"] <= 1
    assert summary["checkpoint_sha256"] == checkpoint_hash(checkpoint)
    assert summary["versions"] == versions()
    lines = (tmp_path / "a" / "grounding_boxes.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["record"].rpartition(":")[2] for a in answers] == ["1", "2", "3"]
    assert [a["group"] for a in answers] == ["1", "2", "1"]
    assert {metrics[f"eval/boxes/things_{n}/iou50"] for n in (1, 2)} == {0}
    episodes = [json.loads(e) for e in (tmp_path / "a" / "episodes.jsonl").read_text().splitlines()]
    assert sorted(e["seed"] for e in episodes) == [10**9, 10**9 + 1]
    assert all(e["settings"]["checkpoint_sha256"] == checkpoint_hash(checkpoint) for e in episodes)
    report = (tmp_path / "a" / "report.html").read_text()
    assert "policy, things 2</td><td>IoU@0.5</td><td>0.00 [0.00, 0.79] n=1" in report
    assert "Grounding: boxes" in report and "Closed loop" in report and "[0.00, " in report

    # The same command finds its episodes; a comparison with itself finds no difference.
    capsys.readouterr()
    assert run(checkpoint, tmp_path / "a", *flags, "--against", tmp_path / "a") == 0
    shown = capsys.readouterr().out
    assert "2 of 2 episodes are there already" in shown
    assert shown.count("McNemar p = 1") == 2
    again = (tmp_path / "a" / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(e) for e in again] == episodes

    assert run(checkpoint, tmp_path / "a", *flags, "--cfg-scale", 1.0) == 1
    assert "other settings; choose another --out" in capsys.readouterr().err


def test_held_out_actions_of_a_run(tmp_path, capsys):
    """The run's own config says where its data are; statistics are the checkpoint's."""
    write_dataset(tmp_path / "data", episodes=12, grounding=8, image_size=56)
    config = get_config("stage2")
    config.model.update({"dino": "tiny", "dit": "tiny"})
    config.model.bridge.state_dim = 0
    config.data.sets.tabletop.path = str(tmp_path / "data" / "tabletop" / "1.0.0")
    config.data.sets.tabletop.holdout = 0.4
    config.data.sets.grounding.path = str(tmp_path / "data" / "grounding" / "records.jsonl")
    config.data.sets.grounding.images = str(tmp_path / "data" / "grounding")
    config.data.sets.grounding.holdout = 0.4
    with config.unlocked():
        config.data.sets.tabletop.views = ("wrist", "primary")
    config.data.schedule.update({"robot_samples": 4, "grounding_samples": 2, "window": 2})
    config.data.schedule.update({"tokens": 640, "views": 2})  # bytes are tokens here
    record = {"format_version": 1, "step": 0, "metrics": {}, "run": {"config": plain(config)}}
    statistics = json.dumps({"tabletop": ENTRY}).encode()
    files = {"train.json": json.dumps(record).encode(), "dataset_statistics.json": statistics}
    folder = write_policy(tmp_path / "ckpt", files)
    capsys.readouterr()
    flags = ("--suite", "actions", "--samples", 2, "--batches", 2)
    assert run(folder, tmp_path / "out", *flags) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]
    for name in ("", "_mean_baseline", "_zero_baseline", "_neighbour_baseline", "/gripper", "/h7"):
        assert metrics[f"eval/action_mse{name}"] > 0
    assert metrics["eval/text_loss"] > 0
    # With the checkpoint's statistics (-0.5 and 0.5) small moves stay small: q99 scales by 2.
    assert metrics["eval/action_mse_zero_baseline"] < 0.5
    assert evaluate.trained_views(folder) == ("wrist", "primary")


def test_bad_input(checkpoint, records, tmp_path, capsys):
    assert run(tmp_path / "none", tmp_path / "o", "--suite", "actions") == 1
    assert "no complete checkpoint" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "o", "--suite", "actions") == 1
    assert "needs a checkpoint that st4vla_jax.train wrote" in capsys.readouterr().err
    bare = write_policy(tmp_path / "bare")
    assert run(bare, tmp_path / "o", "--suite", "tabletop") == 1
    assert "no dataset_statistics.json" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "o", "--suite", "tabletop", "--embodiment", "franka") == 1
    assert "no statistics for embodiment 'franka'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(checkpoint, tmp_path / "o", "--suite", "grounding")
    assert "needs --data" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "o", "--suite", "grounding", "--data", records, "--by", "x")
    assert "boxes.jsonl:1 has no key 'x'" in capsys.readouterr().err


def test_executors_by_flag():
    base = ["--checkpoint", "c", "--out", "o", "--suite", "tabletop"]
    kinds = {
        "receding": RecedingHorizon,
        "temporal": TemporalEnsemble,
        "adaptive": AdaptiveEnsemble,
    }
    for name, kind in kinds.items():
        args = evaluate.parse_args([*base, "--executor", name])
        assert isinstance(evaluate.executor(args)(), kind)


def test_training_curves(checkpoint, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "00000002"
    step.mkdir(parents=True)
    assert evaluate.training_section(step) == []
    shown = {"align/pss": 0.5, "align/pss_random": 0.1, "eval/set/iou50": 0.0, "loss/text": 1.0}
    lines = [{"step": s, **shown, "time/step": 2, "loss/text/set": 1.0} for s in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    (section,) = evaluate.training_section(step)
    assert section.curves["PSS"] == {
        "align/pss": [(1, 0.5), (2, 0.5)],
        "align/pss_random": [(1, 0.1), (2, 0.1)],
    }
    found = {name for curves in section.curves.values() for name in curves}
    assert found == set(shown)


# --- Closed loop: what is kept -------------------------------------------------------------------


class Coin:
    """Succeeds at once if the seed is a multiple of the environment's number."""

    tasks, splits = ("flip",), ("train",)

    def __init__(self, number):
        self.number, self.resets = number, []

    def reset(self, seed, task, split):
        self.seed = seed
        self.resets.append(seed)
        return Observation({"primary": np.zeros((8, 8, 3), np.uint8)}, "flip it", np.zeros(1))

    def step(self, action):
        success = self.seed % self.number == 0
        observation = Observation(
            {"primary": np.zeros((8, 8, 3), np.uint8)}, "flip it", np.zeros(1)
        )
        return Transition(observation, True, success, {"failure": "tails"})


class Sampler(types.SimpleNamespace):
    chunk_shape = (1, 1)

    def __call__(self, observations, noise):
        return noise


def flip(out, number, seeds, **more):
    environment = Coin(number)
    outcome = run_closed_loop(
        Sampler(), lambda: environment, [Episode(s, "flip", "train") for s in seeds],
        lambda: RecedingHorizon(1), out, settings={"number": number}, cfg=LoopConfig(1),
        say=lambda text: None, **more,
    )  # fmt: skip
    return outcome, environment.resets


def test_episodes_are_taken_up_where_they_stopped(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    _, ran = flip(tmp_path / "a", 2, range(4))
    assert ran == [0, 1, 2, 3]
    path = tmp_path / "a" / "episodes.jsonl"
    path.write_text(path.read_text()[:-20])  # killed while writing the last line
    outcome, ran = flip(tmp_path / "a", 2, range(10))
    assert ran == [3, 4, 5, 6, 7, 8, 9]
    assert len(path.read_text().splitlines()) == 10
    assert outcome.metrics["eval/success"] == 0.5
    assert outcome.section.rows[0][2] == "0.50 [0.24, 0.76] n=10"
    assert "5 episodes ended by: task" in outcome.section.lines
    with pytest.raises(ValueError, match="other settings"):
        flip(tmp_path / "a", 3, range(4))

    # Multiples of 2 against multiples of 4, below 10: 2, 6 are solved by the first alone.
    flip(tmp_path / "b", 4, range(10))
    outcome, _ = flip(tmp_path / "a", 2, range(10), against=tmp_path / "b")
    assert "solved by one alone 2 and 0, McNemar p = 0.5" in outcome.section.lines[-1]
