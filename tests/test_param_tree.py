"""The parameter tree is pinned: paths, shapes, dtypes, logical names.

UPDATE_GOLDEN=1 rewrites tests/golden/params_*.json.
"""

import functools
import itertools
import json
import os
from pathlib import Path

import jax
import pytest

from convert_weights.rules import (
    bridge_rules,
    check_bijection,
    dino_rules,
    dit_rules,
    prefixed,
    text_rules,
    vision_rules,
)
from st4vla_jax.config import DINO_PRESETS, DIT_PRESETS, VLM_PRESETS, model_config
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.sharding import is_axes, make_mesh, param_shardings

GOLDEN = Path(__file__).parent / "golden"
COUNTS = {  # spec upstream.md section 0, measured on the reference system
    ("3b", "s", "b"): {
        "vlm": 3_754_622_976,
        "dino": 22_056_576 - 384,  # without mask_token, which is passed through
        "bridge": 8_710_656 + 788_480,
        "dit": 86_524_423 - (7 * 768 + 768),  # without history_embedder, likewise
    },
}


@functools.cache
def boxed_tree(vlm, dino, dit):
    model = ST4VLA(model_config(vlm, dino, dit))
    return model, jax.eval_shape(model.init, jax.random.key(0))


def flatten(boxed):
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_axes)
    return {"/".join(k.key for k in path): box for path, box in leaves}


@pytest.mark.parametrize("name", ["3b", "tiny"])
def test_golden_tree(name):
    small = "tiny" if name == "tiny" else None
    _, boxed = boxed_tree(name, small or "s", small or "b")
    tree = {
        path: [list(box.value.shape), str(box.value.dtype), list(box.names)]
        for path, box in sorted(flatten(boxed).items())
    }
    path = GOLDEN / f"params_{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in tree.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert tree == json.loads(path.read_text())


@pytest.mark.parametrize("names,counts", COUNTS.items())
def test_parameter_counts(names, counts):
    _, boxed = boxed_tree(*names)
    sizes = {
        part: sum(b.value.size for b in flatten(tree).values()) for part, tree in boxed.items()
    }
    assert sizes == counts


def all_rules(cfg):
    bridge = bridge_rules(cfg.bridge, cfg.text.hidden_size, cfg.dino.hidden_size)
    return [
        *prefixed(vision_rules(cfg.vision), "model.", "vlm/"),
        *prefixed(text_rules(cfg.text), "model.", "vlm/"),
        *prefixed(dino_rules(cfg.dino), "dino_encoder.body.", "dino/"),
        *prefixed(bridge, "", "bridge/"),
        *prefixed(dit_rules(cfg.dit), "action_model.net.", "dit/"),
    ]  # fmt: skip


@pytest.mark.parametrize("vlm", VLM_PRESETS)
def test_rules_cover_every_parameter_of_every_preset(vlm):
    for dino, dit in itertools.zip_longest(DINO_PRESETS, DIT_PRESETS, fillvalue="tiny"):
        model, boxed = boxed_tree(vlm, dino, dit)
        rules = all_rules(model.cfg)
        check_bijection(rules)
        shapes = {path: box.value.shape for path, box in flatten(boxed).items()}
        assert {rule.jax: rule.jax_shape for rule in rules} == shapes


@pytest.mark.parametrize("vlm", VLM_PRESETS)
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (4, 2, 1)])
def test_every_preset_can_be_sharded(vlm, sizes):
    model, boxed = boxed_tree(vlm, "s", "b")
    shardings = param_shardings(boxed, make_mesh(*sizes), model.rt.rules)
    kernel = shardings["vlm"]["language_model"]["blocks"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.spec == jax.P(None, "fsdp", "tensor")
