"""The step benchmark: real lengths, equal work on both sides, jobs and rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from st4vla_jax import (
    bench_jobs,
    bench_mixture,
    bench_rows,
    bench_torch_policy,
    bench_torch_step,
    flops,
)
from st4vla_jax.bench_mixture import Mixture
from st4vla_jax.models.st4vla import ST4VLA, Denominators
from st4vla_jax.sharding import unbox
from tests.reference.mixture import measured
from tests.reference.policy import random_params, tiny_config, tiny_policy
from tests.reference.torch_update import torch_policy

SCALE = 0.3
REPEATS = 2


def test_lengths_are_those_of_the_real_mixture(shared, tmp_path):
    robot, grounding = measured(shared, tmp_path)
    assert robot == bench_mixture.ROBOT
    assert grounding == {k: list(rows) for k, (_, rows) in bench_mixture.GROUNDING.items()}


@pytest.fixture(scope="module")
def samples():
    return Mixture(tiny_config(), scale=SCALE).draw(3, 2)


@pytest.fixture(scope="module")
def both(samples):
    torch.set_num_threads(1)
    model = tiny_policy()
    params = random_params(model)
    policy = torch_policy(model.cfg, params)
    kinds = ([s for s in samples if s[1] is not None], [s for s in samples if s[1] is None])
    inputs = [bench_torch_step.padded_inputs(model.cfg, own, policy.vlm) for own in kinds]
    return model, params, policy, inputs


def test_baseline_has_as_many_parameters(both):
    _, params, policy, _ = both
    ours = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(p.numel() for p in policy.parameters()) == ours


def test_baseline_computes_the_same_losses(both, samples):
    model, params, policy, (robot, grounding) = both
    batch = jax.tree.map(jnp.asarray, bench_mixture.padded_batch(model.cfg, samples))
    draws = model.draw(jax.random.key(1), batch, REPEATS, train=False)

    @jax.jit
    def run(params, batch, draws):
        _, parts = model.loss(params, batch, draws, Denominators.of(batch, REPEATS))
        return parts, model.encode(params, batch)[1]

    parts, condition = run(params, batch, draws)
    count = len(robot["input_ids"])
    flat = jax.tree.map(
        lambda x: torch.from_numpy(np.array(x[:count]).reshape(-1, *x.shape[3:])), draws.diffusion
    )
    flat = {
        "noise": flat.noise, "timesteps": flat.timesteps.long(), "drop": flat.drop
    }  # fmt: skip
    with torch.no_grad():
        action, text = policy.action_loss(robot, flat), policy.text_loss(grounding)
        vlm = {k: v for k, v in robot.items() if k not in ("pixels", "actions")}
        theirs = policy.condition(vlm, robot["pixels"])
    np.testing.assert_allclose(condition[:count, 0], theirs, rtol=1e-4, atol=1e-4)
    assert float(parts.action) == pytest.approx(float(action), rel=1e-6)
    assert float(parts.text) == pytest.approx(float(text), rel=1e-5)


def test_packed_and_all_logits_give_the_same_text_loss(both, samples):
    model, params, policy, (_, grounding) = both
    with torch.no_grad():
        text = float(policy.text_loss(grounding))
    packed = bench_mixture.packed_batch(model.cfg, samples, 128)
    everywhere = bench_mixture.with_all_logits(packed)
    assert everywhere.vlm.targets.shape == packed.vlm.tokens.shape

    @jax.jit
    def loss(params, batch):
        only_text = batch.replace(action=None)
        denominators = Denominators.of(batch, REPEATS)
        return model.loss(params, only_text, None, denominators)[1].text

    for batch in (packed, everywhere):
        ours = float(loss(params, jax.tree.map(jnp.asarray, batch)))
        assert ours == pytest.approx(text, rel=1e-4)


def test_baseline_does_the_work_that_is_counted():
    """Forward FLOPs of products with parameters: torch's count of the baseline, and flops.py's.

    On top come, known exactly, the second frame of the patch kernel and the one row of logits that
    transformers makes at least.  (On CPUs torch counts no attention.)
    """
    torch.set_num_threads(1)
    cfg = tiny_config()
    drawn = Mixture(cfg, scale=SCALE).draw(8, 0)
    length = len(drawn[0][0].tokens)
    samples = [s for s in drawn if len(s[0].tokens) == length]  # nothing is padded
    policy = bench_torch_policy.Policy(cfg, idle_logits=False).eval()
    robot = bench_torch_step.padded_inputs(cfg, samples, policy.vlm)
    count, shape = len(samples), (cfg.dit.chunk, cfg.dit.action_dim)
    draws = {
        "noise": torch.zeros(count * REPEATS, *shape),
        "timesteps": torch.zeros(count * REPEATS, dtype=torch.long),
        "drop": torch.zeros(count * REPEATS, dtype=torch.bool),
    }
    with FlopCounterMode(display=False) as counter:
        policy.action_loss(robot, draws)
    text, patches = cfg.text, len(robot["pixel_values"])
    extra = patches * 2 * 588 * cfg.vision.hidden_size
    extra += count * 2 * text.hidden_size * text.vocab_size
    packed = bench_mixture.packed_batch(cfg, samples)
    work = [flops.vision_work(cfg, packed.vlm), flops.text_work(cfg, packed.vlm)["text"]]
    work += flops.action_work(cfg, packed.action, REPEATS).values()
    wanted = sum(part.kernels for part in work)
    assert counter.get_total_flops() - extra == pytest.approx(wanted, rel=0.02)


# --- Jobs and rows ------------------------------------------------------------------------------


def test_jobs_are_read_and_every_mistake_is_named():
    job = bench_jobs.Job.parse("jax:robot=4,grounding=2,remat=dots,xla=a=1+b=2")
    assert (job.side, job.options.robot, job.options.remat) == ("jax", 4, "dots")
    assert job.options.xla == "a=1+b=2"
    assert bench_jobs.Job.parse("torch:robot=1,grounding=1,checkpoint=1").options.checkpoint is True
    with pytest.raises(bench_jobs.JobError) as error:
        bench_jobs.parse_jobs(["tf:robot=1", "jax:robots=4,grounding=x"])
    for part in (
        "'tf' is neither",
        "did you mean 'robot'?",
        "grounding is 'x'",
        "robot is missing",
    ):
        assert part in str(error.value)


def test_presets_are_readable_and_agree_on_the_samples():
    for preset in bench_jobs.presets().values():
        jobs = bench_jobs.parse_jobs(preset.jobs)
        assert {job.side for job in jobs} == {"torch", "jax"}
        assert {job.options.robot / job.options.grounding for job in jobs} <= {2.0, 4.0}


def test_mid_size_model_is_about_100_million():
    shapes = jax.eval_shape(
        ST4VLA(bench_jobs.presets()["cpu-100m"].cfg).init, jax.random.key(0)
    )  # fmt: skip
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unbox(shapes)))
    assert 90e6 < total < 120e6


def test_rows_carry_rates_and_the_best_of_each_side_is_compared():
    facts = {"job": "j", "side": "jax", "samples": 10, "tokens": 1000, "model_flops": 4e12}
    facts |= {"padding": {"tokens": 0.25}, "turn": 1}
    row = bench_rows.finished(facts, [3.0, 2.0, 2.0], 1.5, 1e13)
    assert (row["seconds"], row["samples_per_s"], row["tokens_per_s"]) == (2.0, 5.0, 500.0)
    assert (row["tflops"], row["mfu"]) == (2.0, pytest.approx(0.2))
    slow = row | {"side": "torch", "job": "t", "samples_per_s": 4.0}
    slower, failed = slow | {"job": "u", "samples_per_s": 2.0}, {
        "job": "f", "side": "torch", "turn": 1, "error": "out of memory",
    }  # fmt: skip
    found = bench_rows.summary([failed, slower, row, slow])
    assert found == {"turn 1": {"jax": "j", "torch": "t", "ratio": 1.25}}
    text = bench_rows.table([failed, row])
    assert "| f | out of memory |" in text and "| j | 5.00 | 500 | 25.0% | 20.0% |" in text
