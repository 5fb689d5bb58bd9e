"""Says what a run needs before anything is rented: memory, interconnect, speed.

python -m st4vla_jax.plan --config=configs/NAME.py [--mesh=DATA,FSDP,TENSOR]
    [--topology=v5p:4x4x4|v5p-128] [--slices=N] [--nocompile | --usual] [--xla=NAME=VALUE ...]
    [--json] [--config.KEY=VALUE ...]

Without a topology a table from shapes, in seconds.  With one, the very step that training runs is
compiled for that slice by the TPU compiler (libtpu, the [tpu] extra), on this machine's CPU, in
about five minutes of one core at 3B; --nocompile leaves it at the table, --usual compares the
memory with that of the usual step (plan_naive.py) instead.  launch/env.sh's TPU flags are compiled
with, and --xla adds to them.  Neither data nor weights are needed: where the config's data sets are
absent, their samples are taken to be as long as the paper's.  Exit status: 0, or 1 where it does
not fit or cannot run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Sequence

import jax
from absl import app, flags
from ml_collections import config_flags

from st4vla_jax.chips import TopologyError, parse_slice, slice_devices
from st4vla_jax.config import ConfigError
from st4vla_jax.plan_advice import advice
from st4vla_jax.plan_compile import CompileError, OutOfMemoryError, compile_plan, launch_flags
from st4vla_jax.plan_naive import peak_lines, peaks
from st4vla_jax.plan_report import compiled_lines, compiled_report, report, table_lines
from st4vla_jax.plan_setup import make_plan, mesh_config
from st4vla_jax.plan_table import memory_table
from st4vla_jax.train_config import TrainConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "slice, as v5p:4x4x4, v5p-128 or v5e-64")
_MESH = flags.DEFINE_string("mesh", None, "DATA,FSDP,TENSOR in place of the config's mesh")
_SLICES = flags.DEFINE_integer("slices", 1, "slices joined by the data-centre network")
_COMPILE = flags.DEFINE_bool("compile", True, "with --topology: compile the step")
_XLA = flags.DEFINE_multi_string("xla", [], "NAME=VALUE, an option of the TPU compiler")
_USUAL = flags.DEFINE_bool("usual", False, "compile the usual step's memory beside ours, no more")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    jax.config.update("jax_platforms", "cpu")  # planning must not take a machine's own devices
    jax.config.update("jax_enable_compilation_cache", False)  # cannot be read back here
    logging.getLogger("st4vla_jax").setLevel(logging.ERROR)  # the table says what is padding
    try:
        return _plan()
    except (ConfigError, TopologyError, CompileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _plan() -> int:
    config = mesh_config(TrainConfig.from_dict(_CONFIG.value), _MESH.value)
    tpu = parse_slice(_TOPOLOGY.value, _SLICES.value) if _TOPOLOGY.value else None
    if tpu and (_COMPILE.value or _USUAL.value):
        plan = make_plan(config, slice_devices(tpu))
    else:  # a table needs no libtpu
        plan = make_plan(config, tpu.chips if tpu else _devices(config))
    table = memory_table(plan)
    if tpu and _USUAL.value:
        found = peaks(plan, tpu, launch_flags(tpu.chip) | _options(_XLA.value))
        print(*([json.dumps(found)] if _JSON.value else peak_lines(found)), sep="\n")
        return 0
    say = (lambda lines: None) if _JSON.value else (lambda lines: print(*lines, sep="\n"))
    say(table_lines(plan, table, tpu))
    compiled, refusal = None, ""
    if tpu and _COMPILE.value:
        try:
            compiled = compile_plan(plan, tpu, launch_flags(tpu.chip) | _options(_XLA.value))
        except OutOfMemoryError as error:
            refusal = str(error)
    if compiled:
        say(compiled_lines(plan, compiled))
    elif refusal:
        say(
            [
                "",
                refusal,
                "what would help, by the table:",
                *map("  {}".format, advice(plan, table)),
            ]
        )
    if _JSON.value:
        found = report(plan, table, tpu) | {"does_not_fit": refusal or None}
        found["advice"] = list(map(str, advice(plan, table))) if refusal else []
        found["compiled"] = compiled and compiled_report(plan, compiled)
        print(json.dumps(found, indent=2))
    return 1 if refusal else 0


def _devices(config: TrainConfig) -> int:
    """As many as the mesh names; an axis of -1 has one."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return math.prod(size for size in sizes if size > 0)


def _options(texts: Sequence[str]) -> dict[str, str]:
    """Reads NAME=VALUE."""
    bad = [text for text in texts if "=" not in text]
    if bad:
        raise ConfigError(f"--xla={bad[0]}: give NAME=VALUE")
    return dict(text.removeprefix("--").split("=", 1) for text in texts)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
