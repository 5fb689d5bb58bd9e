"""Memory of a device from shapes alone: seconds, no compiler, good to some ten percent.

State and batch are exact.  What the backward pass keeps is read from the trace of the forward
pass, so that every rematerialisation policy is right; what XLA fuses, or holds a moment longer than
it must, is not seen.  The tensor axis is not taken off activations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from st4vla_jax.batch import VISION_BIN, Batch
from st4vla_jax.data.layout import LayoutError
from st4vla_jax.models.st4vla import ST4VLA, Denominators
from st4vla_jax.plan_setup import Plan
from st4vla_jax.state import leaves_by_path

PAPER = (256, 64)  # robot and grounding samples of an update
_EFFICIENT = 0.9  # share of the tokens that are samples'; less is worth advice

# Part of the model -> a word of its trace's name stack; the first that occurs decides.
_SCOPES = (
    ("vision", "visual"), ("bridge", "Bridge"), ("dino", "DinoV2"), ("dit", "DiT"),
    ("text", "language_model"),
)  # fmt: skip
_OTHER = "losses"


@dataclasses.dataclass(frozen=True)
class Table:
    """Bytes of one device by what takes them.

    Attributes:
      rows: name -> bytes.
      checkpoint: bytes of a whole checkpoint.
      notes: what to know about the batch.
    """

    rows: Mapping[str, float]
    checkpoint: float
    notes: tuple[str, ...]

    @property
    def total(self) -> float:
        return sum(self.rows.values())


def memory_table(plan: Plan) -> Table:
    """Bytes of a device and of a checkpoint."""
    state = plan.state
    moments = state.opt_state
    params = [*jax.tree.leaves(state.params), *jax.tree.leaves(state.frozen)]
    rows = {
        "parameters": _device_bytes(params),
        "moments": _device_bytes(jax.tree.leaves(moments)),
        "moving average": _device_bytes(jax.tree.leaves(state.ema)),
        "gradients": _device_bytes(jax.tree.leaves(state.params)),
        "batch": _device_bytes(jax.tree.leaves(plan.batch)),
    }
    rows |= _gathered_weights(plan)
    kept = kept_activations(plan)
    rows |= {f"activations, {part}": float(size) for part, size in kept.items()}
    rows["one block again in the backward pass"] = block_activations(plan)
    rows["logits of one vocabulary tile"] = _logits(plan)
    leaves = jax.tree.leaves((state.params, state.frozen, moments, state.ema))
    checkpoint = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    return Table({k: v for k, v in rows.items() if v}, float(checkpoint), tuple(batch_notes(plan)))


def _device_bytes(leaves: Iterable[Any]) -> float:
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def _gathered_weights(plan: Plan) -> dict[str, float]:
    """Weights that are whole for a moment: two blocks, one's gradient, and the embedding table."""
    itemsize = plan.config.runtime.dtypes.compute.itemsize
    tensor = plan.mesh.shape["tensor"]
    sizes = {p: math.prod(x.shape) for p, x in leaves_by_path(plan.state.all_params)}
    blocks = [
        sum(n for path, n in sizes.items() if path.startswith(prefix)) / depth
        for prefix, depth in (
            ("vlm/language_model/blocks/", plan.config.model.text.num_hidden_layers),
            ("vlm/visual/blocks/", plan.config.model.vision.depth),
        )
    ]
    text = plan.config.model.text
    tables = 2 if text.tie_word_embeddings else 4  # and their gradients
    keeps = plan.config.runtime.remat == "full_keep_weights" and plan.mesh.shape["fsdp"] > 1
    return {
        "blocks' weights, gathered": 3 * max(blocks) * itemsize / tensor,
        "decoder's weights, kept": keeps * blocks[0] * text.num_hidden_layers * itemsize / tensor,
        "embedding table, gathered": (
            tables * text.vocab_size * text.hidden_size * itemsize / tensor
        ),
    }


def kept_activations(plan: Plan, remat: str = "") -> Counter[str]:
    """Bytes that one device's forward pass of a microbatch keeps for the backward pass, by part.

    Args:
      plan: its runtime decides how; on a TPU's kernels, unless it names others.
      remat: in place of the runtime's.
    """
    traced = _residuals(plan, remat)
    return Counter({part: sum(sizes) for part, sizes in traced.items()})


def block_activations(plan: Plan) -> float:
    """Bytes of the activations inside one block, which its backward pass computes again."""
    if plan.config.runtime.remat == "none":
        return 0.0
    cfg, kept = plan.config.model, kept_activations(plan, "none")
    depths = {"text": cfg.text.num_hidden_layers, "vision": cfg.vision.depth}
    return max(kept[part] / depth for part, depth in depths.items())


def _residuals(plan: Plan, remat: str) -> dict[str, list[int]]:
    """Bytes of each array that depends on the batch and outlives the forward pass, by part."""
    rt = plan.config.runtime
    kernel = "splash" if rt.attention == "auto" else rt.attention
    rt = dataclasses.replace(rt, attention=kernel, remat=remat or rt.remat)
    model, repeats = ST4VLA(plan.config.model, rt), plan.config.loss.repeats
    rows = plan.planned.schedule.sequences // plan.batch_shards // plan.config.accumulation

    def pullback(params, batch):
        draws = model.draw(jax.random.key(0), batch, repeats)
        denominators = Denominators.of(batch, repeats)
        return jax.vjp(lambda p: model.loss(p, batch, draws, denominators)[0], params)[1]

    def shape(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)

    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), plan.state.all_params)
    batch: Batch = jax.tree.map(shape, plan.planned.batch)
    traced = jax.make_jaxpr(pullback)(params, batch).jaxpr
    return _batch_outputs(traced, len(jax.tree.leaves(params)))


def _batch_outputs(jaxpr: Any, num_params: int) -> dict[str, list[int]]:
    """Bytes of the outputs that depend on inputs after the first ``num_params``, by part."""
    dependent = set(jaxpr.invars[num_params:])
    part_of: dict[Any, str] = {}
    for eqn in jaxpr.eqns:
        if any(v in dependent for v in eqn.invars if not isinstance(v, Literal)):
            dependent.update(eqn.outvars)
            stack = str(eqn.source_info.name_stack)
            part = next((part for part, word in _SCOPES if word in stack), _OTHER)
            part_of |= dict.fromkeys(eqn.outvars, part)
    found: dict[str, list[int]] = {}
    for v in dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, Literal)):
        if v in part_of and not jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key):
            size = math.prod(v.aval.shape) * v.aval.dtype.itemsize
            found.setdefault(part_of[v], []).append(size)
    return found


def _logits(plan: Plan) -> float:
    """Scores of a tile and their gradient, f32."""
    targets = plan.planned.batch.vlm.targets
    rows = plan.planned.schedule.sequences // plan.batch_shards // plan.config.accumulation
    tile = min(plan.config.runtime.vocab_tile, plan.config.model.text.vocab_size)
    return 2 * 4.0 * rows * targets.shape[1] * tile / plan.mesh.shape["tensor"]


def batch_notes(plan: Plan) -> list[str]:
    """What an update holds, beside the paper, and what of it is padding."""
    schedule = plan.planned.schedule
    cfg, tokens = schedule.config, schedule.capacity.tokens
    notes = [
        f"an update: {cfg.robot_samples} robot + {cfg.grounding_samples} grounding samples (paper: "
        f"{PAPER[0]} + {PAPER[1]}), {schedule.sequences} sequences of {tokens} tokens "
        f"({plan.planned.source}), {100 * schedule.efficiency:.0f} % of the tokens are samples'",
    ]
    needed = math.ceil(schedule.mean_tokens / plan.config.data.schedule.tokens)
    multiple = cfg.multiple
    if needed < multiple:
        advice = _fewer_sequences(plan, needed)
        notes.append(
            f"{needed} sequences of {plan.config.data.schedule.tokens} tokens would hold it, fewer "
            f"than the {multiple} that data x fsdp x accumulation needs: {advice}"
        )
    return notes


def _fewer_sequences(plan: Plan, needed: int) -> str:
    """What fills the sequences better: a shorter T, or devices on tensor in place of data."""
    schedule, ways = plan.planned.schedule, []
    multiple, taken = schedule.config.multiple, schedule.capacity.tokens
    even = math.ceil(schedule.mean_tokens / schedule.sequences / VISION_BIN) * VISION_BIN
    for tokens in range(even, taken, VISION_BIN):
        with contextlib.suppress(LayoutError):
            if schedule.sequences_of(tokens) == schedule.sequences:
                ways.append(f"--config.data.schedule.tokens={tokens}")
                break
    if schedule.efficiency < _EFFICIENT:
        tensor = 2 ** math.ceil(math.log2(multiple / needed))
        ways.append(f"{tensor} times as many devices on tensor, fewer on data or fsdp")
        ways.append(f"{multiple / needed:.1f} times the samples")
    chosen = f"sequences of {taken} tokens are taken instead"
    return chosen + (f"; better filled with {', or '.join(ways)}" if ways else "")
