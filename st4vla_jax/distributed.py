"""Several processes as one run: start, agreement, batches, preemption, and ending together.

All of it works in a single process too, where most of it has nothing to do.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from st4vla_jax.sharding import Rules, batch_shards

RESTART_EXIT_CODE = 75  # EX_TEMPFAIL: a launcher runs the same command again
HEARTBEAT_S = 20  # a process not heard of for so long is dead; jax's own default is 100
_AGREEMENT_S = 300  # processes of one job start at different times
_COMPILE_S = 3600  # one may find its program in the cache while another compiles it
_LINGER_S = 5
_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# What a collective says when the process at its other end is gone, as JaxRuntimeError or as
# ValueError.  Not left to the heartbeat: a process that is back at once is never missed.
_LOST_PEER = re.compile(r"\bGloo\b.* failed|remote process exited")  # CPU, NCCL
_LOG = logging.getLogger(__name__)
_rounds = itertools.count()
# What abort() does belongs to the process: the C handler, kept from being collected, and its code.
_abort: dict[str, Any] = {"code": RESTART_EXIT_CODE}


class DistributedError(RuntimeError):
    """The processes of a run cannot work together; names the process and what is wrong."""


# --- Start --------------------------------------------------------------------------------------


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_s: int = HEARTBEAT_S,
) -> None:
    """Joins the processes of this run; to be called before any device is used.

    Each argument falls back to its environment variable (JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES, JAX_PROCESS_ID).  With none of them, jax finds out under SLURM (srun), Open
    MPI and on TPU hosts; elsewhere this is a run of one process.

    From then on, when a process dies the others end with RESTART_EXIT_CODE: at once, or when the
    heartbeat is missed.

    Args:
      coordinator: "HOST:PORT" of process 0, the same for all.
      num_processes: of the run.
      process_id: of this one, 0 to num_processes - 1.
      heartbeat_s: seconds after which a silent process counts as dead.

    Raises:
      DistributedError: some of the three are given but not all, or they make no sense.
    """
    values = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, variable in _VARIABLES.items():
        if values[name] is None:
            values[name] = os.environ.get(variable)
    given = [name for name, value in values.items() if value is not None]
    if given:
        _check_explicit(values)
    elif _launcher() is None:
        return
    else:
        _LOG.info("processes started by %s", _launcher())
    _end_on_abort()
    if given:
        jax.distributed.initialize(
            str(values["coordinator"]),
            int(values["num_processes"]),
            int(values["process_id"]),
            heartbeat_timeout_seconds=heartbeat_s,
        )
    else:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_s)
    _LOG.info("process %d of %d", jax.process_index(), jax.process_count())


def _check_explicit(values: Mapping[str, Any]) -> None:
    """Raises DistributedError unless all three are there and fit."""
    problems = [
        f"{name} is not given: --{name} or {_VARIABLES[name]}"
        for name, value in values.items()
        if value is None
    ]
    numbers = {}
    for name in ("num_processes", "process_id"):
        try:
            numbers[name] = int(values[name]) if values[name] is not None else None
        except ValueError:
            problems.append(f"{name} {values[name]!r} is no number")
    coordinator = values["coordinator"]
    if coordinator is not None and not str(coordinator).rpartition(":")[2].isdigit():
        problems.append(f"coordinator {coordinator!r}: need HOST:PORT")
    count, index = numbers.get("num_processes"), numbers.get("process_id")
    if count is not None and count < 1:
        problems.append(f"num_processes {count}: need at least 1")
    elif count is not None and index is not None and not 0 <= index < count:
        problems.append(f"process_id {index}: need 0 to {count - 1}")
    if problems:
        raise DistributedError("\n  ".join(["cannot join the processes:", *problems]))


def _launcher() -> str | None:
    """What started several processes, of those that jax can ask; None for a single process."""
    for name, variable in (("SLURM", "SLURM_STEP_NUM_TASKS"), ("Open MPI", "OMPI_COMM_WORLD_SIZE")):
        if int(os.environ.get(variable, 1)) > 1:
            return name
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    device = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    if "tpu" in platforms and device and importlib.util.find_spec("libtpu"):
        return "TPU"
    return None


def _end_on_abort() -> None:
    """Makes abort() end the process with RESTART_EXIT_CODE.

    The coordination service aborts a process when another one has died, and takes no callback for
    it (jaxlib's missed_heartbeat_callback fails with std::bad_cast).  Python's own signal handlers
    do not run inside abort(), a C handler does.
    """

    def end(_: int) -> None:
        if _abort["code"] == RESTART_EXIT_CODE:
            _end_to_be_restarted()
        os._exit(_abort["code"])

    _abort["handler"] = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _abort["handler"])


# --- End ----------------------------------------------------------------------------------------


def _end_to_be_restarted() -> None:
    os.write(2, b"another process of this run has died: this one ends, to be restarted\n")
    os._exit(RESTART_EXIT_CODE)


@contextlib.contextmanager
def ending_together(
    expected: tuple[type[Exception], ...] = (), heartbeat_s: int = HEARTBEAT_S
) -> Iterator[None]:
    """With several processes, a failure in the body ends this one at once, with exit code 1.

    Leaving Python in the ordinary way would wait minutes for processes that wait for this one.  In
    a single process the exception goes on as usual.

    Args:
      expected: errors that are told by their message alone, without a traceback.
      heartbeat_s: as given to `initialize`.
    """
    try:
        yield
    except BaseException as error:
        alone = not jax.distributed.is_initialized() or jax.process_count() == 1
        codes = (None, 0, RESTART_EXIT_CODE)  # of a run that ends everywhere alike
        if alone or (isinstance(error, SystemExit) and error.code in codes):
            raise
        try:
            lost_peer = _LOST_PEER.search(str(error))
            if lost_peer or isinstance(error, expected):
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            if lost_peer:
                _end_to_be_restarted()
            elif isinstance(error, jax.errors.JaxRuntimeError):
                # A collective fails at once when another process dies; if that is what happened,
                # the missed heartbeat ends this process meanwhile, with the code to restart.
                time.sleep(heartbeat_s + 10)
            else:
                _abort["code"] = 1
                if jax.process_index() == 0:
                    # When it goes, the others end to be restarted: those that fail too come first.
                    time.sleep(_LINGER_S)
        finally:  # the log may be on the disk that is full
            os._exit(1)


class Preemption:
    """SIGTERM, to any one process, makes all stop after the same step.

    With several processes jax's preemption service carries the news and picks the step.  In a
    single process a second SIGTERM ends it as usual.
    """

    def __init__(self) -> None:
        """Listens from now on; in the main thread."""
        self._several = jax.process_count() > 1
        self._asked = False
        if not self._several:
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True
        self.close()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after ``step``; every process asks after every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def close(self) -> None:
        """Leaves SIGTERM as it was."""
        if not self._several:
            signal.signal(signal.SIGTERM, self._before)


# --- Agreement ----------------------------------------------------------------------------------


def check_agreement(values: Mapping[str, str], timeout_s: int = _AGREEMENT_S) -> None:
    """Checks that all processes have the same values; every process calls it, in the same order.

    Args:
      values: by name, e.g. hashes of config and code, data fingerprint, step, mesh.
      timeout_s: to wait for the slowest.

    Raises:
      DistributedError: names each process (and its host) and value that differs from what most
        have, or the processes that did not report in time.
    """
    if jax.process_count() == 1:
        return
    problems = _differences(_gather(dict(values), timeout_s))
    if problems:
        raise DistributedError("\n  ".join(["the processes of this run differ:", *problems]))


def wait_for_all(timeout_s: int = _COMPILE_S) -> None:
    """Returns when every process is here: on CPUs a collective fails after 30 s of waiting.

    Raises:
      DistributedError: names the processes that did not come in time.
    """
    if jax.process_count() > 1:
        _gather(None, timeout_s)


def _gather(values: Any, timeout_s: int = _AGREEMENT_S) -> list[dict[str, Any]]:
    """{"host", "values"} of every process in order; values are JSON-able."""
    client = jax_distributed.global_state.client
    folder = f"st4vla_jax/gather/{next(_rounds)}"
    report = json.dumps({"host": socket.gethostname(), "values": values})
    client.key_value_set(f"{folder}/{jax.process_index()}", report)
    late = None
    try:
        client.wait_at_barrier(f"{folder}/barrier", timeout_s * 1000)
    except jax.errors.JaxRuntimeError as error:
        late = error
    reports = {
        int(key.rpartition("/")[2]): json.loads(text)
        for key, text in client.key_value_dir_get(folder)
    }
    if late is not None:
        missing = [str(i) for i in range(jax.process_count()) if i not in reports]
        raise DistributedError(
            f"the processes could not compare notes within {timeout_s} s; not heard of: process "
            f"{', '.join(missing) or 'none'} ({str(late).partition(chr(10))[0]})"
        ) from late
    return [reports[i] for i in range(jax.process_count())]


def _differences(reports: list[dict[str, Any]]) -> list[str]:
    """A line for each process and name that differs from the most frequent value."""
    problems = []
    for name in sorted({name for report in reports for name in report["values"]}):
        found = [report["values"].get(name, "absent") for report in reports]
        usual = collections.Counter(found).most_common(1)[0][0]  # the first one, if even
        others = [i for i, value in enumerate(found) if value == usual]
        problems += [
            f"process {i} ({reports[i]['host']}): {name} is {value}, of process {others[0]} "
            f"({reports[others[0]]['host']}; {len(others)} of {len(found)} agree) it is {usual}"
            for i, value in enumerate(found)
            if value != usual
        ]
    return problems


def check_shared_folder(folder: Path | str) -> None:
    """Checks that a folder is the same one for all processes; every process calls it.

    Raises:
      DistributedError: names the processes that do not see what process 0 wrote there.
    """
    if jax.process_count() == 1:
        return
    file = None
    if jax.process_index() == 0:
        file = Path(folder) / f".shared-{uuid.uuid4().hex}"
        file.touch()
    name = _gather(file and file.name)[0]["values"]
    reports = _gather((Path(folder) / name).exists())
    if file is not None:
        file.unlink()
    blind = [f"{i} ({report['host']})" for i, report in enumerate(reports) if not report["values"]]
    if blind:
        raise DistributedError(
            f"{folder}: process {', '.join(blind)} does not see what process 0 "
            f"({reports[0]['host']}) wrote there; it must be one folder, on a disk that all share"
        )


# --- Batches ------------------------------------------------------------------------------------


def data_block(mesh: Mesh, rules: Rules) -> tuple[int, int]:
    """(block, blocks): which contiguous block of the batch's rows this process reads.

    Processes that differ along the tensor axis only read the same block: `Pipeline` takes the two
    as host and num_hosts.

    Raises:
      DistributedError: the devices of this process hold rows that are not one block.
    """
    parts = batch_shards(mesh, rules)
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    indices = sharding.addressable_devices_indices_map((parts,)).values()
    rows = sorted({row for (index,) in indices for row in range(*index.indices(parts))})
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise DistributedError(
            f"process {jax.process_index()} holds parts {rows} of the batch's {parts}, which are "
            "no block: order the mesh's devices by process"
        )
    return rows[0] // len(rows), parts // len(rows)


def global_batch(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """Puts the rows of this process on its devices, as part of the batch of all.

    Args:
      batch: tree of numpy arrays [b,...], the rows of `data_block`.
      mesh: of the run.
      rules: logical axes; "batch" is axis 0 of every leaf.

    Returns:
      the same tree of jax.Array [B,...], B = b x blocks, sharded over axis 0.

    Raises:
      DistributedError: the rows do not divide among the devices.
    """
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    parts = batch_shards(mesh, rules)
    _, blocks = data_block(mesh, rules)

    def put(x: Any) -> jax.Array:
        shape = (x.shape[0] * blocks, *x.shape[1:])
        if shape[0] % parts:
            raise DistributedError(
                f"{shape[0]} sequences in a batch do not divide among {parts} devices "
                f"(mesh axes {', '.join(rules.mesh_axes('batch'))})"
            )
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch)
