"""One update, as a pure function of (state, batch): the same for both stages and every ablation.

What a batch holds decides what is compiled: without robot samples there is no DINOv2, Q-Former or
DiT, without targets there are no logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from st4vla_jax.batch import Batch
from st4vla_jax.losses import group_sums
from st4vla_jax.models.st4vla import ST4VLA, Denominators, LossWeights, UpdateDraws
from st4vla_jax.optim import Optimizer
from st4vla_jax.sharding import Rules, constrain
from st4vla_jax.state import Params, TrainState, leaves_by_path, map_with_path, merge

Metrics = dict[str, jax.Array]
# Path of a module -> its norm's name; "grad/bridge" is the gradient that crosses into the VLM.
NORM_MODULES = {
    "vlm/visual": "vlm/visual", "vlm/language_model": "vlm/language_model", "dino": "dino",
    "bridge": "qformer", "dit": "dit",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What one update computes.

    Attributes:
      repeats: noise draws for each robot sample (R; paper 4).
      weights: factors of the two losses.
      accumulation: microbatches of an update; the sequences must divide by it.
      seed: of noise, timesteps and dropout.
      groups: data sets and answer kinds that losses are reported for, by their numbers.
    """

    repeats: int = 4
    weights: LossWeights = LossWeights()
    accumulation: int = 1
    seed: int = 0
    groups: tuple[str, ...] = ()


@struct.dataclass
class _Probes:
    """Zero scalars whose gradients are sums of squares of the gradients at the VLM's output."""

    bridge: jax.Array
    text: jax.Array


@struct.dataclass
class _Parts:
    """Sums of an update that add up over its microbatches.

    Attributes:
      action, text: f32[] the losses.
      group_action, group_text: f32[2,G] weighted sums and weights by group.
    """

    action: jax.Array
    text: jax.Array
    group_action: jax.Array
    group_text: jax.Array


def make_train_step(
    model: ST4VLA, optimizer: Optimizer, cfg: StepConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The update to compile (donate the state); metrics are named as README.md says."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = model.draw(update_key(cfg.seed, state.step), batch, cfg.repeats)
        denominators = Denominators.of(batch, cfg.repeats)

        def loss(params: Params, probes: _Probes, part: Batch, draws: UpdateDraws | None):
            total, losses = model.loss(
                merge(params, state.frozen), part, draws, denominators, cfg.weights,
                probes.bridge, probes.text,
            )  # fmt: skip
            return total, _parts(part, losses, len(cfg.groups))

        grad_fn = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (grads, probes), parts = _accumulated(
            grad_fn, state.params, batch, draws, cfg.accumulation, model.rt.rules
        )
        # XLA's CPU backend (jax 0.10.2) races where it fuses a sum with the broadcast that made
        # its operand, as the patch kernel's gradient is made: the barrier keeps them apart.
        grads = jax.lax.optimization_barrier(grads)
        squares = map_with_path(lambda _, g: jnp.sum(jnp.square(g.astype(jnp.float32))), grads)
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        params, opt_state = optimizer.update(grads, norm, state.opt_state, state.params, state.step)
        ema = _moving_average(state.ema, params, optimizer.cfg.ema)
        total = cfg.weights.action * parts.action + cfg.weights.text * parts.text
        ok = jnp.isfinite(norm) & jnp.isfinite(total)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

        new_state = TrainState(
            step=state.step + 1,
            params=kept(params, state.params),
            frozen=state.frozen,
            opt_state=kept(opt_state, state.opt_state),
            ema=kept(ema, state.ema),
            skipped=jnp.where(ok, 0, state.skipped + 1),
        )
        metrics = _metrics(cfg, total, parts, norm, probes) | module_norms(squares)
        rates = optimizer.learning_rates(state.step)
        metrics |= {f"lr/{name}": rate for name, rate in rates.items()}
        metrics["data/packing"] = jnp.mean(batch.vlm.segment_ids > 0)
        return new_state, metrics | {"train/skipped": new_state.skipped}

    return train_step


def update_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of everything random in update number ``step``; never stored (DESIGN.md D5)."""
    return jax.random.fold_in(jax.random.key(seed), step)


def init_train_state(params: Params, optimizer: Optimizer, frozen: Params) -> TrainState:
    """State before the first update."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params) if optimizer.cfg.ema else None
    return TrainState(zero, params, frozen, optimizer.init(params), ema, zero)


def _accumulated(grad_fn, params, batch, draws, accumulation: int, rules: Rules):
    """Sums of gradients and parts over microbatches; one needs no loop."""
    zero = _Probes(jnp.zeros(()), jnp.zeros(()))
    if accumulation == 1:
        return grad_fn(params, zero, batch, draws)
    # Microbatch a holds rows a, a + A, ...: each device keeps the rows that it has.
    micro = jax.tree.map(lambda x: _microbatches(x, accumulation, rules), (batch, draws))
    shapes = jax.eval_shape(grad_fn, params, zero, *jax.tree.map(lambda x: x[0], micro))
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(sums, part):
        return jax.tree.map(jnp.add, sums, grad_fn(params, zero, *part)), None

    return jax.lax.scan(body, sums, micro)[0]


def _microbatches(x: jax.Array, count: int, rules: Rules) -> jax.Array:
    """[B,...] -> [count,B/count,...]."""
    x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # its layout follows the other leaves'
        return x
    return constrain(x, rules, None, "batch", *(None,) * (x.ndim - 2))


def _parts(batch: Batch, losses, num_groups: int) -> _Parts:
    action = text = jnp.zeros((2, num_groups))
    if losses.action_error is not None:
        counted = batch.action.action_mask & batch.action.valid[..., None, None]
        count = jnp.sum(counted, axis=(2, 3), dtype=jnp.float32)
        mean = losses.action_error / jnp.maximum(count, 1)
        action = jnp.stack(group_sums(mean, count, batch.action.sample_group, num_groups))
    if losses.text_nll is not None:
        vlm = batch.vlm
        sums = group_sums(losses.text_nll, vlm.target_weight, vlm.target_group, num_groups)
        text = jnp.stack(sums)
    return jax.lax.stop_gradient(_Parts(losses.action, losses.text, action, text))


def _moving_average(ema: Params | None, params: Params, decay: float) -> Params | None:
    if ema is None:
        return None
    return jax.tree.map(lambda e, p: (decay * e + (1 - decay) * p).astype(e.dtype), ema, params)


def module_norms(squares: Params) -> Metrics:
    """f32[] gradient norm of each of NORM_MODULES with trainable parameters, from sums of squares.

    The sums serve the clip too: one pass over the gradients.
    """
    leaves = list(leaves_by_path(squares))
    own = {m: [s for path, s in leaves if path.startswith(m + "/")] for m in NORM_MODULES}
    return {f"grad/{NORM_MODULES[m]}": jnp.sqrt(sum(parts)) for m, parts in own.items() if parts}


def make_loss_norms(model: ST4VLA, cfg: StepConfig) -> Callable[..., Metrics]:
    """(all parameters, batch, key) -> norms of each loss's gradient in the whole VLM.

    grad/vlm_action (after the decay), grad/vlm_text and their cosine grad/vlm_cosine, each loss
    times its weight.  It takes a forward and a backward pass for each loss, twice the cost of an
    update without accumulation, since the sum of both is all that an update needs.
    """

    def loss_norms(params: Params, batch: Batch, key: jax.Array) -> Metrics:
        draws = model.draw(key, batch, cfg.repeats)
        denominators = Denominators.of(batch, cfg.repeats)

        def gradient(weights: LossWeights) -> Params:
            def loss(vlm: Params) -> jax.Array:
                whole = params | {"vlm": vlm}
                return model.loss(whole, batch, draws, denominators, weights)[0]

            return jax.grad(loss)(params["vlm"])

        action = gradient(LossWeights(cfg.weights.action, 0.0))
        text = gradient(LossWeights(0.0, cfg.weights.text))
        action, text = jax.lax.optimization_barrier((action, text))  # as in the train step
        norms = optax.global_norm(action), optax.global_norm(text)
        products = jax.tree.map(lambda a, t: jnp.sum(a * t, dtype=jnp.float32), action, text)
        cosine = sum(jax.tree.leaves(products)) / jnp.maximum(norms[0] * norms[1], 1e-30)
        names = ("grad/vlm_action", "grad/vlm_text", "grad/vlm_cosine")
        return dict(zip(names, (*norms, cosine), strict=True))

    return loss_norms


def _metrics(cfg: StepConfig, total, parts: _Parts, norm, probes: _Probes) -> Metrics:
    """Scalars by name; group means stay sums and weights, since a step may lack a group."""
    return {
        "loss/total": total,
        "loss/action": parts.action,
        "loss/text": parts.text,
        "grad/norm": norm,
        "grad/bridge": jnp.sqrt(probes.bridge),
        "grad/text_hidden": jnp.sqrt(probes.text),
        "group/action": parts.group_action,
        "group/text": parts.group_text,
    }


def by_group(metrics: dict[str, Any], groups: tuple[str, ...]) -> dict[str, float]:
    """Host side: the group sums of one or more steps' metrics as loss/action/GROUP and the like."""
    named = {}
    for kind in ("action", "text"):
        sums, weights = metrics.pop(f"group/{kind}")
        for name, total, weight in zip(groups, sums, weights, strict=True):
            if weight > 0:
                named[f"loss/{kind}/{name}"] = float(total / weight)
    return named
