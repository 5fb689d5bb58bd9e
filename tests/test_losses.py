import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.losses import group_sums, masked_squared_error, next_token_nll
from st4vla_jax.sharding import Rules, make_mesh

RULES = Rules()
B, M, D = 4, 16, 8


def dense(hidden, table, targets):
    logits = jnp.einsum("bmd,vd->bmv", hidden, table, preferred_element_type=jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def data(vocab, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(vocab), 4)
    hidden = jax.random.normal(keys[0], (B, M, D)).astype(dtype)
    table = 2 * jax.random.normal(keys[1], (vocab, D))
    targets = jax.random.randint(keys[2], (B, M), 0, vocab)
    targets = targets.at[0, :2].set(jnp.array([0, vocab - 1]))
    return hidden, table, targets, jax.random.uniform(keys[3], (B, M))


def weighted(nll, weights):
    def loss(hidden, table, targets):
        return jnp.sum(nll(hidden, table, targets) * weights)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def tiled(tile):
    return functools.partial(next_token_nll, tile=tile, rules=RULES)


# One tile; divisors; a prime (padded); a tile of one entry; no divisor near V / tile.
@pytest.mark.parametrize(
    "vocab, tile", [(320, 1000), (320, 64), (320, 50), (509, 100), (35, 1), (514, 40)]
)
def test_values_and_gradients_equal_log_softmax(vocab, tile):
    hidden, table, targets, weights = data(vocab)
    np.testing.assert_allclose(
        tiled(tile)(hidden, table, targets), dense(hidden, table, targets), atol=1e-5
    )
    got = weighted(tiled(tile), weights)(hidden, table, targets)
    want = weighted(dense, weights)(hidden, table, targets)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for a, b in zip(got[1], want[1], strict=True):
        assert a.dtype == b.dtype and float(jnp.abs(b).max()) > 1e-2
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_extreme_logits_stay_finite():
    hidden, table, targets, weights = data(320)
    args = 300 * hidden, table, targets
    np.testing.assert_allclose(tiled(64)(*args), dense(*args), rtol=1e-5, atol=1e-5)
    grads = weighted(tiled(64), weights)(*args)[1]
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)


def test_bf16_matmuls_with_a_table_in_f32():
    hidden, table, targets, weights = data(509, jnp.bfloat16)
    rounded = table.astype(jnp.bfloat16)
    got = weighted(tiled(100), weights)(hidden, table, targets)
    want = weighted(dense, weights)(
        hidden.astype(jnp.float32), rounded.astype(jnp.float32), targets
    )
    assert tiled(100)(hidden, table, targets).dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert [g.dtype for g in got[1]] == [jnp.bfloat16, jnp.float32]
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


def shapes(jaxpr):
    """Shapes of all intermediates, those of inner computations included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from shapes(inner)


@pytest.mark.parametrize("vocab, tile", [(512, 64), (509, 64), (514, 40)])
def test_the_logits_never_exist(vocab, tile):
    hidden, table, targets, weights = data(vocab)
    jaxpr = jax.make_jaxpr(weighted(tiled(tile), weights))(hidden, table, targets)
    largest = max(math.prod(s) for s in shapes(jaxpr.jaxpr))
    assert B * M * tile / 2 < largest <= 2 * B * M * tile < B * M * vocab
    both = jax.make_jaxpr(weighted(dense, weights))(hidden, table, targets)
    assert B * M * vocab in {math.prod(s) for s in shapes(both.jaxpr)}  # the walk finds it


def test_no_positions_give_no_loss():
    hidden, table, targets, _ = data(320)
    grads = weighted(tiled(64), jnp.zeros((B, 0)))(hidden[:, :0], table, targets[:, :0])[1]
    assert grads[0].shape == (B, 0, D) and not jnp.any(grads[1])


def test_a_tile_must_be_positive():
    with pytest.raises(ValueError, match="tile 0"):
        tiled(0)(*data(320)[:3])


def test_a_vocabulary_split_over_the_mesh_stays_split():
    hidden, table, targets, weights = data(512)
    step = weighted(tiled(64), weights)
    want = step(hidden, table, targets)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, jax.sharding.NamedSharding(mesh, RULES.spec(names)))
            for x, names in (
                (hidden, ("batch", None, None)),
                (table, ("vocab", "vocab_embed")),
                (targets, ("batch", None)),
            )
        ]
        compiled = step.lower(*placed).compile()
        got = compiled(*placed)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # The table's rows are gathered once, before the two loops over tiles.
    text = compiled.as_text()
    assert text.count(" all-gather(") == 1
    loops = [
        text.split(f"\n{name} (")[1].split("\n}")[0] for name in re.findall(r"body=(%[\w.]+)", text)
    ]
    assert len(loops) == 2
    for loop in loops:
        assert "all-reduce(" not in loop and "all-gather(" not in loop
        assert "f32[4,64,8]" in loop  # 256 ids on each half of `tensor`: 4 tiles of 64


def test_masked_squared_error_ignores_masked_entries():
    pred = jnp.array([[1.0, 2.0], [jnp.nan, 5.0]])
    target = jnp.array([[0.0, 4.0], [1.0, jnp.nan]])
    mask = jnp.array([[True, True], [False, False]])

    def total(pred):
        return jnp.sum(masked_squared_error(pred, target, mask))

    value, grad = jax.value_and_grad(total)(pred)
    assert value == 1 + 4
    np.testing.assert_array_equal(grad, [[2, -4], [0, 0]])
    half = masked_squared_error(pred.astype(jnp.bfloat16), target, mask)
    assert half.dtype == jnp.float32


def test_masks_broadcast():
    pred, target = jnp.ones((2, 3, 4, 5)), jnp.zeros((2, 3, 4, 5))
    mask = jnp.arange(2)[:, None, None, None] == 1
    error = masked_squared_error(pred, target, mask)
    np.testing.assert_array_equal(jnp.sum(error, axis=(1, 2, 3)), [0, 60])


def test_group_sums_equal_a_loop():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((3, 7)), rng.random((3, 7))
    groups = rng.integers(0, 4, (3, 7))
    sums, totals = group_sums(values, weights, groups, 6)
    for g in range(6):
        inside = groups == g
        assert sums[g] == pytest.approx((values * weights)[inside].sum(), abs=1e-5)
        assert totals[g] == pytest.approx(weights[inside].sum(), abs=1e-5)
