"""The weights that come with the project: quickstart's start."""

import json

import numpy as np

from configs.tabletop import get_config
from st4vla_jax import evaluate
from st4vla_jax.checkpoint import read_meta
from st4vla_jax.policy.policy import Policy
from st4vla_jax.tabletop import WEIGHTS
from st4vla_jax.tabletop.dataset import write_dataset
from st4vla_jax.tabletop.environment import Tabletop
from st4vla_jax.train_config import TrainConfig


def test_they_are_small_and_fit_the_configs():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) < 15e6
    meta = read_meta(WEIGHTS)
    assert meta.model == TrainConfig.from_dict(get_config("stage2")).model
    assert TrainConfig.from_dict(get_config("stage1")).model.vision == meta.model.vision


def test_they_ground_on_pictures_that_nobody_trained_on(tmp_path, capsys):
    """Boxes drawn from a prior hit in 1 of 100."""
    write_dataset(tmp_path / "set", episodes=0, generic=64, seed=987)
    flags = ["--suite", "grounding", "--data", tmp_path / "set/generic/records.jsonl"]
    flags += ["--batch-size", 64, "--max-new-tokens", 48, "--name", "generic"]
    args = ["--checkpoint", WEIGHTS, "--out", tmp_path / "out", *flags]
    assert evaluate.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "out/summary.json").read_text())["metrics"]
    assert metrics["eval/generic/iou50"] > 0.4


def test_they_act():
    observation = Tabletop(image_size=112).reset(seed=3, task="reach", split="val")
    result = Policy.load(WEIGHTS).act(
        list(observation.images.values()), observation.instruction, state=observation.state
    )
    assert result.actions.shape == (1, 8, 7) and np.isfinite(result.actions).all()
    assert np.abs(result.actions[..., :3]).max() > 0.005  # m a control step: it moves
