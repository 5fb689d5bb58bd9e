"""Compiles the presets of configs/tpu.py, each for its slice, and prints them as a table.

python -m st4vla_jax.plan_presets --out=presets.json [NAME ...]

Each runs in a process of its own (`python -m st4vla_jax.plan`), one after the other.  Results are
written after each one, and those that the file has already are not compiled again.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from configs.tpu import PRESETS
from st4vla_jax.chips import GIB

_OUT = flags.DEFINE_string("out", None, "JSON file of results, by name", required=True)
_LIMIT_S = flags.DEFINE_integer("limit_s", 1800, "seconds that one preset may take")
_COLUMNS = (
    "preset", "slice", "mesh", "samples", "sequences x T", "peak HBM, GiB", "moved, GB", "bound",
    "samples/s", "CPU s, GiB",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status: 1 where a preset failed."""
    names = argv[1:] or list(PRESETS)
    if unknown := [name for name in names if name not in PRESETS]:
        print(f"error: no preset {', '.join(unknown)}; there are {', '.join(PRESETS)}")
        return 1
    out = Path(_OUT.value)
    found = json.loads(out.read_text()) if out.exists() else {}
    for name in names:
        if name not in found:
            found[name] = compile_preset(name, _LIMIT_S.value)
            out.write_text(json.dumps(found, indent=1))
    print(*table([name for name in names if name in found], found), sep="\n")
    return int(any("error" in found[name] for name in names))


def compile_preset(name: str, limit_s: float) -> dict[str, Any]:
    """The plan's JSON of one preset, with the CPU seconds that it took; or {"error": ...}."""
    topology, slices, *_ = PRESETS[name]
    command = [
        sys.executable, "-m", "st4vla_jax.plan", f"--config=configs/tpu.py:{name}",
        f"--topology={topology}", f"--slices={slices}", "--json",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {limit_s} s"}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not done.stdout.startswith("{"):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found = json.loads(done.stdout)
    if not found["compiled"]:
        return {"error": found["does_not_fit"]}
    return found | {"cpu_s": after.ru_utime - before.ru_utime}


def table(names: list[str], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    return lines + [f"| {' | '.join(_row(name, found[name]))} |" for name in names]


def _row(name: str, plan: Mapping[str, Any]) -> list[str]:
    topology, slices, mesh, samples, *_ = PRESETS[name]
    where = topology if slices == 1 else f"{slices} x {topology}"
    row = [name, where, " x ".join(map(str, mesh)), " + ".join(map(str, samples))]
    if "error" in plan:
        return [*row, plan["error"], *[""] * (len(_COLUMNS) - len(row) - 1)]
    compiled, batch = plan["compiled"], plan["batch"]
    moved = sum(kind["bytes"] for kind in compiled["collectives"].values())
    return [
        *row,
        f"{batch['sequences']} x {batch['tokens']}",
        f"{compiled['peak_bytes'] / GIB:.1f} of {compiled['hbm_bytes'] / GIB:.1f}",
        f"{moved / 1e9:.1f}",
        f"{100 * compiled['bound']:.0f} %",
        f"{sum(samples) / compiled['step_s']:.0f}",
        f"{plan['cpu_s']:.0f}, {compiled['host_bytes'] / GIB:.1f}",
    ]


if __name__ == "__main__":
    app.run(main)
