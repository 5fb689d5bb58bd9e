"""A tiny training step: optimizer tables, states and compiled steps for tests."""

import dataclasses

import jax
import numpy as np

from st4vla_jax.optim import Group, OptimConfig, Optimizer
from st4vla_jax.sharding import Rules, make_mesh, param_shardings
from st4vla_jax.state import split
from st4vla_jax.train_step import init_train_state, make_train_step
from tests.reference.policy import random_params

GROUPS = {
    "vlm": Group("vlm/", lr=1e-3, weight_decay=0.01),
    "rest": Group("(dino|bridge|dit)/", lr=3e-3, weight_decay=0.02),
}
OPTIM = OptimConfig(GROUPS, warmup=0)
STEPS = 20


class Sgd(Optimizer):
    """Plain gradient descent in the optimizer's place: parameters keep the gradients' precision."""

    def init(self, params):
        return {}

    def update(self, grads, norm, opt_state, params, step):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), opt_state


def make_state(model, optimizer, seed=0):
    trainable, frozen = split(random_params(model, seed), optimizer.is_trainable)
    return init_train_state(trainable, optimizer, frozen)


def run_steps(model, optimizer, batches, *, mesh=(1, 1, 1), cfg, again=0):
    """Numpy states and metrics after each update on a mesh of fake devices.

    ``again``: so often the first update is repeated, which must give the same numbers.
    """
    count = int(np.prod(mesh))
    mesh = make_mesh(*mesh, devices=jax.devices()[:count])
    rules = Rules()
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    shardings = param_shardings(boxed, mesh, rules)
    params = split(shardings, optimizer.is_trainable)[0]
    state = make_state(model, optimizer)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    own = dataclasses.replace(
        jax.tree.map(lambda _: whole, state), params=params,
        frozen=split(shardings, optimizer.is_trainable)[1],
    )  # fmt: skip
    if hasattr(state.opt_state, "mu"):
        own = dataclasses.replace(own, opt_state=own.opt_state._replace(mu=params, nu=params))
    rows = jax.sharding.NamedSharding(mesh, rules.spec(("batch",)))
    outputs = []
    with jax.set_mesh(mesh):
        state = jax.device_put(state, own)
        step = jax.jit(make_train_step(model, optimizer, cfg), out_shardings=(own, None))
        for _ in range(again and again + 1):
            metrics = jax.device_get(step(state, jax.device_put(batches[0], rows))[1])
            outputs.append(metrics)
        for metrics in outputs[1:]:
            jax.tree.map(np.testing.assert_array_equal, metrics, outputs[0])
        outputs.clear()
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, rows))
            outputs.append((jax.device_get(state), jax.device_get(metrics)))
    return outputs
