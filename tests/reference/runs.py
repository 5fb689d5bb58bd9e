"""Whole training runs at the smallest size: data, command line, comparison of what they wrote."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from st4vla_jax.metrics import is_wall_clock, read_metrics
from st4vla_jax.tabletop.dataset import write_dataset
from st4vla_jax.tabletop.words import FOLDER

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SMALL = {
    "steps": STEPS, "save_every": 2, "log.every": 1, "evaluation.every": 0,
    "evaluation.diagnostics": 0, "loss.repeats": 1, "data.schedule.robot_samples": 2,
    "data.schedule.grounding_samples": 2, "data.schedule.tokens": 256,
    "data.schedule.window": 4, "data.schedule.multiple": 4, "data.image.size": "(56,56)",
    "data.image.max_pixels": 3136, "optim.warmup": 2,
    "log.tensorboard": False, "model.dino": "tiny", "model.dit": "tiny",
}  # fmt: skip


def make_data(folder: Path) -> Path:
    """A tabletop data set of a few episodes and records."""
    write_dataset(folder, episodes=8, grounding=32, image_size=56)
    return folder


def arguments(
    data: Path, workdir: Path, cache: Path, *extra: str, config="configs/tabletop.py", **settings
) -> list[str]:
    """Command line of a small stage-2 run; settings by dotted name override `SMALL`."""
    paths = {
        "data.tokenizer": data / FOLDER,
        "data.sets.tabletop.path": data / "tabletop/1.0.0",
        "data.sets.grounding.path": data / "grounding/records.jsonl",
        "data.sets.grounding.images": data / "grounding",
        "log.cache_dir": cache,
    }
    values = SMALL | paths | settings
    return [
        f"--config={config}:stage2", f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()), *extra,
    ]  # fmt: skip


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    flags += " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    return os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_LOG_COMPILES": "1",
    }  # fmt: skip


def start(args: list[str], devices: int = 1, **more) -> subprocess.Popen:
    """The real command in a process of its own; ``more`` goes to Popen.

    Output goes to a file: a pipe that nobody reads would stop the process.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "st4vla_jax.train", *args],
            cwd=ROOT, env=environment(devices), stdout=out, stderr=out, **more,
        )  # fmt: skip
    process.log = Path(out.name)
    return process


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    """(exit status, output)."""
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"no end within {timeout} s:\n{process.log.read_text()}") from None
    output = process.log.read_text()
    process.log.unlink()
    return status, output


def run(args: list[str], devices: int = 1, **more) -> tuple[int, str]:
    return finish(start(args, devices, **more))


def wait_until(condition, processes, timeout: float = 300) -> None:
    """Until ``condition()``, while all processes run; fails with the output of one that ended."""
    deadline = time.monotonic() + timeout
    while not condition():
        for process in processes:
            assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.01)


def joining(number: int, count: int, port: int) -> list[str]:
    """Flags of process ``number`` of a run of ``count``."""
    return [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={number}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def together(args: list[str], count: int, devices: int, own: dict[int, list[str]] | None = None):
    """The command in ``count`` processes; ``own``: more flags of some.  Killed at the end."""
    port = free_port()
    processes = [
        start([*args, *joining(i, count, port), *(own or {}).get(i, ())], devices)
        for i in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@functools.cache
def place(base: Path):
    """(folder, (name, extra flags, settings) -> arguments) with data and a compile cache.

    Cached by pytest's folder of this session: both files of whole runs share them.
    """
    folder = base / "runs"
    data = make_data(folder / "data")
    return folder, lambda name, *extra, **settings: arguments(
        data, folder / name, folder / "cache", *extra, **settings
    )


@functools.cache
def whole(base: Path) -> tuple[Path, str]:
    """Workdir and output of the uninterrupted run that others are compared with."""
    folder, args = place(base)
    status, output = run(args("whole", save_every=1, **{"checkpoint.keep_last": 9}))
    assert status == 0, output
    return folder / "whole", output


def steps_of(workdir: Path) -> list[str]:
    return sorted(p.name for p in (workdir / "checkpoints").glob("[0-9]*"))


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by item and path."""
    folder = workdir / "checkpoints" / f"{step:08d}"
    handler, found = ocp.PyTreeCheckpointHandler(), {}
    for item in ("params", "opt_state", "ema"):
        if item == "ema" and not (folder / item).is_dir():
            continue
        tree = handler.metadata(folder / item).tree
        args = jax.tree.map(
            lambda _: ocp.RestoreArgs(np.ndarray), tree, is_leaf=lambda x: hasattr(x, "shape")
        )
        restored = handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=args))
        for keys, value in jax.tree_util.tree_leaves_with_path(restored):
            path = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
            found[f"{item}/{path}"] = np.asarray(value)
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
