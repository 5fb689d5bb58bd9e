"""Exports: what upstream cannot run is refused, what it does otherwise is said."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import yaml

from convert_weights import export, to_torch
from convert_weights.qwen2_5_vl import config_from_hf, hf_config, read_folder
from convert_weights.rules import ConversionError
from convert_weights.st4vla import policy_rules
from st4vla_jax.checkpoint import Meta, write_checkpoint
from st4vla_jax.config import model_config
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec
from st4vla_jax.data.prompts import PromptConfig
from st4vla_jax.data.tokenizer import byte_level_tokenizer


def refused(capsys, tmp_path, *args):
    """Runs an export that must fail; returns its message."""
    before = sorted(tmp_path.rglob("*"))
    assert to_torch.main([str(a) for a in args]) == 1
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    return capsys.readouterr().err


def write_zeros(out, cfg, drop=None):
    leaves = [(r.jax, np.zeros(r.jax_shape, np.float32)) for r in policy_rules(cfg)]
    leaves = [leaf for leaf in leaves if leaf[0] != drop]
    write_checkpoint(out, leaves, Meta(cfg, PromptConfig(), ImageConfig(), ActionSpec()), {})


def test_export_that_upstream_could_not_load(capsys, tmp_path):
    cfg = model_config("tiny", "tiny", "tiny", bridge={"state_dim": 8})
    write_zeros(tmp_path / "state", cfg)
    write_zeros(tmp_path / "vlm", dataclasses.replace(cfg, dino=None, bridge=None, dit=None))
    args = ("--checkpoint", tmp_path / "vlm", "--out", tmp_path / "out", "--format", "both")
    message = refused(capsys, tmp_path, *args)
    assert "a VLM alone" in message and "--format hf" in message
    for part in (
        "reads proprioception (state_dim 8)",
        "16 queries; upstream's DiT takes 64",
        "a DiT of width 64, depth 2 and 4 heads; upstream has S (width 384",
        "a DINOv2 of width 64, depth 2 and 4 heads for images of 56 pixels; upstream has S (wi",
        "--allow-custom-sizes",
    ):
        assert part in size_message(capsys, tmp_path)


def size_message(capsys, tmp_path):
    args = ("--checkpoint", tmp_path / "state", "--out", tmp_path / "out", "--format", "upstream")
    return refused(capsys, tmp_path, *args)


def test_sizes_that_upstream_computes():
    """Every preset but DINOv2 g; heads, which no shape tells, make a difference."""
    for dino, dit in itertools.product("sblg", "sbl"):
        cfg = model_config("3b", dino, dit)
        assert bool(export.size_problems(cfg)) == (dino == "g"), (dino, dit)
    assert "channels says 1408" in export.size_problems(cfg)[0]
    cfg = model_config("3b", "s", "b", action={"chunk": 8, "action_dim": 8})
    assert export.size_problems(cfg) == []
    assert (export.dino_name(cfg.dino), export.dit_name(cfg.dit)) == ("dinov2_vits14", "DiT-B")
    for part, fields, message in (
        ("dino", {"num_heads": 12}, "DINOv2 of width 384, depth 12 and 12 heads"),
        ("dino", {"image_size": 448}, "for images of 448 pixels"),
        ("bridge", {"num_heads": 12}, "Q-Former of 12 heads; upstream's has 8"),
        ("bridge", {"mlp_ratio": 2}, "mlp_ratio 2"),
        ("dit", {"num_heads": 8}, "DiT of width 768, depth 12 and 8 heads"),
        ("dit", {"depth": 13}, "depth 13"),
    ):
        odd = dataclasses.replace(getattr(cfg, part), **fields)
        (problem,) = export.size_problems(dataclasses.replace(cfg, **{part: odd}))
        assert message in problem


def test_export_says_what_upstream_does_otherwise(capsys, tmp_path):
    cfg = model_config("tiny", "tiny", "tiny")
    write_zeros(tmp_path / "c", cfg)
    meta = json.loads((path := tmp_path / "c" / "meta" / "meta.json").read_text())
    meta["action"]["mode"] = "min_max"
    path.write_text(json.dumps(meta))
    args = ["--checkpoint", tmp_path / "c", "--out", tmp_path / "out", "--format", "upstream"]
    assert to_torch.main([*map(str, args), "--safetensors", "--allow-custom-sizes"]) == 0
    printed = capsys.readouterr().out
    kept = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["st4vla_jax"]["notes"]
    for note, text in zip(kept, ("normalised by min_max", "lower-cases"), strict=True):
        assert text in note and f"note: {note}" in printed
    assert "note: stock upstream cannot run it: 16 queries" in printed
    assert "note: the checkpoint does not say its training step" in printed


def test_a_tower_from_scratch_is_refused_or_told_and_come_back(capsys, tmp_path):
    """Loaded by transformers such weights would compute something else without a word."""
    cfg = model_config("tiny", None, None)
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, from_scratch=True))
    write_zeros(tmp_path / "c", cfg)
    byte_level_tokenizer().save(tmp_path / "c" / "meta" / "tokenizer")
    args = ["--checkpoint", str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--format", "hf"]
    message = refused(capsys, tmp_path, *args)
    assert "no export to Hugging Face" in message
    assert "vision.from_scratch" in message and "--allow-custom-sizes" in message
    assert to_torch.main([*args, "--allow-custom-sizes"]) == 0
    assert "note: stock transformers cannot run it: its vision" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/config.json").read_text())["vision_config"]["from_scratch"]
    assert read_folder(tmp_path / "out").vision == cfg.vision


def test_a_dino_from_scratch_is_named(capsys, tmp_path):
    write_zeros(tmp_path / "c", model_config("tiny", "tabletop", "tiny"))
    args = ("--checkpoint", tmp_path / "c", "--out", tmp_path / "out", "--format", "upstream")
    message = refused(capsys, tmp_path, *args)
    assert "dino.from_scratch" in message and "upstream has S (" in message
    assert "TABLETOP" not in message


def test_a_stock_config_says_nothing_of_it(tmp_path):
    cfg = model_config("tiny", None, None)
    hf = hf_config(cfg.vision, cfg.text)
    assert "from_scratch" not in hf["vision_config"]
    assert config_from_hf(hf, "config.json")[0] == cfg.vision
    hf["vision_config"]["from_scratch"] = "yes"
    with pytest.raises(ConversionError, match="from_scratch is neither true nor false"):
        config_from_hf(hf, "config.json")


def test_checkpoint_that_does_not_fit_its_meta(capsys, tmp_path):
    write_zeros(tmp_path / "c", model_config("tiny", "tiny", "tiny"), "bridge/query_tokens")
    args = ("--checkpoint", tmp_path / "c", "--out", tmp_path / "out", "--format", "upstream")
    message = refused(capsys, tmp_path, *args, "--allow-custom-sizes")
    assert "missing: bridge/query_tokens" in message
    args = ("--checkpoint", tmp_path / "nothing", "--out", tmp_path / "out", "--format", "hf")
    assert "no complete checkpoint" in refused(capsys, tmp_path, *args)
