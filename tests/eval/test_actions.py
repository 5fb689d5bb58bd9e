"""Held-out scores against loops in numpy, closed forms, and one device against eight."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.batch import ActionInputs
from st4vla_jax.config import FLOAT32
from st4vla_jax.eval.actions import (
    HeldOut,
    HeldOutError,
    TextSums,
    action_sums,
    mean_chunk,
    text_scores,
)
from st4vla_jax.sharding import make_mesh, param_shardings
from tests.reference.policy import random_params, tiny_batch, tiny_policy

S, B, K, C, A = 5, 2, 3, 4, 2
NAMES = ("x", "grip")


def made_up(seed=0):
    """(chunks, action inputs with masked entries and an unused slot, horizon mean)."""
    rng = np.random.default_rng(seed)
    shape = (B, K, C, A)
    mask = rng.random(shape) < 0.6
    mask[0, 1] = False  # a valid sample of which nothing counts
    valid = np.ones((B, K), bool)
    valid[1, 2] = False
    actions = rng.standard_normal(shape).astype(np.float32)
    actions[~mask] = np.nan
    action = ActionInputs(
        token_index=None, token_mask=None, dino_images=None, view_mask=None, state=None,
        actions=actions, action_mask=mask, valid=valid, embodiment=None, sample_group=None,
    )  # fmt: skip
    chunks = rng.standard_normal((S, *shape)).astype(np.float32)
    return chunks, action, rng.standard_normal((C, A)).astype(np.float32)


def energy(samples, truth):
    """The unbiased energy score by its definition: samples [S,n], truth [n]."""
    far = np.mean([np.linalg.norm(x - truth) for x in samples])
    pairs = itertools.permutations(samples, 2)
    return far - 0.5 * np.mean([np.linalg.norm(x - y) for x, y in pairs])


def brute_force(chunks, action, mean):
    """Metrics by loops over samples, steps and dimensions."""
    chunks, actions = chunks.astype(np.float64), action.actions.astype(np.float64)
    errors, wholes, gains = [], [], []
    for b, k in itertools.product(range(B), range(K)):
        counted = action.action_mask[b, k] & action.valid[b, k]
        y, x = actions[b, k], chunks[:, b, k]
        for t, a in zip(*np.nonzero(counted), strict=True):
            one = energy(x[:, t, a, None], y[t, a, None])
            own = (x[:, t, a].mean() - y[t, a]) ** 2
            errors.append((t, a, own, (mean[t, a] - y[t, a]) ** 2, y[t, a] ** 2, one))
        if counted.any():
            point = [np.linalg.norm((p - y)[counted]) for p in (mean, np.zeros_like(mean))]
            wholes.append([energy(x[:, counted], y[counted]), *point])
            gains.append(np.mean(((mean - y) ** 2 - (x.mean(axis=0) - y) ** 2)[counted]))
    table, whole = np.array(errors), np.mean(wholes, axis=0)
    half = 1.959964 * np.std(gains, ddof=1) / math.sqrt(len(gains))
    total = table[:, 2:].mean(axis=0)
    want = {
        "action_mse": total[0],
        "action_mse_mean_baseline": total[1],
        "action_mse_zero_baseline": total[2],
        "crps": total[3],
        "energy": whole[0],
        "energy_mean_baseline": whole[1],
        "energy_zero_baseline": whole[2],
        "action_gain": np.mean(gains),
        "action_gain_low": np.mean(gains) - half,
        "action_gain_high": np.mean(gains) + half,
    }
    entries = [(f"h{t}", 0, t) for t in range(C)] + [(n, 1, a) for a, n in enumerate(NAMES)]
    for name, column, index in entries:
        rows = table[table[:, column] == index]
        if len(rows):
            want |= {f"action_mse/{name}": rows[:, 2].mean(), f"crps/{name}": rows[:, 5].mean()}
    return {f"eval/{name}": value for name, value in want.items()}


def assert_metrics_equal(got, want, rtol=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=rtol), name


@pytest.mark.parametrize("empty_step", [False, True])
def test_scores_equal_loops(empty_step):
    chunks, action, mean = made_up()
    if empty_step:
        action.action_mask[:, :, C - 1] = False
    got = jax.jit(action_sums)(chunks, action, mean)
    metrics = jax.device_get(got).metrics(NAMES)
    assert_metrics_equal(metrics, brute_force(chunks, action, mean))
    assert (f"eval/action_mse/h{C - 1}" in metrics) != empty_step


def test_batches_add_up():
    parts = [made_up(seed) for seed in (1, 2)]
    mean = parts[0][2]
    sums = [action_sums(chunks, action, mean) for chunks, action, _ in parts]
    both = jax.tree.map(lambda *x: np.concatenate(x), *[action for _, action, _ in parts])
    chunks = np.concatenate([chunks for chunks, *_ in parts], axis=1)
    whole = jax.device_get(action_sums(chunks, both, mean))
    assert_metrics_equal((sums[0] + sums[1]).metrics(NAMES), whole.metrics(NAMES))


def test_energy_scores_of_normal_samples_reach_the_closed_form():
    """Standard normal samples and y = 0: E|X| - E|X - X'| / 2 = sqrt(2 / pi) - 1 / sqrt(pi)."""
    shape = (1, 1, 1, 1)
    action = made_up()[1].replace(
        actions=np.zeros(shape, np.float32), action_mask=np.ones(shape, bool),
        valid=np.ones((1, 1), bool),
    )  # fmt: skip
    chunks = np.random.default_rng(0).standard_normal((2000, *shape)).astype(np.float32)
    got = action_sums(chunks, action, np.zeros((1, 1), np.float32))
    want = math.sqrt(2 / math.pi) - 1 / math.sqrt(math.pi)
    assert float(got.energy) == pytest.approx(want, abs=0.02)
    assert float(got.crps[0, 0]) == pytest.approx(want, abs=0.02)


def test_a_policy_without_spread_scores_its_distance():
    chunks, action, mean = made_up()
    same = np.broadcast_to(mean, chunks.shape)
    got = jax.device_get(action_sums(same, action, mean)).metrics(NAMES)
    for name in ("action_mse", "energy"):
        want = got[f"eval/{name}_mean_baseline"]
        assert got[f"eval/{name}"] == pytest.approx(want, rel=1e-6)


def test_mean_chunk_is_the_mean_of_what_counts():
    batch = tiny_batch(tiny_policy().cfg, rows=2)
    action = made_up()[1]
    other = made_up(3)[1]
    got = mean_chunk([batch.replace(action=a) for a in (action, other)])
    for t, a in itertools.product(range(C), range(A)):
        values = [
            part.actions[b, k, t, a]
            for part in (action, other)
            for b, k in itertools.product(range(B), range(K))
            if part.valid[b, k] and part.action_mask[b, k, t, a]
        ]
        assert got[t, a] == pytest.approx(np.mean(values), rel=1e-5)
    with pytest.raises(HeldOutError, match="at least one"):
        mean_chunk([])
    with pytest.raises(HeldOutError, match="robot samples"):
        mean_chunk([batch.replace(action=None)])


def test_text_scores_by_group():
    rng = np.random.default_rng(0)
    nll = rng.random((3, 4), np.float32)
    weight = rng.random((3, 4), np.float32) * (rng.random((3, 4)) < 0.7)
    group = rng.integers(0, 2, (3, 4))
    vlm = tiny_batch(tiny_policy().cfg).vlm.replace(target_weight=weight, target_group=group)
    sums = jax.device_get(text_scores(nll, vlm, 3))
    metrics = (sums + TextSums(np.zeros(3), np.zeros(3))).metrics(("", "boxes", "nothing"))
    boxes = group == 1
    want = {
        "eval/text_loss": np.average(nll, weights=weight),
        "eval/text_loss/boxes": np.average(nll[boxes], weights=weight[boxes]),
    }
    assert_metrics_equal(metrics, want)


# --- The whole evaluation -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FakePolicy:
    """Samples scale x noise + the batch's own chunk; every target costs 2 nat."""

    rt = FLOAT32

    def encode(self, params, batch):
        return None, batch.action.actions

    def denoise(self, params, condition, noise):
        return params["scale"] * noise + jnp.nan_to_num(condition)

    def text_nll(self, params, vlm, hidden):
        return jnp.full(vlm.targets.shape, 2.0)


def test_held_out_adds_batches_and_fixes_the_noise():
    base = tiny_batch(tiny_policy().cfg, rows=B)
    actions = [made_up(seed)[1] for seed in (4, 5)]
    batches = [base.replace(action=a) for a in actions]
    mean = mean_chunk(batches)
    held_out = HeldOut(FakePolicy(), batches, mean, NAMES, seed=3, samples=64)
    exact = held_out({"scale": 0.0})
    assert exact["eval/action_mse"] < 1e-12 and exact["eval/energy"] < 1e-6  # rounding of a mean
    assert exact["eval/text_loss"] == 2
    counted = [a.action_mask & a.valid[..., None, None] for a in actions]
    values = np.concatenate([a.actions[c] for a, c in zip(actions, counted, strict=True)])
    assert exact["eval/action_mse_zero_baseline"] == pytest.approx(np.mean(values**2), rel=1e-5)
    noisy = held_out({"scale": 1.0})
    assert noisy["eval/action_mse"] == pytest.approx(1 / 64, rel=0.5)
    assert noisy == held_out({"scale": 1.0})
    again = HeldOut(FakePolicy(), batches, mean, NAMES, seed=4, samples=64)({"scale": 1.0})
    assert again["eval/action_mse"] != noisy["eval/action_mse"]
    swapped = HeldOut(FakePolicy(), batches[::-1], mean, NAMES, seed=3, samples=64)
    assert swapped({"scale": 1.0})["eval/action_mse"] != noisy["eval/action_mse"]


def test_eight_devices_equal_one():
    model = tiny_policy()
    cfg = model.cfg.dit
    names = [f"a{i}" for i in range(cfg.action_dim)]
    batches = [jax.tree.map(np.asarray, tiny_batch(model.cfg, rows=8))]
    params = random_params(model)
    mean = mean_chunk(batches)
    options = {"seed": 1, "samples": 3}
    one = HeldOut(model, batches, mean, names, **options)(params)
    mesh, rules = make_mesh(2, 2, 2), model.rt.rules
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.device_put(params, param_shardings(boxed, mesh, rules))
    rows = jax.NamedSharding(mesh, rules.spec(("batch",)))
    with jax.set_mesh(mesh):
        held_out = HeldOut(model, batches, mean, names, **options)
        many = held_out(params, lambda batch: jax.device_put(batch, rows))
    assert "eval/text_loss" in one and np.isfinite(list(one.values())).all()
    assert_metrics_equal(many, one, rtol=1e-4)


def test_everything_wrong_is_said_at_once():
    base = tiny_batch(tiny_policy().cfg, rows=B)
    base = base.replace(action=made_up()[1], vlm=base.vlm.replace(target_group=base.vlm.targets))
    other = jax.tree.map(lambda x: x[:1], base)
    with pytest.raises(HeldOutError) as e:
        HeldOut(FakePolicy(), [base, other], np.zeros((C, 1)), ("x",), seed=0, samples=1)
    for words in ("at least 2", "batch 1 has other", "group names", "horizon_mean", "dim_names"):
        assert words in str(e.value)
    with pytest.raises(HeldOutError, match="no batches"):
        HeldOut(FakePolicy(), [], None, (), seed=0)
