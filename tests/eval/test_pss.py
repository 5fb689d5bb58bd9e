"""Projection-space similarity: closed cases, orientation, and the full model's gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.eval.pss import (
    Probe,
    ProbeError,
    QueryGradients,
    RankRule,
    alignment,
    column_space,
    energy_rank,
    projection_similarity,
    torch_layout,
)
from st4vla_jax.models.st4vla import Denominators
from st4vla_jax.sharding import make_mesh, param_shardings
from tests.reference.policy import random_params, tiny_batch, tiny_policy

WIDTH, HEADS, DIM = 24, 4, 10
OUT = HEADS * DIM


def gradient(outputs, inputs):
    """A kernel gradient sum_i inputs_i outputs_i^T in our layout [D,N,H]."""
    return (inputs.T @ outputs).reshape(WIDTH, HEADS, DIM).astype(np.float32)


def orthonormal(seed, rows, size):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, rows)))[0].T


def test_identical_and_sign_flipped_gradients_have_pss_one():
    g = gradient(orthonormal(0, 6, OUT), orthonormal(1, 6, WIDTH))
    for sign in (1, -1):
        got = alignment(QueryGradients(g, sign * 3 * g))
        assert got["align/pss"] == pytest.approx(1)
        assert got["align/pss_top"] == pytest.approx(1)
        assert got["align/cosine"] == pytest.approx(sign)
        assert got["align/rank_text"] == got["align/rank_action"] == 6
        assert got["align/grad_text"] == pytest.approx(3 * got["align/grad_action"], rel=1e-6)


def test_column_space_is_that_of_the_outputs():
    """Torch's (out, in): output directions decide, whatever the inputs are."""
    outputs, inputs = orthonormal(0, 8, OUT), orthonormal(1, 8, WIDTH)
    base = gradient(outputs[:4], inputs[:4])
    other_outputs = alignment(QueryGradients(base, gradient(outputs[4:], inputs[:4])))
    assert other_outputs["align/pss"] == pytest.approx(0, abs=1e-6)
    assert other_outputs["align/pss_random"] == 4 / OUT
    other_inputs = alignment(QueryGradients(base, gradient(outputs[:4], inputs[4:])))
    assert other_inputs["align/pss"] == pytest.approx(1, abs=1e-6)
    assert other_inputs["align/cosine"] == pytest.approx(0, abs=1e-6)


def test_torch_layout_gives_the_matrix_that_torch_multiplies_by():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    kernel, x = rng.standard_normal((WIDTH, HEADS, DIM)), rng.standard_normal((3, WIDTH))
    want = np.einsum("td,dnh->tnh", x, kernel).reshape(3, -1)
    got = torch.nn.functional.linear(torch.tensor(x), torch.tensor(torch_layout(kernel)))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


def test_known_principal_angles():
    """Two planes that share a direction and are 60 degrees apart otherwise: (1 + 1/4) / 2."""
    e = np.eye(5)
    first, second = e[:, :2], np.stack([e[0], 0.5 * e[1] + np.sqrt(0.75) * e[2]], axis=1)
    assert projection_similarity(first, second) == pytest.approx(0.625)
    assert projection_similarity(first[:, :1], second) == pytest.approx(1)  # contained
    by_projectors = np.trace(first @ first.T @ second @ second.T) / 2
    assert projection_similarity(first, second) == pytest.approx(by_projectors)


@pytest.mark.parametrize("ranks", [(3, 3), (3, 12), (20, 12)])
def test_random_gradients_have_the_larger_rank_over_the_size(ranks):
    values = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        outputs = [rng.standard_normal((rank, OUT)) for rank in ranks]
        grads = [gradient(o, rng.standard_normal((len(o), WIDTH))) for o in outputs]
        bases = [column_space(torch_layout(g))[0] for g in grads]
        cut = [basis[:, :rank] for basis, rank in zip(bases, ranks, strict=True)]
        values.append(projection_similarity(*cut))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - max(ranks) / OUT) < 4 * error
    assert error < 0.02


def test_column_space_equals_an_svd():
    g = torch_layout(np.random.default_rng(0).standard_normal((WIDTH, HEADS, DIM)))
    want, values, _ = np.linalg.svd(g, full_matrices=False)
    basis, got = column_space(g)
    np.testing.assert_allclose(got[:WIDTH], values, rtol=1e-10)
    np.testing.assert_allclose(got[WIDTH:], 0, atol=1e-6)
    for rank in (1, 5, WIDTH):
        projectors = [u[:, :rank] @ u[:, :rank].T for u in (basis, want)]
        np.testing.assert_allclose(*projectors, atol=1e-10)


def test_rank_rules():
    assert energy_rank(np.array([3.0, 1.0, 0.5]), 0.87) == 1  # 9 of 10.25 is 0.878
    assert energy_rank(np.array([3.0, 1.0, 0.5]), 0.88) == 2
    assert energy_rank(np.array([3.0, 1.0, 0.5]), 0.99) == 3
    assert energy_rank(np.array([2.0, 0.0, 0.0]), 0.99) == 1
    assert energy_rank(np.ones(50), 0.999999) == 50
    rng = np.random.default_rng(0)
    full = [rng.standard_normal((WIDTH, HEADS, DIM)) for _ in range(2)]
    got = alignment(QueryGradients(*full), RankRule(energy=0.9, top=5))
    assert 5 < got["align/rank_text"] < WIDTH
    assert got["align/pss"] > got["align/pss_top"]
    for bad in ({"energy": 1.0}, {"top": 0}):
        with pytest.raises(ValueError, match="energy must be"):
            RankRule(**bad)


def test_degenerate_gradients_are_nan():
    g = gradient(orthonormal(0, 2, OUT), orthonormal(1, 2, WIDTH))
    for bad in (np.zeros_like(g), np.full_like(g, np.nan)):
        got = alignment(QueryGradients(g, bad))
        assert np.isnan(got["align/pss"]) and np.isnan(got["align/cosine"])
        assert got["align/grad_action"] > 0


# --- The probe ----------------------------------------------------------------------------------


REPEATS = 2


def probe_setup(**bridge):
    """(model, parameters, two host batches, what the probe gives)."""
    model = tiny_policy(gradient_scale=0.25, **bridge)
    rows = jax.tree.map(np.asarray, tiny_batch(model.cfg, rows=8))
    batches = [jax.tree.map(lambda x, i=i: x[i : i + 4], rows) for i in (0, 4)]
    params = random_params(model)
    return model, params, batches, Probe(model, batches, seed=5, repeats=REPEATS)(params)


@pytest.fixture(scope="module")
def default_setup():
    return probe_setup()


def full_gradients(model, params, batches):
    """Both losses' gradients of the last q_proj kernel through the whole model, over batches."""
    counts = [Denominators.of(batch, REPEATS) for batch in batches]
    counts = jax.tree.map(lambda *x: sum(x), *counts)
    blocks = params["vlm"]["language_model"]["blocks"]
    attn = blocks["self_attn"]

    def losses(kernel, batch, draws):
        own = attn | {"q_proj": attn["q_proj"] | {"kernel": kernel}}
        lm = params["vlm"]["language_model"] | {"blocks": blocks | {"self_attn": own}}
        changed = params | {"vlm": params["vlm"] | {"language_model": lm}}
        parts = model.loss(changed, batch, draws, counts)[1]
        return jnp.stack([parts.action, parts.text])

    jacobian = jax.jit(jax.jacrev(losses))
    draw = jax.jit(model.draw, static_argnums=(2, 3))
    keys = [jax.random.fold_in(jax.random.key(5), number) for number in range(len(batches))]
    draws = [draw(key, b, REPEATS, False) for key, b in zip(keys, batches, strict=True)]
    kernel = attn["q_proj"]["kernel"]
    return sum(jacobian(kernel, b, d)[:, -1] for b, d in zip(batches, draws, strict=True))


def assert_equal_to_full_gradients(model, params, batches, got):
    action, text = full_gradients(model, params, batches)
    np.testing.assert_allclose(got.text, text, rtol=0, atol=1e-5 * np.abs(text).max())
    decayed = 0.25 * got.action  # the probe leaves the decay out
    np.testing.assert_allclose(decayed, action, rtol=0, atol=1e-5 * np.abs(action).max())
    assert min(np.abs(action).max(), np.abs(text).max()) > 1e-6


def test_probe_equals_the_full_gradient(default_setup):
    assert_equal_to_full_gradients(*default_setup)


@pytest.mark.slow  # compiles for half a minute
def test_probe_equals_the_full_gradient_of_a_bridge_over_several_layers():
    assert_equal_to_full_gradients(*probe_setup(start_layer=1, end_layer=5))


def test_eight_devices_equal_one(default_setup):
    model, params, batches, one = default_setup
    mesh, rules = make_mesh(2, 2, 2), model.rt.rules
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.device_put(params, param_shardings(boxed, mesh, rules))
    rows = jax.NamedSharding(mesh, rules.spec(("batch",)))
    with jax.set_mesh(mesh):
        probe = Probe(model, batches, seed=5, repeats=REPEATS)
        many = probe(params, lambda batch: jax.device_put(batch, rows))
    want, got = alignment(one), alignment(many)
    assert 0 < want["align/pss"] < 1
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_everything_wrong_is_said_at_once():
    model = tiny_policy(start_layer=1, end_layer=3)
    batch = tiny_batch(model.cfg)
    text = dataclasses.replace(batch, action=None)
    with pytest.raises(ProbeError) as e:
        Probe(model, [batch, text], seed=0)
    for words in ("end_layer is 3", "batch 1 has other shapes", "batch 1 has no robot samples"):
        assert words in str(e.value)
    with pytest.raises(ProbeError, match="no batches"):
        Probe(tiny_policy(), [], seed=0)
