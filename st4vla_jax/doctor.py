"""Looks at a machine, and at what a config asks of it, before a run does.

python -m st4vla_jax.doctor [--config=configs/NAME.py [--config.KEY=VALUE ...]] [--workdir=DIR]
    [--json]

A line for each thing looked at: ok, warn (works, but not as it could) or fail, with what to do.
Exit status 1 if anything fails.  Nothing is written but a file that is removed at once; devices are
tried in a process of their own, so that one that hangs or crashes is a line, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st4vla_jax.train_config import TrainConfig

_PROBE_SECONDS = 300
_GIB = 2**30
_ACCELERATOR_FILES = {
    "an NVIDIA GPU": ("/proc/driver/nvidia/version", "/dev/nvidiactl"),
    "a TPU": ("/dev/accel0", "/dev/vfio/0"),
}
_PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LAUNCHERS = {"SLURM": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
_OPTIONAL = ("wandb",)  # a run works without it


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: ``status`` is "ok", "warn" or "fail", ``advice`` what to do unless it is ok."""

    check: str
    status: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n          -> {self.advice}" if self.advice else ""
        return f"{self.status:<5} {self.check}: {self.text}{advice}"


Findings = Iterator[Finding]

# --- Software -----------------------------------------------------------------------------------


def versions() -> Findings:
    """Python and packages against what setup.py asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        asked = importlib.metadata.requires("st4vla_jax") or []
        python = importlib.metadata.metadata("st4vla_jax")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "fail", "st4vla_jax is not installed", "pip install .")
        return
    own = platform.python_version()
    fits = SpecifierSet(python).contains(own, prereleases=True)
    advice = "" if fits else "make the virtual environment with another python3"
    yield Finding("python", "ok" if fits else "fail", f"{own} (needs {python})", advice)
    # jax itself says which jaxlib it goes with.
    asked += [r for r in importlib.metadata.requires("jax") or [] if r.startswith("jaxlib")]
    for text in asked:
        requirement = Requirement(text)
        if requirement.marker is None:
            yield _package(requirement)


def _package(requirement: Any) -> Finding:
    name, needs = requirement.name, str(requirement.specifier)
    bad = "warn" if name in _OPTIONAL else "fail"
    advice = f"pip install '{name}{needs}'"
    try:
        own = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, bad, f"not installed (needs {needs})", advice)
    if requirement.specifier.contains(own, prereleases=True):
        return Finding(name, "ok", f"{own} (needs {needs})")
    return Finding(name, bad, f"{own} (needs {needs})", advice)


# --- Machine ------------------------------------------------------------------------------------


def devices(timeout_s: int = _PROBE_SECONDS) -> Findings:
    """Every device of this machine by a small matrix product, in a process of its own."""
    code = "from st4vla_jax import doctor; doctor.probe_devices()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "devices", "fail", f"no answer within {timeout_s} s",
            "another process may hold them, or this is one host of a TPU pod whose other hosts do "
            "not run: start doctor on all of them",
        )  # fmt: skip
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        advice = "run python -c 'import jax; jax.devices()' to see all of it"
        yield Finding("devices", "fail", f"jax finds none: {last[:300]}", advice)
        return
    found = json.loads(lines[-1])
    for device in found["devices"]:
        memory = f", {device['limit'] / _GIB:.1f} GiB" if device["limit"] else ""
        name = f"device {device['id']}"
        text = f"{device['kind']} ({found['backend']}{memory})"
        if device["error"]:
            yield Finding(name, "fail", f"{text}: {device['error']}", "restart or leave it out")
        else:
            yield Finding(name, "ok", f"{text}, matrix product correct in {device['ms']:.0f} ms")
    yield from _backend(found["backend"], {d["kind"] for d in found["devices"]})


def probe_devices() -> None:
    """Prints what `devices` reads, as JSON: a product on each device and how long it took."""
    import time

    import jax
    import numpy as np

    from st4vla_jax.flops import PEAK_FLOPS

    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (256, 256)).astype(np.float32) for _ in range(2))
    found = []
    for device in jax.local_devices():
        entry = {"id": device.id, "kind": device.device_kind, "limit": 0, "error": "", "ms": 0.0}
        try:
            entry["limit"] = (device.memory_stats() or {}).get("bytes_limit", 0)
            x, y = (jax.device_put(m, device).astype("bfloat16") for m in (a, b))
            product = jax.jit(lambda x, y: jax.numpy.dot(x, y, preferred_element_type="float32"))
            jax.block_until_ready(product(x, y))
            start = time.perf_counter()
            result = jax.block_until_ready(product(x, y))
            entry["ms"] = (time.perf_counter() - start) * 1e3
            # Small integers: exact in bf16, and their sums in f32.
            if not np.array_equal(np.asarray(result), a @ b):
                entry["error"] = "its matrix product is wrong"
        except Exception as error:  # noqa: BLE001 (whatever a device says is the finding)
            entry["error"] = str(error).partition("\n")[0][:300]
        found.append(entry | {"peak": PEAK_FLOPS.get(device.device_kind)})
    print(json.dumps({"backend": jax.default_backend(), "devices": found}))


def _backend(backend: str, kinds: set[str]) -> Findings:
    """Hardware that jax does not use, and libraries for it."""
    from st4vla_jax.flops import PEAK_FLOPS

    expected = {"an NVIDIA GPU": ("gpu", "cuda"), "a TPU": ("tpu", "tpu")}
    for name, files in _ACCELERATOR_FILES.items():
        wanted, extra = expected[name]
        there = any(Path(file).exists() for file in files)
        if there and backend != wanted:
            advice = f"pip install '.[{extra}]', and look at JAX_PLATFORMS"
            yield Finding("backend", "warn", f"{name} is there, but jax uses {backend}", advice)
    for package in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    unknown = sorted(kinds - PEAK_FLOPS.keys()) if backend != "cpu" else []
    for kind in unknown:
        text = f"the peak of {kind!r} is not known: MFU is not reported"
        yield Finding("backend", "warn", text, "add it to PEAK_FLOPS in st4vla_jax/flops.py")


def processes() -> Findings:
    """Settings of a run of several processes."""
    values = {name: os.environ.get(name) for name in _PROCESS_VARIABLES}
    given = [name for name, value in values.items() if value]
    launcher = [n for n, v in _LAUNCHERS.items() if int(os.environ.get(v) or 1) > 1]
    if not given:
        text = f"several, started by {launcher[0]}" if launcher else "one (no settings of more)"
        yield Finding("processes", "ok", text)
        return
    problems = [f"{name} is not set" for name in values if name not in given]
    count, index = (values[name] or "" for name in _PROCESS_VARIABLES[1:])
    if not problems and not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        problems.append(f"process {index} of {count} makes no sense")
    host = (values[_PROCESS_VARIABLES[0]] or "").rpartition(":")[0]
    if host:
        try:
            socket.getaddrinfo(host.strip("[]"), None)
        except OSError as error:
            problems.append(f"the coordinator's host {host!r} is not found ({error})")
    if problems:
        advice = f"set all of {', '.join(_PROCESS_VARIABLES)}, or none"
        yield Finding("processes", "fail", "; ".join(problems), advice)
    else:
        yield Finding("processes", "ok", f"process {index} of {count}, coordinator at {host}")


def usable_cores() -> int:
    """Cores that this process may run on; all of the host where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host(config: TrainConfig | None) -> Findings:
    """Cores, reader threads and memory of the host."""
    cores = usable_cores()
    threads = config.data.threads if config else 0
    text = f"{cores} cores" + (f" for {threads} reader threads (data.threads)" if config else "")
    if config and threads > 8 * cores:
        yield Finding("cores", "warn", text, f"set data.threads to about {2 * cores}")
    else:
        yield Finding("cores", "ok", text)
    total, free = _memory()
    if total:
        low = free < 4 * _GIB
        yield Finding(
            "memory", "warn" if low else "ok",
            f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free",
            "end other programs, or use a smaller data.threads and model" if low else "",
        )  # fmt: skip


def _memory() -> tuple[int, int]:
    """Bytes in all and free, within the container's limit; (0, 0) where that is not told."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return 0, 0
    text = path.read_text()
    total, free = (
        int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024
        for name in ("MemTotal", "MemAvailable")
    )
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        allowed = int(limit.read_text())
        total, free = min(total, allowed), min(free, allowed - int(used.read_text()))
    return total, free


def folder(name: str, path: Path, needed: int = 0) -> Findings:
    """Whether a folder, there or to be made, can be written, and has ``needed`` bytes free."""
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".st4vla_doctor"):
            pass
    except OSError as error:
        text = f"{there}: cannot be written ({error.strerror or error})"
        yield Finding(name, "fail", text, "choose another folder, or change its permissions")
        return
    free = shutil.disk_usage(there).free
    text = f"{path}: can be written, {free / _GIB:.1f} GiB free"
    text += f" (needed: about {needed / _GIB:.1f} GiB)" if needed else ""
    if free < max(needed, _GIB):
        yield Finding(name, "warn", text, "make room, or set checkpoint.keep_last lower")
    else:
        yield Finding(name, "ok", text)


# --- Command line -------------------------------------------------------------------------------


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """A config file with its overrides, as ``--config=FILE --config.KEY=VALUE``.

    Raises:
      ValueError, OSError, SyntaxError: the file or a key cannot be used, all problems at once.
    """
    from absl import flags
    from ml_collections import config_flags

    from st4vla_jax.train_config import TrainConfig

    own, argv = flags.FlagValues(), ["doctor", *arguments]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=own, sys_argv=argv)
    try:
        own(argv)
    except flags.Error as error:
        raise ValueError(str(error)) from error
    return TrainConfig.from_dict(own["config"].value)


def look(check: str, findings: Callable[[], Findings]) -> Findings:
    """What is found; a check that breaks is a finding, too."""
    try:
        yield from findings()
    except Exception as error:  # noqa: BLE001 (doctor must come to its end)
        text = str(error).replace("\n", "\n          ")
        yield Finding(check, "fail", f"{type(error).__name__}: {text}", "see the message")


def examine(arguments: Sequence[str], workdir: Path | None) -> Findings:
    """All findings, in the order in which they are printed."""
    yield from look("packages", versions)
    yield from look("devices", devices)
    yield from look("processes", processes)
    config = None
    os.environ["JAX_PLATFORMS"] = "cpu"  # what follows only counts: it must not take the devices
    if arguments:
        try:
            config = read_config(arguments)
            yield Finding("config", "ok", f"{config.steps} steps")
        except Exception as error:  # noqa: BLE001 (a config file may raise anything)
            text = str(error).replace("\n", "\n          ")
            yield Finding("config", "fail", text, "correct it; what it asks for is not looked at")
    yield from look("host", lambda: host(config))
    if config is not None:
        from st4vla_jax import doctor_config

        yield from look("config", lambda: doctor_config.examine(config, workdir))
    elif workdir is not None:
        yield from look("workdir", lambda: folder("workdir", workdir))


def main(argv: list[str] | None = None) -> int:
    """Prints the findings; returns 1 if one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.doctor", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args, rest = parser.parse_known_args(argv)
    strange = [a for a in rest if not re.match(r"--config[=.]", a)]
    if strange:
        parser.error(f"unknown: {' '.join(strange)} (write --config=FILE, --config.KEY=VALUE)")
    found = []
    for finding in examine(rest, args.workdir):
        found.append(finding)
        if not args.json:
            print(finding, flush=True)
    counts = {s: sum(f.status == s for f in found) for s in ("ok", "warn", "fail")}
    if args.json:
        print(json.dumps([dataclasses.asdict(f) for f in found], indent=2))
    else:
        print(", ".join(f"{number} {status}" for status, number in counts.items()))
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
