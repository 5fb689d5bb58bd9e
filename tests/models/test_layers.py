"""Tables of embeddings on a mesh: rows and gradients equal those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax.models import layers
from st4vla_jax.models.layers import take_rows
from st4vla_jax.sharding import Rules, make_mesh

RULES = Rules()
VOCAB, WIDTH = 64, 6


def gradient(take):
    """(table, ids) -> gradient of rows that each count differently."""

    def loss(table, ids):
        rows = take(table, ids)
        return jnp.sum(rows * jnp.cos(jnp.arange(rows.size)).reshape(rows.shape))

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 4, 1)])
def test_gradient_of_a_table_cut_over_a_whole_slice(monkeypatch, mesh):
    """On TPUs it is summed in a ring, and only there and then."""
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    table = np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, VOCAB, (8, 5))
    want = gradient(lambda table, ids: jnp.take(table, ids, axis=0))(table, ids)
    step = gradient(lambda table, ids: take_rows(table, ids, RULES))
    built = make_mesh(*mesh)
    with jax.set_mesh(built):
        where = jax.NamedSharding(built, RULES.param_spec(("vocab", "vocab_embed")))
        placed = jax.device_put(table, where), ids
        np.testing.assert_allclose(step(*placed), want, atol=1e-5)
        program = str(jax.make_jaxpr(step)(*placed))
    assert ("ppermute" in program) == (mesh == (1, 8, 1))
    assert ("reduce_scatter" in program) == (mesh != (1, 8, 1))
