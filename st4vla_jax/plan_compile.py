"""Compiles the train step for a slice on this machine's CPU, and reads what it will cost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from st4vla_jax.chips import GIB, Chip, Slice
from st4vla_jax.flops import jaxpr_flops, model_flops, trainable_shares
from st4vla_jax.models.attention_splash import LANES
from st4vla_jax.plan_cost import Collective, Cost, step_cost
from st4vla_jax.plan_hlo import Module, parse_hlo
from st4vla_jax.plan_setup import Plan
from st4vla_jax.state import TrainState, leaves_by_path
from st4vla_jax.train_setup import step_config
from st4vla_jax.train_start import trace_step
from st4vla_jax.train_step import make_train_step

LAUNCH_FLAGS = Path(__file__).resolve().parents[1] / "launch" / "env.sh"
REMATERIALISED = "Involuntary full rematerialization"


class CompileError(ValueError):
    """The compiler does not take the step or an option; says which."""


class OutOfMemoryError(CompileError):
    """The step does not fit a chip.

    Attributes:
      needed: bytes that the compiler asked for, 0 if it did not say.
    """

    def __init__(self, message: str, needed: float) -> None:
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler and the program say.

    Attributes:
      tensor: size of that mesh axis; samples: of an update; steps: of the run.
      peak: bytes of HBM at most, on each chip.
      program_flops, model_flops: of a step on all chips, as traced, and as valid tokens need.
      cost: of a step on one chip.
      minimum: kind of collective -> bytes that this layout must move.
      of_activations: collectives with the shape of activations, other than a tensor axis's sums.
      rematerialised: the partitioner's complaints about layouts that it could not turn.
      logits: whether scores of the whole vocabulary are ever formed.
      seconds: of tracing, lowering and compiling.
      host_bytes: that compiling took on this machine, at most.
    """

    tpu: Slice
    tensor: int
    samples: int
    steps: int
    peak: float
    program_flops: float
    model_flops: float
    cost: Cost
    minimum: Mapping[str, float]
    of_activations: tuple[Collective, ...]
    rematerialised: int
    logits: bool
    seconds: float
    host_bytes: float

    @property
    def rate(self) -> float:
        """FLOP/s of all chips at their peak."""
        return self.tpu.chips * self.tpu.chip.peak_flops

    @property
    def compute_s(self) -> float:
        """Products of a step, recomputation and padding included."""
        return self.program_flops / self.rate

    @property
    def step_s(self) -> float:
        """The least that a step can take: nothing exposed is hidden, all else runs at its peak."""
        return self.compute_s + self.cost.exposed_interconnect + self.cost.exposed_hbm

    @property
    def bound(self) -> float:
        """Model FLOPs utilisation at most."""
        return self.model_flops / (self.rate * self.step_s)

    @property
    def samples_per_host(self) -> float:
        """That each host must read in a second to keep up."""
        return self.samples / self.step_s / self.tpu.hosts

    @property
    def days(self) -> float:
        return self.steps * self.step_s / 86400

    def traffic(self) -> dict[str, tuple[int, int, float]]:
        """Kind of collective -> (runs, asynchronous runs, bytes) of a step on one chip."""
        found: dict[str, tuple[int, int, float]] = {}
        for c in self.cost.collectives:
            runs, hidden, size = found.get(c.kind, (0, 0, 0.0))
            found[c.kind] = runs + c.runs, hidden + c.runs * c.asynchronous, size + c.runs * c.bytes
        return found


def launch_flags(chip: Chip) -> dict[str, str]:
    """Options that launch/env.sh gives this chip's compiler; none where the folder is not there."""
    if not LAUNCH_FLAGS.exists():
        return {}
    text = LAUNCH_FLAGS.read_text()
    names = re.search(rf"^ *[\w |]*\b{chip.name}\b[\w |]*\) flags=\((.*)\)", text, re.M)[1]
    blocks = [
        re.search(rf"^{name}=\((.*?)^\)", text, re.S | re.M)[1]
        for name in re.findall(r"\w+", names)
    ]
    return dict(re.findall(r"^\s*--(xla_\w+)=(\S+)", "\n".join(blocks), re.M))


def compile_plan(plan: Plan, tpu: Slice, options: Mapping[str, str]) -> Compiled:
    """Compiles the step that training runs.

    Args:
      plan: on the slice's devices.
      tpu: the slice.
      options: the compiler's.

    Raises:
      OutOfMemoryError: it does not fit.
      CompileError: an unknown option, or what else the compiler refuses.
    """
    config = plan.config
    names = [entry.name for entry in config.data.sets]
    step = make_train_step(plan.model, plan.optimizer, step_config(config, names))
    start = time.perf_counter()
    traced, compiled, said = compile_for(tpu, plan.mesh, step, plan.state, plan.batch, options)
    seconds = time.perf_counter() - start
    module = parse_hlo(compiled.as_text())
    cost = step_cost(module, tpu, list(plan.mesh.devices.flat))
    return Compiled(
        tpu=tpu,
        tensor=plan.mesh.shape["tensor"],
        samples=plan.samples,
        steps=config.steps,
        peak=float(compiled.memory_analysis().peak_memory_in_bytes),
        program_flops=jaxpr_flops(traced.jaxpr, kernels={"pallas_call": _kernel_flops(plan)}),
        model_flops=_model_flops(plan),
        cost=cost,
        minimum=minimum_traffic(plan),
        of_activations=tuple(
            c for c in cost.collectives if _is_activation(c, plan) and not _sums_tensor(c, plan)
        ),
        rematerialised=said.count(REMATERIALISED),
        logits=has_logits(module, config.model.text.vocab_size // plan.mesh.shape["tensor"]),
        seconds=seconds,
        host_bytes=_peak_of_process(),
    )


def compile_for(
    tpu: Slice,
    mesh: Mesh,
    step: Callable[..., Any],
    state: TrainState,
    batch: Any,
    options: Mapping[str, str],
) -> tuple[jax.stages.Traced, jax.stages.Compiled, str]:
    """Traces and compiles a step; its last result is what the compiler wrote to standard error.

    Raises:
      OutOfMemoryError, CompileError: see `compile_plan`.
    """
    with jax.set_mesh(mesh), captured_stderr() as said:
        traced = trace_step(step, state, batch)
        try:
            compiled = traced.lower().compile(compiler_options=dict(options))
        except jax.errors.JaxRuntimeError as error:
            raise _refused(str(error), tpu) from error
    return traced, compiled, "".join(said)


def has_logits(module: Module, vocab: int) -> bool:
    """Whether a program has arrays [...,V]; parameters are [V,D]."""
    shapes = (s for lines in module.computations.values() for i in lines for s in i.shapes)
    return any(s.dims[-1:] == (vocab,) and s.size > vocab for s in shapes)


def _model_flops(plan: Plan) -> float:
    """Of the valid tokens of a whole update."""
    sizes = [
        {path: math.prod(x.shape) for path, x in leaves_by_path(tree)}
        for tree in (plan.state.params, plan.state.frozen)
    ]
    cfg, config = plan.config.model, plan.config
    shares = trainable_shares(cfg, *sizes)
    return model_flops(cfg, plan.planned.batch, config.loss.repeats, shares)["total"]


def _kernel_flops(plan: Plan) -> Callable[[Any], float]:
    """FLOPs of an attention kernel's equation, which has queries [B,N,T,H] as its third input.

    The decoder's kernel skips the blocks above the diagonal; that of the vision tower skips none.
    """
    head = plan.config.model.text.head_dim
    padded = -(-plan.planned.schedule.capacity.tokens // LANES) * LANES

    def flops(equation: Any) -> float:
        grid = equation.params["grid_mapping"].grid  # its last axis counts blocks
        whole = math.prod(grid) * jaxpr_flops(equation.params["jaxpr"])
        causal = equation.invars[2].aval.shape[-2:] == (padded, head)
        return whole * (1 + 1 / grid[-1]) / 2 if causal else whole

    return flops


def _refused(error: str, tpu: Slice) -> CompileError:
    first = error.strip().splitlines()[0]
    if found := re.search(r"No such compile option:? *'?([\w]*)", error):
        return CompileError(
            f"the TPU compiler has no option {found[1]!r} (from --xla, launch/env.sh)"
        )
    if "RESOURCE_EXHAUSTED" not in error:
        return CompileError(f"the TPU compiler refuses this step: {first}")
    sizes = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", error) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds", error
    )
    needed = float(used[1]) * sizes[used[2]] if used else 0.0
    has = tpu.chip.hbm_bytes
    text = f"{needed / GIB:.2f} GiB" if needed else "more"
    short = f", {(needed - has) / GIB:.2f} GiB too little" if needed else ""
    # Of what is over by itself the compiler does not say what the arguments take.
    step = "the step's temporaries alone need" if "temporaries" in error else "the step needs"
    return OutOfMemoryError(
        f"does not fit: {step} {text}, a {tpu.chip.name} chip has {has / GIB:.2f} GiB"
        f"{short} ({first[:200]})",
        needed,
    )


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """What the process writes to its standard error, the compiler's own lines included."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _peak_of_process() -> float:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# --- What must move -----------------------------------------------------------------------------


def minimum_traffic(plan: Plan) -> dict[str, float]:
    """Bytes that each kind of collective must move on one chip and step, in the matmuls' dtype.

    A sharded weight is gathered for the forward and again for the backward pass of each
    microbatch; its gradient is scattered once, and summed over data; a replicated one's is summed.
    """
    dtypes, mesh, rounds = plan.config.runtime.dtypes, plan.mesh.shape, 2 * plan.config.accumulation
    trained = {path for path, _ in leaves_by_path(plan.state.params)}
    gather = scatter = reduce = 0.0
    for path, leaf in leaves_by_path(plan.state.all_params):
        dtype = dtypes.action if path.startswith("dit/") else dtypes.compute
        local = math.prod(leaf.sharding.shard_shape(leaf.shape)) * dtype.itemsize
        axes = {a for entry in leaf.sharding.spec for a in _axes(entry)}
        sharded = "fsdp" in axes and mesh["fsdp"] > 1
        whole = local * mesh["fsdp"] if sharded else local
        gather += rounds * whole * sharded
        if path in trained:
            scatter += whole * sharded
            reduce += local * (mesh["data"] > 1 if sharded else plan.batch_shards > 1)
    found = {"all-gather": gather, "reduce-scatter": scatter, "all-reduce": reduce}
    return {kind: size for kind, size in found.items() if size}


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _is_activation(collective: Collective, plan: Plan) -> bool:
    """Whether it moves hidden states: [rows, tokens, width] or [rows, slots, width]."""
    cfg, capacity = plan.config.model, plan.planned.schedule.capacity
    pairs = {
        (capacity.tokens, cfg.text.hidden_size), (capacity.tokens, cfg.text.intermediate_size),
        (capacity.slots, cfg.vision.hidden_size), (capacity.slots // 4, cfg.text.hidden_size),
    }  # fmt: skip
    weights = {
        _squeezed(shape[n:])
        for x in jax.tree.leaves(plan.state.all_params)
        for shape in (x.shape, x.sharding.shard_shape(x.shape))
        for n in (0, 1)
    }

    def is_weight(dims: tuple[int, ...]) -> bool:  # tables travel as [devices,rows,width]
        return _squeezed(dims) in weights or (math.prod(dims[:2]), *dims[2:]) in weights

    return any(
        not is_weight(dims) and pairs & set(zip(dims, dims[1:], strict=False))
        for dims in collective.dims
    )


def _sums_tensor(collective: Collective, plan: Plan) -> bool:
    """Whether it sums over the tensor axis, the mesh's last: what that axis is for."""
    first, last = min(collective.group), max(collective.group)
    return collective.kind == "all-reduce" and last - first < plan.mesh.shape["tensor"]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def masked_scores(plan: Plan) -> dict[str, float]:
    """Share of the attention scores that are padding's or between segments, by tower.

    The decoder's kernel skips what lies above the diagonal, nothing else.
    """
    vlm = plan.planned.batch.vlm
    rows, tokens = vlm.tokens.shape
    lengths = _counts(vlm.segment_ids)
    shares = {"text": 1 - np.sum(lengths * (lengths + 1)) / (rows * tokens * (tokens + 1))}
    if slots := vlm.patch_image.shape[1]:
        shares["vision"] = 1 - np.sum(_counts(vlm.patch_image) ** 2) / (rows * slots**2)
    return {name: float(share) for name, share in shares.items()}


def _counts(ids: np.ndarray) -> np.ndarray:
    """Entries of each row [n,...] that carry each id but 0."""
    return np.concatenate([np.unique(row[row > 0], return_counts=True)[1] for row in ids])
