"""What would make a step fit, ranked by the bytes of a chip that it saves."""

from __future__ import annotations

import dataclasses

from st4vla_jax.plan_setup import Plan
from st4vla_jax.plan_table import Table, kept_activations
from st4vla_jax.sharding import LANES


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change.

    Attributes:
      change: as an argument of the command line.
      saved: bytes of one chip, from the table; cost: what it costs, for people.
    """

    change: str
    saved: float
    cost: str

    def __str__(self) -> str:
        return f"{self.change}: about {self.saved / 2**30:.1f} GiB less ({self.cost})"


def advice(plan: Plan, table: Table) -> list[Advice]:
    """Changes that save memory, the largest first."""
    rows, mesh, config = table.rows, plan.mesh.shape, plan.config
    state = sum(rows.get(n, 0) for n in ("parameters", "moments", "moving average", "gradients"))
    activations = sum(size for name, size in rows.items() if name.startswith("activations"))
    inside = rows.get("one block again in the backward pass", 0.0)
    logits = rows.get("logits of one vocabulary tile", 0.0)
    found = []
    if config.runtime.remat != "full":
        saved = activations - sum(kept_activations(plan, "full").values())
        found.append(Advice("--config.runtime.remat=full", saved, "about a third more products"))
    if mesh["data"] > 1 and mesh["data"] % 2 == 0 and _width(plan) >= LANES // 2:
        sizes = f"{mesh['data'] // 2},{mesh['fsdp'] * 2},{mesh['tensor']}"
        found.append(Advice(f"--mesh={sizes}", state / 2, "longer all-gathers"))
    if mesh["fsdp"] > 1 and not _heads(plan) % (2 * mesh["tensor"]):
        side = "data" if mesh["data"] > 1 else "fsdp"
        sizes = {**mesh, side: mesh[side] // 2, "tensor": 2 * mesh["tensor"]}
        text = ",".join(str(sizes[axis]) for axis in ("data", "fsdp", "tensor"))
        saved = state / 2 if side == "data" else 0.0
        gathered = sum(size for name, size in rows.items() if name.endswith("gathered")) / 2
        found.append(Advice(f"--mesh={text}", saved + gathered, "activations move in every block"))
    if plan.planned.schedule.sequences > plan.batch_shards * config.accumulation:
        change = f"--config.accumulation={2 * config.accumulation}"
        saved = (activations + inside + logits) / 2
        found.append(Advice(change, saved, "weights are gathered twice as often"))
    if config.optim.mu_dtype == "float32":
        change = "--config.optim.mu_dtype=bfloat16"
        found.append(Advice(change, rows.get("moments", 0.0) / 4, "first moment rounded"))
    if config.optim.ema:
        average = rows.get("moving average", 0.0)
        found.append(Advice("--config.optim.ema=0", average, "no moving average"))
    fewer = f"half the samples of an update (now {plan.samples})"
    found.append(Advice(fewer, (activations + inside + logits) / 2, "another recipe"))
    return sorted((a for a in found if a.saved > 0), key=lambda a: -a.saved)


def _width(plan: Plan) -> int:
    """Lanes of the narrowest slices with twice the fsdp axis."""
    sizes = (plan.config.model.text.hidden_size, plan.config.model.vision.hidden_size)
    return min(sizes) // (2 * plan.mesh.shape["fsdp"])


def _heads(plan: Plan) -> int:
    """Tensor axes that divide this divide all heads."""
    return plan.config.model.text.num_attention_heads
