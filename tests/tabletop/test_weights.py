"""The weights that come with the project: quickstart's start."""

import json

from configs.tabletop import get_config
from st4vla_jax import evaluate
from st4vla_jax.checkpoint import read_meta
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.tabletop import WEIGHTS
from st4vla_jax.tabletop.dataset import write_dataset
from st4vla_jax.tabletop.language import PROMPT
from st4vla_jax.tabletop.words import FOLDER, word_tokenizer
from st4vla_jax.train_config import TrainConfig


def test_they_are_small_and_fit_the_configs():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) < 15e6
    meta = read_meta(WEIGHTS)
    assert meta.model == TrainConfig.from_dict(get_config("stage2")).model
    assert TrainConfig.from_dict(get_config("stage1")).model.vision == meta.model.vision
    assert meta.prompt.template == PROMPT
    tokenizer = Tokenizer.load(WEIGHTS / "meta" / FOLDER)
    assert tokenizer.fingerprint() == word_tokenizer().fingerprint()


def test_they_ground_on_pictures_that_nobody_trained_on(tmp_path, capsys):
    """Boxes drawn from a prior hit in 1 or 2 of 100."""
    write_dataset(
        tmp_path / "set", episodes=0, generic=64, grounding=64, seed=987, split="val",
        tasks=("reach", "pick"),
    )  # fmt: skip
    for name in ("generic", "grounding"):
        flags = ["--suite", "grounding", "--data", tmp_path / "set" / name / "records.jsonl"]
        flags += ["--batch-size", 64, "--max-new-tokens", 48, "--name", "x"]
        args = ["--checkpoint", WEIGHTS, "--out", tmp_path / name, *flags]
        assert evaluate.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
        metrics = json.loads((tmp_path / name / "summary.json").read_text())["metrics"]
        assert metrics["eval/x/iou50"] > 0.7, name


def test_they_reach_what_is_named(tmp_path, capsys):
    """A random policy succeeds in 3 of 100."""
    flags = "--suite tabletop --tasks reach --splits val --episodes 16 --num-envs 16 --execute 1"
    args = ["--checkpoint", WEIGHTS, "--out", tmp_path, *flags.split()]
    assert evaluate.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "summary.json").read_text())["metrics"]
    assert metrics["eval/success/task/reach"] > 0.3
