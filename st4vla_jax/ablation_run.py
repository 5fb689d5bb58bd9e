"""Runs jobs in order, or chains of them side by side; what is done is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

from st4vla_jax.ablation_rows import CACHE, AblationError, Job
from st4vla_jax.data.tfds_write import write_json
from st4vla_jax.distributed import RESTART_EXIT_CODE

SETTINGS = "settings.json"
DONE = "done"  # folder with a file for each finished job
LOGS = "logs"

_ROOT = Path(__file__).resolve().parents[1]  # configs/ lies here
_TAIL = 12  # lines of a failed job's output that the error shows
_GRACE_S = 120.0  # a training run saves its state when it is told to stop
_POLL_S = 0.5
# A GPU is shared: the first process would take most of its memory.
_SIDE_BY_SIDE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class StoppedError(RuntimeError):
    """A job was told to stop and has saved its state; the same command goes on."""


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Notes the settings of an ablation in its folder, or compares them with those there.

    Raises:
      AblationError: other settings, or a folder with something else in it.
    """
    path = out / SETTINGS
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise AblationError(f"{out}: not empty, and no ablation; give another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(settings))
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(settings))  # tuples as lists
    differ = [
        f"{key}: {there.get(key)} there, {asked.get(key)} asked for"
        for key in sorted(there.keys() | asked.keys())
        if there.get(key) != asked.get(key)
    ]
    if differ:
        raise AblationError(
            "\n  ".join([f"{out}: made with other settings; give another --out", *differ])
        )


def run_chains(
    out: Path,
    chains: Sequence[Sequence[Job]],
    at_once: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """`run_jobs` for each chain, ``at_once`` of them at a time; the first error stops all.

    Raises:
      AblationError, StoppedError: see `run_jobs`.
    """
    stop = threading.Event()
    more = _SIDE_BY_SIDE if at_once > 1 else {}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            running = [pool.submit(run_jobs, out, chain, say, stop, more) for chain in chains]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
        finally:  # a signal too: children end in order before this returns
            stop.set()
            pool.shutdown(cancel_futures=True)
    failed = [f for f in running if not f.cancelled() and f.exception()]
    for future in sorted(failed, key=lambda f: f not in done):
        raise future.exception()


def run_jobs(
    out: Path,
    jobs: Iterable[Job],
    say: Callable[[str], None] = print,
    stop: threading.Event | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Runs the jobs that are not done; each one's output goes to OUT/logs.

    Args:
      out: folder of the ablation.
      jobs: in order.
      say: takes lines for people.
      stop: ends the running job when it is set.
      environment: of the jobs, where nothing else is set.

    Raises:
      AblationError: a job failed; the message has the end of its output.
      StoppedError: a job was told to stop.
    """
    stop = stop or threading.Event()
    for job in jobs:
        if seconds(out, job.name) is not None:
            say(f"{job.name}: done already")
            continue
        log = out / LOGS / f"{_file(job.name)}.log"
        log.parent.mkdir(exist_ok=True)
        say(f"{job.name}: {' '.join(job.command[1:])}")
        took = _run(job, out, log, stop, environment) + _before(out, job.name)
        write_json(_marker(out, job.name), {"command": list(job.command), "seconds": took})
        say(f"{job.name}: {took:.0f} s")


def seconds(out: Path, name: str) -> float | None:
    """Wall time of a finished job, all its starts together; None if it is not finished."""
    marker = _marker(out, name)
    return json.loads(marker.read_text(encoding="utf-8"))["seconds"] if marker.is_file() else None


def _run(
    job: Job, out: Path, log: Path, stop: threading.Event, environment: Mapping[str, str]
) -> float:
    """Runs one job to its end; returns its seconds, which are kept if it does not get there."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(out / CACHE), "PYTHONUNBUFFERED": "1", **environment}
    start, finished = time.monotonic(), False
    with open(log, "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            job.command, cwd=_ROOT, env=own | os.environ, stdout=output, stderr=output
        )
        try:
            while (status := process.poll()) is None and not stop.wait(_POLL_S):
                pass
            finished = status == 0
        finally:  # Ctrl-C or a signal: training saves its state
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            took = time.monotonic() - start
            if not finished:
                write_json(_unfinished(out, job.name), {"seconds": took + _before(out, job.name)})
    if status in (None, RESTART_EXIT_CODE):
        raise StoppedError(f"{job.name} was told to stop; the same command goes on")
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        raise AblationError(
            "\n  ".join([f"{job.name}: exit status {status}; the end of {log}:", *tail])
        )
    return took


def _before(out: Path, name: str) -> float:
    """Seconds of a job's earlier starts."""
    path = _unfinished(out, name)
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else 0.0


def _marker(out: Path, name: str) -> Path:
    return _made(out / DONE) / f"{_file(name)}.json"


def _unfinished(out: Path, name: str) -> Path:
    return _made(out / DONE) / f"{_file(name)}.unfinished"


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _file(name: str) -> str:
    return name.replace("/", "_")
