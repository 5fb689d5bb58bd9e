"""The table of sizes against closed forms, and what is said about meshes and batches."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import stage2_action, tabletop
from configs.common import tiny
from st4vla_jax.bench_mixture import GROUNDING, ROBOT
from st4vla_jax.config import ConfigError
from st4vla_jax.plan_batch import planned_batch
from st4vla_jax.plan_setup import make_plan, parse_mesh
from st4vla_jax.plan_table import (
    _device_bytes,
    _gathered_weights,
    _residuals,
    batch_notes,
    kept_activations,
    memory_table,
)
from st4vla_jax.train_config import MeshSettings, TrainConfig


def config(mesh=(1, 1, 1), **changes):
    tree = tiny(stage2_action.get_config())
    tree.update_from_flattened_dict(changes)
    built = TrainConfig.from_dict(tree)
    return dataclasses.replace(built, mesh=MeshSettings(*mesh, {}))


@pytest.fixture(scope="module")
def plan():
    return make_plan(config(**{"optim.ema": 0.999}), 1)


@pytest.fixture(scope="module")
def table(plan):
    return memory_table(plan)


@pytest.fixture(scope="module")
def kept_in_full(plan):
    return _residuals(plan, "full")


def num_params(plan):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(plan.state.all_params))


def test_state_is_four_bytes_a_number(plan, table):
    rows, count = table.rows, num_params(plan)
    for name in ("parameters", "moving average", "gradients"):
        assert rows[name] == 4 * count
    assert rows["moments"] == 8 * count + 4  # and Adam's count
    assert table.checkpoint == 16 * count + 4
    assert table.total == sum(rows.values())


def test_state_of_a_sharded_device(three_billion):
    """Only what fsdp slices becomes smaller: the VLM but for its vectors."""
    sizes = {
        path: (math.prod(x.shape), math.prod(x.sharding.shard_shape(x.shape)))
        for path, x in jax.tree_util.tree_leaves_with_path(three_billion.state.all_params)
    }
    cut = [a for a, b in sizes.values() if a == 16 * b]
    same = [a for a, b in sizes.values() if a == b]
    assert len(cut) + len(same) == len(sizes)
    found = _device_bytes(jax.tree.leaves(three_billion.state.all_params))
    assert found == 4 * (sum(cut) / 16 + sum(same))
    vlm = sum(n for path, (n, _) in sizes.items() if path[0].key == "vlm")
    assert 0.99 * vlm < sum(cut) < vlm


def test_full_rematerialisation_keeps_the_input_of_each_block(plan, kept_in_full):
    kept = kept_in_full
    cfg, batch = plan.config.model, plan.planned.batch
    rows, tokens = batch.vlm.tokens.shape
    text = cfg.text.num_hidden_layers * rows * tokens * cfg.text.hidden_size * 4
    assert kept["text"].count(text) == 1
    slots = batch.vlm.patches.shape[1]
    vision = cfg.vision.depth * rows * slots * cfg.vision.hidden_size * 4
    in_blocks = [n for n in kept["vision"] if n % (rows * slots * cfg.vision.hidden_size * 4) == 0]
    assert sum(in_blocks) >= vision


def test_policies_keep_ever_more(plan, table, kept_in_full):
    dots = kept_activations(plan, "dots")["text"]
    assert sum(kept_in_full["text"]) < dots < table.rows["activations, text"]  # of "none"


def test_activations_are_those_of_one_microbatch():
    half = make_plan(config(accumulation=2), 1)
    assert half.planned.schedule.sequences % 2 == 0
    whole = dataclasses.replace(half, config=dataclasses.replace(half.config, accumulation=1))
    sizes = [kept_activations(p)["text"] for p in (whole, half)]
    assert sizes[1] / sizes[0] == pytest.approx(1 / 2, rel=0.01)


def test_batch_has_the_samples_asked_for():
    planned = planned_batch(config(), 4)
    batch, schedule = planned.batch, planned.schedule
    assert np.count_nonzero(batch.action.valid) == 24
    segments = [np.unique(row[row > 0]).size for row in batch.vlm.segment_ids]
    assert sum(segments) == 24 + 8
    assert schedule.sequences % 4 == 0 and len(batch.vlm.tokens) == schedule.sequences
    # Robot samples: a text of ROBOT and 16 cells, as tiny images have 112 pixels a side.
    lengths = np.sum(batch.action.token_mask, -1)[batch.action.valid]
    assert set(lengths) <= {text + 16 for text in ROBOT}
    targets = {n for _, records in GROUNDING.values() for *_, n in records}
    per_sample = np.count_nonzero(batch.vlm.target_weight)
    assert 8 * min(targets) <= per_sample <= 8 * max(targets)


def test_full_size_lengths_are_the_measured_ones():
    tree = TrainConfig.from_dict(stage2_action.get_config())
    schedule = dataclasses.replace(tree.data.schedule, robot_samples=16, grounding_samples=4)
    small = dataclasses.replace(tree, data=dataclasses.replace(tree.data, schedule=schedule))
    planned = planned_batch(small, 1)
    robot, *grounding = planned.schedule.members
    assert set(robot.lengths[0].tokens) == {text + 64 for text in ROBOT}
    for member, (_, records) in zip(grounding, GROUNDING.values(), strict=True):
        want = [h * w // 28**2 + text for h, w, text, _ in records]
        assert member.lengths[0].tokens.tolist() == want


def test_views_are_planned_for():
    tree = tiny(tabletop.get_config())
    views = TrainConfig.from_dict(tree).data.schedule.views
    planned = planned_batch(TrainConfig.from_dict(tree), 1)
    assert planned.batch.action.dino_images.shape[2] == views


def test_too_few_sequences_are_said(plan):
    assert "24 robot + 8 grounding samples (paper: 256 + 64)" in batch_notes(plan)[0]
    assert len(batch_notes(plan)) == 1
    notes = batch_notes(make_plan(config((16, 1, 1)), 16))
    assert "fewer than the 16 that data x fsdp x accumulation needs" in notes[1]
    assert "tensor" in notes[1]


@pytest.mark.parametrize(
    "mesh,devices,message",
    [
        ((4, 16, 1), 32, "data=4 x fsdp=16 x tensor=1 does not tile 32 devices"),
        ((1, 2, 1), 2, r"vision_embed 64 / 2 = 32 lanes; under 64 .* at most fsdp=1.*rules"),
        ((1, 1, 3), 3, "axis 'heads' of size 4 is not divisible by 3"),
    ],
)
def test_meshes_that_do_not_go(mesh, devices, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(mesh), devices)


def test_all_problems_come_at_once():
    broken = config((1, 2, 1))
    groups = {k: v for k, v in broken.optim.groups.items() if k != "dit"}
    broken = dataclasses.replace(broken, optim=dataclasses.replace(broken.optim, groups=groups))
    with pytest.raises(ConfigError) as error:
        make_plan(broken, 4)
    assert "no pattern matches parameter dit/" in str(error.value)
    assert "does not tile 4 devices" in str(error.value)


@pytest.fixture(scope="module")
def three_billion():
    return make_plan(config((1, 16, 1), **{"model.vlm": "3b"}), 16)


def test_narrow_slices_are_listed(three_billion):
    assert three_billion.narrow == ("vision_embed 1280 / 16 = 80",)


def test_weights_that_are_kept(three_billion):
    """Those of the decoder's blocks, in bf16 or as the run computes."""
    runtime = dataclasses.replace(three_billion.config.runtime, remat="full_keep_weights")
    kept = dataclasses.replace(
        three_billion, config=dataclasses.replace(three_billion.config, runtime=runtime)
    )
    blocks = three_billion.state.all_params["vlm"]["language_model"]["blocks"]
    found = _gathered_weights(kept)["decoder's weights, kept"]
    assert found == sum(x.size for x in jax.tree.leaves(blocks)) * runtime.dtypes.compute.itemsize
    assert not _gathered_weights(three_billion)["decoder's weights, kept"]


def test_mesh_argument():
    assert parse_mesh("4,-1,2", {}) == MeshSettings(4, -1, 2, {})
    for text in ("4,16", "a,b,c", "4x16x1"):
        with pytest.raises(ConfigError, match="give DATA,FSDP,TENSOR"):
            parse_mesh(text, {})
    with pytest.raises(ConfigError, match="positive"):
        parse_mesh("0,1,1", {})
