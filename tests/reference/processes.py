"""Real processes that join over 127.0.0.1, each with two CPU devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Processes:
    """Runs ``python -c script args...`` N times; killed at the end of the with block."""

    def __init__(self, script: str, count: int, args: Sequence[str], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._logs = [folder / f"process{i}.log" for i in range(count)]
        self._processes = []
        for i, log in enumerate(self._logs):
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            }
            with log.open("w") as out:
                command = [sys.executable, "-u", "-c", script, *map(str, args)]
                self._processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
                )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def log(self, i: int) -> str:
        return self._logs[i].read_text(errors="replace")

    def await_line(self, text: str, timeout: float = 90) -> None:
        """Until every process has printed ``text``."""
        deadline = time.monotonic() + timeout
        while not all(text in self.log(i) for i in range(len(self._processes))):
            for i, process in enumerate(self._processes):
                assert process.poll() is None, self.log(i)
            assert time.monotonic() < deadline, [self.log(i) for i in range(len(self._logs))]
            time.sleep(0.05)

    def signal(self, i: int, number: int) -> None:
        self._processes[i].send_signal(number)

    def codes(self, timeout: float = 90) -> list[int]:
        """Exit codes, when all have ended."""
        deadline = time.monotonic() + timeout
        return [p.wait(max(deadline - time.monotonic(), 1)) for p in self._processes]
