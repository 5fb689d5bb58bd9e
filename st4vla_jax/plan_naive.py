"""Peak memory of the train step beside the usual one, and what each difference saves.

The usual step pads robot and grounding samples to two batches, runs the model on one after the
other, and forms the logits of all tokens.  Both steps, and each with one of the differences alone,
are compiled for the slice: same optimizer, mesh, rematerialisation and samples (of typical lengths;
plan_batch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from st4vla_jax.batch import Batch, VlmInputs
from st4vla_jax.chips import GIB, Slice
from st4vla_jax.models.layers import gather_rows
from st4vla_jax.models.qwen_vl import QwenVL
from st4vla_jax.models.st4vla import ST4VLA, Denominators
from st4vla_jax.plan_batch import padded_batches
from st4vla_jax.plan_compile import OutOfMemoryError, compile_for
from st4vla_jax.plan_setup import Plan
from st4vla_jax.state import TrainState, merge
from st4vla_jax.train_setup import step_config
from st4vla_jax.train_step import make_train_step, update_key

Array = jax.Array
Step = Callable[..., tuple[TrainState, dict[str, Array]]]


class DenseLogits(ST4VLA):
    """Scores every token against the whole vocabulary, as a padded language model does."""

    def text_nll(self, params: dict, vlm: VlmInputs, hidden: Array) -> Array:
        """As `ST4VLA.text_nll`, by the logits f32[B,T,V]."""
        logits = self.vlm.apply({"params": params["vlm"]}, hidden, method=QwenVL.logits)
        scores = jax.nn.log_softmax(logits, axis=-1)
        rows = gather_rows(scores, vlm.target_index)
        return -jnp.take_along_axis(rows, vlm.targets[..., None], axis=-1)[..., 0]


def make_padded_step(plan: Plan, model: ST4VLA) -> Step:
    """(state, batches) -> (state, metrics): forward and backward of one batch after the other."""
    cfg = step_config(plan.config, ())

    def step(state: TrainState, batches: tuple[Batch, ...]):
        key = update_key(cfg.seed, state.step)

        def loss(params, batch):
            draws = model.draw(key, batch, cfg.repeats)
            denominators = Denominators.of(batch, cfg.repeats)
            whole = merge(params, state.frozen)
            return model.loss(whole, batch, draws, denominators, cfg.weights)[0]

        total, grads = jax.value_and_grad(loss)(state.params, batches[0])
        for batch in batches[1:]:
            # The next forward pass starts when these gradients are there, as in PyTorch.
            grads, batch = jax.lax.optimization_barrier((grads, batch))
            more, new = jax.value_and_grad(loss)(state.params, batch)
            total, grads = total + more, jax.tree.map(jnp.add, grads, new)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        params, opt_state = plan.optimizer.update(
            grads, norm, state.opt_state, state.params, state.step
        )
        new_state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return new_state, {"loss/total": total}

    return step


def peaks(plan: Plan, tpu: Slice, options: Mapping[str, str]) -> dict[str, float]:
    """Bytes of a chip at the peak of each step: ours, the usual one, and those between.

    What does not fit counts with what the compiler says that it needs.
    """
    dense = DenseLogits(plan.config.model, plan.config.runtime)
    padded = _on_mesh(plan, padded_batches(plan.config, plan.batch_shards))
    cfg = step_config(plan.config, ())
    steps = {
        "packed, logits in tiles": (make_train_step(plan.model, plan.optimizer, cfg), plan.batch),
        "packed, all logits": (make_train_step(dense, plan.optimizer, cfg), plan.batch),
        "two padded batches, logits in tiles": (make_padded_step(plan, plan.model), padded),
        "two padded batches, all logits": (make_padded_step(plan, dense), padded),
    }
    found = {}
    for name, (step, batch) in steps.items():
        try:
            _, compiled, _ = compile_for(tpu, plan.mesh, step, plan.state, batch, options)
            found[name] = float(compiled.memory_analysis().peak_memory_in_bytes)
        except OutOfMemoryError as error:
            found[name] = error.needed
    return found


def _on_mesh(plan: Plan, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
    sharding = NamedSharding(plan.mesh, plan.config.runtime.rules.spec(("batch",)))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batches
    )


def peak_lines(found: dict[str, float]) -> list[str]:
    """The table of `peaks`: in shares of the usual step, and what each saves of it."""
    usual = list(found.values())[-1]
    return [
        f"{name:<40}{size / GIB:8.2f} GiB {100 * size / usual:6.0f} %"
        f"{(usual - size) / GIB:10.2f} GiB saved"
        for name, size in found.items()
    ]
