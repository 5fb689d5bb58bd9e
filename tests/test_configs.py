"""Every config file builds, stays short, and says the command that runs it."""

import importlib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from st4vla_jax.config import ConfigError
from st4vla_jax.train_config import TrainConfig, plain

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common", "data")
)


def tree(name: str):
    return plain(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    config = TrainConfig.from_dict(tree(name))
    assert not config.without_effect()
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    assert f"python -m st4vla_jax.train --config=configs/{name}.py" in text


def test_ablations_differ_where_the_paper_says():
    full, cotrain, vanilla = (tree(n) for n in ("stage2_action", "vanilla_cotrain", "vanilla_vla"))
    assert full["model"]["bridge"]["gradient_scale"] == 0.5
    assert full["data"]["schedule"]["robot_samples"] == 256
    assert full["data"]["schedule"]["grounding_samples"] == 64
    assert full["data"]["prompts"] == ["paper"]
    for other in (cotrain, vanilla):
        assert other["model"]["bridge"]["gradient_scale"] == 1.0
        assert other["data"]["prompts"] == ["none"]
    assert vanilla["data"]["schedule"]["grounding_samples"] == 0
    assert cotrain["data"]["sets"] == full["data"]["sets"]


def test_stage1_has_the_vlm_alone():
    config = TrainConfig.from_dict(tree("stage1_grounding"))
    assert not config.model.has_action and set(config.optim.groups) == {"vlm"}


def test_all_problems_are_named_at_once():
    bad = tree("stage2_action")
    bad["lss"] = {}
    bad["mesh"]["data"] = 0
    bad["mesh"]["rules"] = {"embd": "fsdp"}
    bad["model"]["vlm"] = "4b"
    bad["data"]["schedule"]["tokns"] = 3
    bad["data"]["sets"]["bridge_orig"]["kind"] = "rldss"
    bad["runtime"]["remat"] = "x"
    bad["runtime"]["attention"] = "flash"
    bad["optim"]["groups"]["vlm"]["lr"] = -1
    bad["optim"]["groups"]["dit"]["pattern"] = "("
    bad["optim"]["ema"] = 2.0
    bad["loss"]["repeats"] = 0
    bad["lora"] = {"a": {"pattern": "x", "rank": 0}}
    bad["checkpoint"]["keep_last"] = 0
    bad["evaluation"]["samples"] = 0
    bad["data"]["chunk"] = 16
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict(bad)
    text = str(error.value)
    for part in (
        "lss: unknown key, did you mean 'loss'?", "mesh", "'4b'", "tokns", "'tokens'", "rldss",
        "remat", "optim.groups.vlm.lr -1", "optim.groups.dit.pattern", "optim.ema", "repeats",
        "lora.a", "keep_last", "samples", "data.chunk: the model decides it",
    ):  # fmt: skip
        assert part in text, f"{part} not in {text}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["data"]["schedule"].update(robot_samples=0), "robot_samples is 0"),
        (lambda c: c["evaluation"].update(every=5), "no data set has a holdout"),
        (lambda c: c["checkpoint"].update(best_metric="eval/action_mse"), "best_metric"),
        (lambda c: c["model"].update(dino="", dit=""), "the model has no dino and dit"),
        (lambda c: c.update(steps=0), "steps 0"),
        (
            lambda c: c["data"]["sets"]["bridge_orig"].update(views=["primary", "secondary"]),
            "views is 1, but data.sets.bridge_orig.views has 2",
        ),
    ],
)
def test_sections_that_do_not_go_together(change, named):
    bad = tree("stage2_action")
    change(bad)
    with pytest.raises(ConfigError, match=named):
        TrainConfig.from_dict(bad)


def test_settings_without_effect_are_named():
    config = tree("vanilla_vla")
    config["loss"]["text"] = 0.5
    assert TrainConfig.from_dict(config).without_effect() == ["loss.text"]


def test_plain_is_json_like():
    assert plain(ConfigDict({"a": (1, 2), "b": {"c": ConfigDict({"d": ()})}})) == {
        "a": [1, 2], "b": {"c": {"d": []}},
    }  # fmt: skip
