"""A plan as lines for people and as JSON."""

from __future__ import annotations

from typing import Any

from st4vla_jax.chips import GIB, Slice
from st4vla_jax.plan_compile import Compiled, masked_scores
from st4vla_jax.plan_setup import Plan
from st4vla_jax.plan_table import Table
from st4vla_jax.sharding import LANES

_GB = 1e9
_MANY = 1.1  # times the least that must move
_SHOWN = 6  # collectives


def table_lines(plan: Plan, table: Table, tpu: Slice | None) -> list[str]:
    """What shapes alone say."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.shape.items())
    several = f" x {tpu.slices} slices" if tpu and tpu.slices > 1 else ""
    where = f"{tpu.name}{several}, {tpu.chips} chips" if tpu else f"{plan.mesh.size} device(s)"
    lines = [f"{where}, mesh {mesh}", *table.notes, "", "a device, from shapes (GiB):"]
    lines += [f"  {name:<42}{size / GIB:9.2f}" for name, size in table.rows.items()]
    limit = f"of {tpu.chip.hbm_bytes / GIB:.2f}" if tpu else ""
    lines.append(f"  {'about':<42}{table.total / GIB:9.2f} {limit}".rstrip())
    lines.append(f"a checkpoint: {table.checkpoint / _GB:.1f} GB")
    if plan.narrow:
        lines.append(f"slices under {LANES} lanes: {', '.join(plan.narrow)}")
    masked = ", ".join(f"{name} {100 * share:.0f} %" for name, share in masked_scores(plan).items())
    lines.append(f"attention scores of padding or other segments: {masked}")
    return lines


def compiled_lines(plan: Plan, compiled: Compiled) -> list[str]:
    """What the compiler says."""
    chip, cost = compiled.tpu.chip, compiled.cost
    lines = [
        "",
        f"compiled in {compiled.seconds:.0f} s with {compiled.host_bytes / GIB:.1f} GiB",
        f"peak HBM of a chip: {compiled.peak / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB",
        f"products: {compiled.program_flops / 1e12:.1f} TFLOP a step, of which "
        f"{compiled.model_flops / 1e12:.1f} for valid tokens without recomputation",
        "",
        f"{'a chip and step moves':<24}{'runs':>8}{'async':>8}{'GB':>9}{'at least':>10}",
    ]
    traffic = compiled.traffic()
    for kind in dict.fromkeys([*traffic, *compiled.minimum]):
        runs, hidden, size = traffic.get(kind, (0, 0, 0.0))
        least = compiled.minimum.get(kind, 0.0)
        lines.append(f"  {kind:<22}{runs:>8}{hidden:>8}{size / _GB:>9.2f}{least / _GB:>10.2f}")
    lines += [
        "",
        f"a step takes at least {1e3 * compiled.step_s:.1f} ms: products "
        f"{1e3 * compiled.compute_s:.1f}, exposed interconnect "
        f"{1e3 * cost.exposed_interconnect:.1f} (of {1e3 * cost.interconnect:.1f}), exposed HBM "
        f"{1e3 * cost.exposed_hbm:.1f}",
        f"roofline bound: {100 * compiled.bound:.0f} % model FLOPs utilisation; "
        f"limited by {limit(compiled)}",
        f"each of {compiled.tpu.hosts} hosts must read {compiled.samples_per_host:.1f} samples/s; "
        f"{compiled.steps} steps take {compiled.days:.1f} days, at this bound",
    ]
    exposed = sorted(cost.collectives, key=lambda c: -c.runs * c.exposed)
    lines += ["", "exposed most:"]
    lines += [
        f"  {1e3 * c.runs * c.exposed:6.1f} ms  {c.runs} x {c.kind} of {', '.join(c.shapes)[:60]}, "
        f"{len(c.group)} chips: {c.origin[-70:]}"
        for c in exposed[:_SHOWN]
    ]
    return lines + [f"warning: {text}" for text in warnings(compiled)]


def limit(compiled: Compiled) -> str:
    """The largest part of a step that is not products for valid tokens."""
    useful = compiled.model_flops / compiled.rate
    parts = {
        "recomputation, padding and masked scores": compiled.compute_s - useful,
        "the interconnect": compiled.cost.exposed_interconnect,
        "HBM": compiled.cost.exposed_hbm,
    }
    return max(parts, key=parts.get)


def warnings(compiled: Compiled) -> list[str]:
    """What should not be in a step."""
    traffic, found = compiled.traffic(), []
    least = compiled.minimum.get("all-gather", 0.0)
    gathered = traffic.get("all-gather", (0, 0, 0.0))[2]
    if gathered > _MANY * least and least:
        found.append(f"all-gathers move {gathered / least:.2f} times what they must")
    reduced, must = (
        traffic.get("all-reduce", (0, 0, 0.0))[2],
        compiled.minimum.get("all-reduce", 0.0),
    )
    if compiled.tensor == 1 and reduced > _MANY * must:
        found.append(
            f"all-reduces move {(reduced - must) / _GB:.2f} GB more than they must: gradients that "
            "could be scattered"
        )
    if least and gathered < least / 2:
        found.append(
            "most all-gathers of weights became something else (all-reduce): use a smaller fsdp"
        )
    for collective in compiled.of_activations:
        shapes = ", ".join(collective.shapes)
        found.append(f"{collective.kind} of activations {shapes}: {collective.origin}")
    if compiled.logits:
        found.append("logits of the whole vocabulary are formed: lower runtime.vocab_tile")
    if compiled.rematerialised:
        found.append(f"the partitioner rematerialised {compiled.rematerialised} arrays in full")
    if compiled.peak > compiled.tpu.chip.hbm_bytes:
        found.append("the peak is over the chip's memory")
    return found


def report(plan: Plan, table: Table, tpu: Slice | None) -> dict[str, Any]:
    """The table as JSON."""
    schedule = plan.planned.schedule
    return {
        "topology": tpu.name if tpu else None,
        "slices": tpu.slices if tpu else None,
        "mesh": dict(plan.mesh.shape),
        "batch": {
            "robot_samples": schedule.config.robot_samples,
            "grounding_samples": schedule.config.grounding_samples,
            "sequences": schedule.sequences,
            "tokens": schedule.capacity.tokens,
            "efficiency": schedule.efficiency,
            "lengths": plan.planned.source,
        },
        "notes": list(table.notes),
        "narrow_slices": list(plan.narrow),
        "masked_scores": masked_scores(plan),
        "table_bytes": dict(table.rows),
        "checkpoint_bytes": table.checkpoint,
    }


def compiled_report(plan: Plan, compiled: Compiled) -> dict[str, Any]:
    """What the compiler says as JSON; bytes and seconds of one chip and step."""
    traffic = compiled.traffic()
    return {
        "peak_bytes": compiled.peak,
        "hbm_bytes": compiled.tpu.chip.hbm_bytes,
        "program_flops": compiled.program_flops,
        "model_flops": compiled.model_flops,
        "collectives": {
            kind: {"runs": runs, "asynchronous": hidden, "bytes": size}
            for kind, (runs, hidden, size) in traffic.items()
        },
        "minimum_bytes": dict(compiled.minimum),
        "compute_s": compiled.compute_s,
        "interconnect_s": compiled.cost.interconnect,
        "exposed_interconnect_s": compiled.cost.exposed_interconnect,
        "exposed_hbm_s": compiled.cost.exposed_hbm,
        "step_s": compiled.step_s,
        "bound": compiled.bound,
        "limit": limit(compiled),
        "samples_per_host_s": compiled.samples_per_host,
        "days": compiled.days,
        "compile_s": compiled.seconds,
        "host_bytes": compiled.host_bytes,
        "warnings": warnings(compiled),
    }
