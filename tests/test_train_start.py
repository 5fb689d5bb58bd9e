"""The compiled step takes one shape of batch; another one is named, not compiled for."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from st4vla_jax.train_start import CompiledStep, RecompilationError
from tests.reference.policy import tiny_batch, tiny_config


@pytest.fixture(scope="module")
def batch():
    return tiny_batch(tiny_config(), rows=1)


@pytest.fixture(scope="module")
def step(batch):
    def run(state, batch):
        return state + jnp.sum(batch.action.actions), {"tokens": jnp.sum(batch.vlm.tokens)}

    abstract = jax.eval_shape(lambda: batch)
    compiled = jax.jit(run).lower(jnp.zeros(()), abstract).compile()
    return CompiledStep(compiled, abstract, 0.0, 0.0)


def test_the_same_shape_again(step, batch):
    state, metrics = step(jnp.zeros(()), batch)
    assert float(state) == pytest.approx(float(jnp.sum(batch.action.actions)), rel=1e-6)
    assert int(metrics["tokens"]) == int(jnp.sum(batch.vlm.tokens))


def test_what_differs_is_named(step, batch):
    shape = list(batch.vlm.tokens.shape)
    vlm = dataclasses.replace(batch.vlm, tokens=batch.vlm.tokens[:, :-1])
    with pytest.raises(RecompilationError) as error:
        step(jnp.zeros(()), dataclasses.replace(batch, vlm=vlm))
    change = f"vlm.tokens: int32{shape} -> int32{[shape[0], shape[1] - 1]}"
    assert str(error.value).endswith(f"differs from the first: {change}")

    action = dataclasses.replace(batch.action, actions=batch.action.actions.astype(jnp.bfloat16))
    with pytest.raises(RecompilationError, match=r"action\.actions: float32.* -> bfloat16"):
        step(jnp.zeros(()), dataclasses.replace(batch, action=action))

    with pytest.raises(RecompilationError, match=r"action\.actions: float32.* -> absent"):
        step(jnp.zeros(()), dataclasses.replace(batch, action=None))


def test_other_mistakes_are_no_matter_of_shapes(step, batch):
    with pytest.raises(TypeError) as error:
        step({"not": "the state"}, batch)
    assert not isinstance(error.value, RecompilationError)
