"""Our side of ``bench step``: the real training step over one packed batch, under options."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from st4vla_jax import bench_mixture
from st4vla_jax.batch import Batch
from st4vla_jax.bench_mixture import Packed
from st4vla_jax.config import ModelConfig, Runtime
from st4vla_jax.models.st4vla import ST4VLA, Losses, LossWeights
from st4vla_jax.optim import Group, OptimConfig, Optimizer
from st4vla_jax.sharding import unbox
from st4vla_jax.train_step import StepConfig, init_train_state, make_train_step

GIB = 2**30
# torch's side has the same: one rate for all, clip 1.0.
OPTIMIZER = Optimizer(OptimConfig({"all": Group("", 1e-5, 1e-8, schedule="constant")}), 100_000)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What may be tried; "" and 0 leave the preset's `Runtime` as it is.

    Attributes:
      robot, grounding: samples of a step.
      tokens: T; 0 = chosen.
      layout: "packed"; "padded" is one sample a row; "split" packs robot and grounding samples into
        rows of their own and runs the VLM once over each, as the reference does.
      logits: "supervised" positions only, or of "all".
      remat, attention, query_chunk, vocab_tile: see `Runtime`.
      xla: compiler options, "name=value+name=value".
      repeats: noise draws a robot sample.
    """

    robot: int
    grounding: int
    tokens: int = 0
    layout: str = "packed"
    logits: str = "supervised"
    remat: str = ""
    attention: str = ""
    query_chunk: int = 0
    vocab_tile: int = 0
    xla: str = ""
    repeats: int = 4

    def runtime(self, base: Runtime) -> Runtime:
        """``base`` with what is set here."""
        names = ("remat", "attention", "query_chunk", "vocab_tile")
        return dataclasses.replace(base, **{n: v for n in names if (v := getattr(self, n))})

    def batch(self, cfg: ModelConfig, samples: list[Packed]) -> tuple[Batch, int]:
        """The batch, and its number of rows that the first of two forwards takes (0: one)."""
        first = 0
        if self.layout == "split":
            batch, first = bench_mixture.split_batch(cfg, samples, self.tokens)
        elif self.layout == "padded":
            batch = bench_mixture.padded_batch(cfg, samples)
        else:
            batch = bench_mixture.packed_batch(cfg, samples, self.tokens)
        return (
            batch if self.logits == "supervised" else bench_mixture.with_all_logits(batch)
        ), first


@dataclasses.dataclass(frozen=True)
class TwoForwards(ST4VLA):
    """The policy with the reference's two VLM forwards: robot rows first, then the others.

    Attributes:
      first: robot rows; a grounding sample may not lie in them, nor a robot sample below.
    """

    first: int = 0

    def loss(self, params, batch, draws, denominators, weights=LossWeights(), *probes):  # noqa: B008
        """As `ST4VLA.loss`."""
        n, rest = self.first, len(batch.vlm.tokens) - self.first
        robot = jax.tree.map(lambda x: x[:n], batch)
        grounding = jax.tree.map(lambda x: x[n:], batch).replace(action=None)
        names = ("target_index", "targets", "target_weight", "target_group")
        none = {name: getattr(robot.vlm, name)[:, :0] for name in names}
        robot = robot.replace(vlm=robot.vlm.replace(**none))
        own = jax.tree.map(lambda x: x[:n], draws)
        one, action = super().loss(params, robot, own, denominators, weights, *probes)
        two, text = super().loss(params, grounding, None, denominators, weights)
        error = jnp.pad(action.action_error, ((0, rest), (0, 0)))
        nll = jnp.pad(text.text_nll, ((n, 0), (0, 0)))
        return one + two, Losses(action.action, text.text, error, nll)


@dataclasses.dataclass
class CompiledStep:
    """A compiled step over one batch.

    Attributes:
      run: makes an update, waits for it, returns the loss.
      compile_s: seconds to trace and compile.
      memory_gib: state, batch and temporaries of the program.
      shape: (rows, tokens, vision slots, robot slots, supervised slots).
    """

    run: Callable[[], float]
    compile_s: float
    memory_gib: float
    shape: tuple[int, ...]


class JaxStep:
    """One training state, stepped by the programs of several options."""

    def __init__(self, cfg: ModelConfig, base: Runtime):
        self.cfg, self.base = cfg, base
        self.state: Any = None

    def initialise(self, params: Any = None) -> None:
        """A fresh state; random parameters unless given."""

        def fresh(key):
            return unbox(ST4VLA(self.cfg, self.base).init(key))

        self.state = None  # free the old one first
        # rbg: threefry takes minutes to compile on CPUs.
        key = jax.random.key(0, impl="unsafe_rbg")
        params = jax.jit(fresh)(key) if params is None else params
        init = jax.jit(lambda p: init_train_state(p, OPTIMIZER, {}), donate_argnums=0)
        self.state = jax.block_until_ready(init(params))

    def recover(self) -> None:
        """Makes a state anew that a failed update has taken along."""
        if self.state is None or any(x.is_deleted() for x in jax.tree.leaves(self.state)):
            self.initialise()

    @property
    def version(self) -> str:
        return f"jax {jax.__version__}"

    @property
    def num_parameters(self) -> int:
        return sum(p.size for p in jax.tree.leaves(self.state.params))

    def make_step(self, options: StepOptions, samples: list[Packed]) -> CompiledStep:
        """Compiles the step for these samples."""
        rt = options.runtime(self.base)
        batch, first = options.batch(self.cfg, samples)
        model = TwoForwards(self.cfg, rt, first) if first else ST4VLA(self.cfg, rt)
        step = make_train_step(model, OPTIMIZER, StepConfig(repeats=options.repeats))
        flags = dict(pair.split("=", 1) for pair in options.xla.split("+") if pair)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, batch)
        compiled = lowered.compile(compiler_options=flags or None)
        compile_s = time.perf_counter() - start
        on_device = jax.device_put(batch)

        def run() -> float:
            self.state, metrics = compiled(self.state, on_device)
            return float(metrics["loss/total"])

        sizes = (*batch.vlm.tokens.shape, batch.vlm.patches.shape[1], batch.action.valid.shape[1])
        return CompiledStep(run, compile_s, _memory(compiled), (*sizes, batch.vlm.targets.shape[1]))


def _memory(compiled: Any) -> float:
    """GiB that a program needs; 0 where the backend does not say."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0.0
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return (total - sizes.alias_size_in_bytes) / GIB
