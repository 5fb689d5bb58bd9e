"""The usual step: the same loss as ours, at its cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage2_action
from configs.common import tiny
from st4vla_jax.bench_mixture import GROUNDING, ROBOT
from st4vla_jax.chips import TopologyError, parse_slice, slice_devices
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.plan_batch import padded_batches
from st4vla_jax.plan_compile import launch_flags
from st4vla_jax.plan_naive import DenseLogits, peak_lines, peaks
from st4vla_jax.plan_setup import make_plan
from st4vla_jax.train_config import MeshSettings, TrainConfig


def config(mesh=(1, 1, 1)):
    built = TrainConfig.from_dict(tiny(stage2_action.get_config()))
    return dataclasses.replace(built, mesh=MeshSettings(*mesh, {}))


def test_each_sample_has_a_row():
    robot, grounding = padded_batches(config(), 16)
    assert robot.vlm.tokens.shape == (32, max(ROBOT) + 16)  # 24 samples in multiples of 16
    assert robot.vlm.targets.shape == (32, 1) and robot.action.valid.shape == (32, 1)
    assert len(grounding.vlm.tokens) == 16 and grounding.action is None
    longest = max(n for _, records in GROUNDING.values() for *_, n in records)
    assert grounding.vlm.targets.shape[1] == longest


def test_dense_logits_give_the_same_loss():
    cfg, rng = config(), np.random.default_rng(0)
    _, grounding = padded_batches(cfg, 2)
    vlm = jax.tree.map(lambda x: jnp.zeros((2, *x.shape[1:]), x.dtype), grounding.vlm)
    targets = rng.integers(0, cfg.model.text.vocab_size, vlm.targets.shape)
    index = rng.integers(0, vlm.tokens.shape[1], vlm.targets.shape)
    vlm = vlm.replace(targets=jnp.asarray(targets), target_index=jnp.asarray(index))
    hidden = rng.normal(size=(*vlm.tokens.shape, cfg.model.text.hidden_size)).astype(np.float32)
    size = (cfg.model.text.vocab_size, cfg.model.text.hidden_size)
    table = {"embed_tokens": {"embedding": rng.normal(size=size).astype(np.float32)}}
    params = {"vlm": {"language_model": table}}
    ours, dense = (
        kind(cfg.model, cfg.runtime).text_nll(params, vlm, hidden) for kind in (ST4VLA, DenseLogits)
    )
    np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-4)


def test_shares_are_of_the_usual_step():
    lines = peak_lines({"packed, logits in tiles": 3 * 2**30, "two padded batches": 4 * 2**30})
    assert lines[0].endswith("3.00 GiB     75 %      1.00 GiB saved")
    assert lines[1].endswith("4.00 GiB    100 %      0.00 GiB saved")


@pytest.mark.slow
def test_all_logits_take_more():
    """A vocabulary of 320 and 24 + 8 samples: what packing saves is not seen at this size."""
    tpu = parse_slice("v5e:2x2")
    try:
        plan = make_plan(config((4, 1, 1)), slice_devices(tpu))
    except TopologyError as error:
        pytest.skip(str(error))
    with jax.default_matmul_precision("default"):
        found = peaks(plan, tpu, launch_flags(tpu.chip))
    tiles, dense, *padded = found.values()
    assert 0 < tiles < dense and min(padded) > 0
