"""Says what a run needs before anything is rented: memory, interconnect, speed.

python -m st4vla_jax.plan --config=configs/NAME.py [--mesh=DATA,FSDP,TENSOR]
    [--topology=v5p:4x4x4|v5p-128] [--slices=N] [--nocompile] [--xla=NAME=VALUE ...] [--json]
    [--config.KEY=VALUE ...]

Without a topology a table from shapes, in seconds.  With one, the very step that training runs is
compiled for that slice by the TPU compiler (libtpu, the [tpu] extra), on this machine's CPU, in one
to two minutes at 3B; --nocompile leaves it at the table.  launch/env.sh's TPU flags are compiled
with, and --xla adds to them.  Neither data nor weights are needed: where the config's data sets are
absent, their samples are taken to be as long as the paper's.  Exit status: 0, or 1 where it does
not fit or cannot run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from st4vla_jax.chips import GIB, Slice, TopologyError, parse_slice, slice_devices
from st4vla_jax.config import ConfigError
from st4vla_jax.plan_setup import LANES, Plan, make_plan, parse_mesh
from st4vla_jax.plan_table import Table, memory_table
from st4vla_jax.train_config import TrainConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "slice, as v5p:4x4x4, v5p-128 or v5e-64")
_MESH = flags.DEFINE_string("mesh", None, "DATA,FSDP,TENSOR in place of the config's mesh")
_SLICES = flags.DEFINE_integer("slices", 1, "slices joined by the data-centre network")
_COMPILE = flags.DEFINE_bool("compile", True, "with --topology: compile the step")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    jax.config.update("jax_platforms", "cpu")  # planning must not take a machine's own devices
    logging.getLogger("st4vla_jax").setLevel(logging.ERROR)  # the table says what is padding
    try:
        return _plan()
    except (ConfigError, TopologyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _plan() -> int:
    config = TrainConfig.from_dict(_CONFIG.value)
    if _MESH.value:
        mesh = parse_mesh(_MESH.value, config.mesh.rules)
        config = dataclasses.replace(config, mesh=mesh)
    tpu = parse_slice(_TOPOLOGY.value, _SLICES.value) if _TOPOLOGY.value else None
    plan = make_plan(config, slice_devices(tpu) if tpu else _devices(config))
    table = memory_table(plan)
    if _JSON.value:
        print(json.dumps(_object(plan, table, tpu), indent=2))
    else:
        print("\n".join(table_lines(plan, table, tpu)))
    return 0


def _devices(config: TrainConfig) -> int:
    """As many as the mesh names; an axis of -1 has one."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return math.prod(size for size in sizes if size > 0)


def table_lines(plan: Plan, table: Table, tpu: Slice | None) -> list[str]:
    """The table for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.shape.items())
    where = f"{tpu.name}, {tpu.chips} chips" if tpu else f"{plan.mesh.size} device(s)"
    lines = [f"{where}, mesh {mesh}", *table.notes, "", "a device, from shapes (GiB):"]
    lines += [f"  {name:<42}{size / GIB:9.2f}" for name, size in table.rows.items()]
    limit = f"of {tpu.chip.hbm_bytes / GIB:.2f}" if tpu else ""
    lines.append(f"  {'about':<42}{table.total / GIB:9.2f} {limit}".rstrip())
    lines.append(f"a checkpoint: {table.checkpoint / 1e9:.1f} GB")
    if plan.narrow:
        lines.append(f"slices under {LANES} lanes: {', '.join(plan.narrow)}")
    return lines


def _object(plan: Plan, table: Table, tpu: Slice | None) -> dict[str, Any]:
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
        "table_bytes": dict(table.rows),
        "checkpoint_bytes": table.checkpoint,
    }


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
