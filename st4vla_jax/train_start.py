"""The first state of a run, and its compiled step.

A state is fresh, warm-started from other checkpoints part by part, or the workdir's own last one;
each device makes or reads only what it holds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from st4vla_jax.batch import Batch
from st4vla_jax.distributed import wait_for_all
from st4vla_jax.optim import group_table
from st4vla_jax.resume import init_from
from st4vla_jax.sharding import unbox
from st4vla_jax.state import Params, TrainState, leaves_by_path, merge, split
from st4vla_jax.train_setup import ADAPTERS, Setup, abstract_batch, sharded_like
from st4vla_jax.train_step import Metrics, init_train_state, make_train_step

Say = Callable[[str], None]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# A fresh state is made once: XLA's optimisation would take longer than it saves.
_FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class RecompilationError(RuntimeError):
    """A batch that the compiled step does not take; names what differs."""


def first_state(setup: Setup, say: Say) -> TrainState:
    """The state that the run goes on from, told in a few lines.

    Raises:
      CheckpointError: what was found at `prepare` cannot be read any more.
    """
    if setup.resume_step is not None and not setup.restart:
        state = setup.checkpoints.restore(setup.resume_step, setup.abstract)
        say(f"resumed at step {setup.resume_step} from {setup.checkpoints.folder}")
        before = setup.checkpoints.run_record(setup.resume_step)["config"]["steps"]
        if before != setup.config.steps:
            say(f"steps: {before} -> {setup.config.steps}; learning rates follow the new length")
        return state
    taken: Params = {}
    if setup.resume_step is not None:
        folder = setup.checkpoints.folder / f"{setup.resume_step:08d}"
        sources = dict.fromkeys(setup.abstract.all_params, folder)
        say(f"step {setup.resume_step} of this workdir, with a new optimizer")
    else:
        sources = setup.sources
    for folder in dict.fromkeys(sources.values()):
        parts = [part for part, own in sources.items() if own == folder]
        warm = init_from(folder, setup.abstract.all_params, parts, ADAPTERS)
        taken = merge(taken, warm.params)
        at = "" if warm.step is None else f", step {warm.step}"
        say(f"weights of {', '.join(parts)} from {folder}{at}")
    params = merge(taken, _fresh(setup, taken, say))
    state = _with_optimizer(setup, params)
    if setup.resume_step is not None:
        step = jnp.asarray(setup.resume_step, jnp.int32)
        state = state.replace(step=jax.device_put(step, setup.abstract.step.sharding))
    return state


def _fresh(setup: Setup, taken: Params, say: Say) -> Params:
    """Draws the parameters that no checkpoint gave, sharded as they are made."""
    have = {path for path, _ in leaves_by_path(taken)}
    wanted, _ = split(setup.abstract.all_params, lambda path: path not in have)
    if not wanted:
        return {}
    paths = {path for path, _ in leaves_by_path(wanted)}

    def draw(key: jax.Array) -> Params:
        drawn = split(unbox(setup.init(key)), lambda path: path in paths)[0]
        return jax.tree.map(lambda x, like: x.astype(like.dtype), drawn, wanted)

    start = time.perf_counter()
    key = jax.random.key(setup.config.seed)
    lowered = jax.jit(draw, out_shardings=sharded_like(wanted)).lower(key)
    on_cpu = jax.default_backend() == "cpu"
    params = lowered.compile(_FAST_COMPILE if on_cpu else None)(key)
    tops = sorted({path.split("/")[0] for path in paths})
    adapters = "" if taken.keys().isdisjoint(tops) else " (adapters, where weights were given)"
    say(f"fresh: {', '.join(tops)}{adapters}, {time.perf_counter() - start:.1f} s")
    return params


def _with_optimizer(setup: Setup, params: Params) -> TrainState:
    """A state before its first update, from parameters in place."""
    trainable, frozen = split(params, setup.optimizer.is_trainable)
    make = jax.jit(
        lambda p: dataclasses.replace(init_train_state(p, setup.optimizer, {}), params={}),
        out_shardings=sharded_like(dataclasses.replace(setup.abstract, params={}, frozen={})),
    )
    return dataclasses.replace(make(trainable), params=trainable, frozen=frozen)


def describe(setup: Setup) -> list[str]:
    """The lines that say what is about to be trained."""
    config, schedule = setup.config, setup.pipeline.schedule
    mesh = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    kind = jax.devices()[0].device_kind
    lines = [
        f"devices: {len(jax.devices())} {kind}, mesh {mesh}, {jax.process_count()} process(es)",
        f"an update: {schedule.config.robot_samples} robot + {schedule.config.grounding_samples} "
        f"grounding samples (paper: 256 + 64) in {schedule.sequences} sequences of "
        f"{schedule.capacity.tokens} tokens, {config.accumulation} microbatch(es)",
    ]
    for name, count, told in group_table(setup.abstract.all_params, config.optim):
        lines.append(f"  {name:<12}{count:>16,d} parameters  {told}")
    if idle := config.without_effect():
        lines.append(f"set, but without effect in this run: {', '.join(idle)}")
    return lines


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The train step for one shape of batch.

    Attributes:
      run: (state, batch) -> (state, metrics); the state is donated.
      expected: the global batch's shapes; lowering_s, compile_s: seconds that they took.
    """

    run: TrainStep
    expected: Batch
    lowering_s: float
    compile_s: float

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update.

        Raises:
          RecompilationError: the batch has another shape than the first one.
        """
        try:
            return self.run(state, batch)
        except TypeError as error:
            if differing := _differences(self.expected, batch):
                raise RecompilationError(
                    "the step would have to be compiled again, since this batch differs from the "
                    f"first: {'; '.join(differing)}"
                ) from error
            raise


def compile_step(setup: Setup, batch: Batch) -> CompiledStep:
    """Compiles the train step for batches like this process's part ``batch``."""
    step = make_train_step(setup.model, setup.optimizer, setup.step_config)
    expected = abstract_batch(batch, setup)
    start = time.perf_counter()
    lowered = trace_step(step, setup.abstract, expected).lower()
    lowering = time.perf_counter() - start
    compiled = lowered.compile()
    seconds = time.perf_counter() - start - lowering
    wait_for_all()
    return CompiledStep(compiled, expected, lowering, seconds)


def trace_step(step: TrainStep, state: TrainState, batch: Batch) -> jax.stages.Traced:
    """The step for a state and a batch of ShapeDtypeStructs, under the mesh of `jax.set_mesh`."""
    shardings = (sharded_like(state), None)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings).trace(state, batch)


def _differences(expected: Any, batch: Any) -> list[str]:
    """Leaves whose shape or dtype differs, "action.actions: f32[..] -> f32[..]"."""
    named = [
        {
            jax.tree_util.keystr(keys).lstrip("."): f"{leaf.dtype}{list(leaf.shape)}"
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (expected, batch)
    ]
    names = dict.fromkeys([*named[0], *named[1]])
    sides = [(name, named[0].get(name, "absent"), named[1].get(name, "absent")) for name in names]
    return [f"{name}: {old} -> {new}" for name, old, new in sides if old != new]
