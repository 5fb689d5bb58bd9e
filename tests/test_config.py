"""Presets have the published sizes; inconsistent configs raise with every problem."""

import dataclasses
import itertools
import json

import pytest

from st4vla_jax import config as c


@pytest.mark.parametrize(
    "vlm,dino,dit", itertools.product(c.VLM_PRESETS, c.DINO_PRESETS, c.DIT_PRESETS)
)
def test_any_combination_is_consistent_and_survives_json(vlm, dino, dit):
    cfg = c.model_config(vlm, dino, dit)
    assert c.from_dict(json.loads(json.dumps(c.to_dict(cfg)))) == cfg
    last = cfg.text.num_hidden_layers
    assert (cfg.bridge.start_layer, cfg.bridge.end_layer) == (last, last + 1)


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(c.ConfigError, match="vlm preset '3B'"):
        c.model_config("3B")
    with pytest.raises(c.ConfigError, match="did you mean 'tiny'"):
        c.model_config("tny")


def test_every_inconsistency_is_listed():
    cfg = c.model_config("tiny", "tiny", "tiny")
    bad = dataclasses.replace(
        cfg,
        text=dataclasses.replace(cfg.text, mrope_section=(1, 1, 1), num_key_value_heads=3),
        vision=dataclasses.replace(cfg.vision, fullatt_block_indexes=(9,), out_hidden_size=7),
        bridge=dataclasses.replace(cfg.bridge, end_layer=99, hidden_size=80, num_queries=3),
    )
    with pytest.raises(c.ConfigError) as e:
        bad.check()
    text = str(e.value)
    for part in (
        "mrope_section (1, 1, 1)",
        "not a multiple of 3 key/value heads",
        "reach past depth 4",
        "out_hidden_size 7 is not text.hidden_size 128",
        "end_layer 99 is past the last hidden state",
        "bridge.hidden_size 80 is not dit.hidden_size 64",
        "bridge.num_queries 3 is not dit.num_condition_tokens 16",
    ):
        assert part in text


def test_from_dict_names_unknown_and_missing_keys():
    tree = c.to_dict(c.model_config("tiny", "tiny", "tiny"))
    tree["text"] = {k: v for k, v in tree["text"].items() if k != "head_dim"} | {"heads": 4}
    tree["extra"] = {}
    with pytest.raises(c.ConfigError) as e:
        c.from_dict(tree)
    for part in ("missing key text.head_dim", "unknown key text.heads", "unknown section 'extra'"):
        assert part in str(e.value)


def test_vlm_alone():
    cfg = c.model_config("tiny", None, None)
    assert not cfg.has_action
    assert c.from_dict(c.to_dict(cfg)) == cfg
    with pytest.raises(c.ConfigError, match="together"):
        c.model_config("tiny", "tiny", None)


def test_flags_that_older_checkpoints_do_not_know_may_be_missing():
    cfg = c.model_config("tiny", "tiny", "tiny")
    tree = c.to_dict(cfg)
    del tree["vision"]["from_scratch"], tree["dino"]["from_scratch"]
    assert c.from_dict(tree) == cfg
