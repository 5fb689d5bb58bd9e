"""Whole training runs at the smallest size: data, command line, comparison of what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from st4vla_jax.checkpoint import iter_params
from st4vla_jax.metrics import is_wall_clock, read_metrics
from st4vla_jax.tabletop.dataset import write_dataset

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SMALL = {
    "steps": STEPS, "save_every": 2, "log.every": 1, "evaluation.every": 0,
    "evaluation.diagnostics": 0, "loss.repeats": 1, "data.schedule.robot_samples": 4,
    "data.schedule.grounding_samples": 4, "data.schedule.tokens": 384, "data.schedule.views": 1,
    "data.schedule.window": 4, "data.image.size": "(56,56)", "data.image.max_pixels": 3136,
    "data.sets.tabletop.views": "('primary',)", "optim.warmup": 2, "log.tensorboard": False,
}  # fmt: skip


def make_data(folder: Path) -> Path:
    """A tabletop data set of a few episodes and records."""
    write_dataset(folder, episodes=8, grounding=32, image_size=56)
    return folder


def arguments(data: Path, workdir: Path, cache: Path, *extra: str, **settings) -> list[str]:
    """Command line of a small stage-2 run; settings by dotted name override `SMALL`."""
    paths = {
        "data.sets.tabletop.path": data / "tabletop/1.0.0",
        "data.sets.grounding.path": data / "grounding/records.jsonl",
        "data.sets.grounding.images": data / "grounding",
        "log.cache_dir": cache,
    }
    values = SMALL | paths | settings
    return [
        "--config=configs/tabletop.py:stage2", f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()), *extra,
    ]  # fmt: skip


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    flags += " --xla_llvm_disable_expensive_passes=true"
    return os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


def start(args: list[str], devices: int = 1) -> subprocess.Popen:
    """The real command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "st4vla_jax.train", *args], cwd=ROOT, env=environment(devices),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    """(exit status, output)."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout} s:\n{output}") from None
    return process.returncode, output


def run(args: list[str], devices: int = 1) -> tuple[int, str]:
    return finish(start(args, devices))


def steps_of(workdir: Path) -> list[str]:
    return sorted(p.name for p in (workdir / "checkpoints").glob("[0-9]*"))


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Everything a checkpoint holds, by path."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / f"{step:08d}"
    found = {f"params/{path}": value for path, value in iter_params(folder)}
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder / "opt_state").tree
    args = jax.tree.map(
        lambda _: ocp.RestoreArgs(np.ndarray), tree, is_leaf=lambda x: hasattr(x, "shape")
    )
    restored = handler.restore(folder / "opt_state", args=ocp.args.PyTreeRestore(restore_args=args))
    for keys, value in jax.tree_util.tree_leaves_with_path(restored):
        found["opt_state/" + jax.tree_util.keystr(keys)] = np.asarray(value)
    return found


def same_arrays(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    """Bitwise."""
    assert first.keys() == second.keys()
    different = [path for path in first if not np.array_equal(first[path], second[path])]
    assert not different, different


def numbers(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    return [
        {k: v for k, v in line.items() if k != "time" and not is_wall_clock(k)}
        for line in read_metrics(workdir)
    ]


def record(workdir: Path, step: int) -> dict:
    path = workdir / "checkpoints" / f"{step:08d}" / "meta" / "train.json"
    return json.loads(path.read_text())
