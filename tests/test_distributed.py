"""Start, agreement, batches, preemption and ending together; real processes where it takes any."""

import os
import re
import signal
import time

import jax
import numpy as np
import pytest

from st4vla_jax import distributed
from st4vla_jax.distributed import RESTART_EXIT_CODE, DistributedError, Preemption
from st4vla_jax.sharding import Rules, make_mesh
from tests.reference import run_state
from tests.reference.processes import Processes

HEARTBEAT_S = 5

# Joins, compares notes, makes a batch, restores what one process wrote, trains until preempted.
RUN = """
import pathlib, sys, time
import numpy as np
import jax
from st4vla_jax import distributed
from st4vla_jax.sharding import Rules, make_mesh
from tests.reference import run_state

folder, heartbeat = pathlib.Path(sys.argv[1]), int(sys.argv[2])
distributed.initialize(heartbeat_s=heartbeat)
with distributed.ending_together((LookupError,), heartbeat):
    me = jax.process_index()
    preemption = distributed.Preemption()
    distributed.check_agreement({"config": "c0ffee", "step": "3"})
    try:
        distributed.check_agreement({"config": "c0ffee" if me == 0 else "tea", "step": "3"})
    except distributed.DistributedError as error:
        print("differ:", error)
    distributed.check_shared_folder(folder)
    try:
        distributed.check_shared_folder(folder / str(me))
    except distributed.DistributedError as error:
        print("not shared:", error)

    for sizes in ((2, 2, 1), (1, 1, 4)):
        mesh, rules = make_mesh(*sizes), Rules()
        block, blocks = distributed.data_block(mesh, rules)
        rows = np.arange(24, dtype=np.int32).reshape(8, 3)[block * 8 // blocks :][: 8 // blocks]
        batch = distributed.global_batch({"x": rows}, mesh, rules)["x"]
        total = jax.jit(lambda x: (x * np.arange(8)[:, None]).sum())(batch)
        print("batch:", (block, blocks), batch.shape, int(total))

    mesh = make_mesh(1, 4, 1)
    checkpoints = run_state.open_checkpoints(folder)
    state = run_state.numpy_state(3)
    state = checkpoints.restore(checkpoints.latest(), run_state.abstract(state, mesh))
    held = sum(s.data.nbytes for s in state.params["vlm"]["a"].addressable_shards)
    print("restored:", int(state.step), "bytes", held)
    step = jax.jit(run_state.update, donate_argnums=0)
    for _ in range(2000):
        state = jax.block_until_ready(step(state))
        print("step", int(state.step))
        if preemption.reached(int(state.step)):
            checkpoints.save(state, run_state.RUN)
            checkpoints.close()
            print("saved", int(state.step))
            sys.exit(distributed.RESTART_EXIT_CODE)
        time.sleep(0.02)
"""
# Trains without end, or fails in process 0, in process 1, or in both.
DIE = """
import sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from st4vla_jax import distributed

heartbeat, failing = int(sys.argv[1]), int(sys.argv[2])
distributed.initialize(heartbeat_s=heartbeat)
with distributed.ending_together((LookupError,), heartbeat):
    for step in range(100_000):
        multihost_utils.process_allgather(np.ones(2))
        print("step", step)
        if step == 5 and failing in (jax.process_index(), 2):
            raise LookupError("mistake") if failing == 2 else OSError("mistake")
        time.sleep(0.02)
"""


def test_two_processes_as_one_run(tmp_path):
    """They compare notes, go on from the checkpoint of a single one, and stop at SIGTERM to one."""
    workdir = tmp_path / "w"
    for i in "01":
        (workdir / i).mkdir(parents=True)
    checkpoints = run_state.open_checkpoints(workdir)
    state = run_state.numpy_state(3)
    checkpoints.save(run_state.on_mesh(state, make_mesh(1, 8, 1)), run_state.RUN)
    checkpoints.close()
    with Processes(RUN, 2, [workdir, HEARTBEAT_S], tmp_path) as processes:
        processes.await_line("step 8\n")
        processes.signal(1, signal.SIGTERM)
        codes = processes.codes()
        logs = [processes.log(0), processes.log(1)]
    for i, log in enumerate(logs):
        assert_agreement_is_named(log)
        assert_rows(log, i)
        assert "restored: 3 bytes 256\n" in log  # half of 16 x 8 floats

    assert codes == [RESTART_EXIT_CODE] * 2
    saved = {re.search(r"saved (\d+)\n", log)[1] for log in logs}
    assert len(saved) == 1
    step = int(saved.pop())
    assert step >= 8 and all(f"step {step}\n" in log for log in logs)
    assert not any(f"step {step + 1}\n" in log for log in logs)

    checkpoints = run_state.open_checkpoints(workdir)
    assert checkpoints.latest() == step
    found = checkpoints.restore(step, run_state.abstract(state, make_mesh(2, 2, 2)))
    checkpoints.close()
    for _ in range(step - 3):
        state = run_state.update(state)
    run_state.assert_same(found, state.replace(step=np.int32(step)))


def assert_agreement_is_named(log):
    (text,) = re.findall(r"differ: .*\n.*", log)
    assert re.search(r"process 1 \(.+\): config is tea, of process 0 .*it is c0ffee", text)
    assert "step" not in text and "process 0 (" not in text.split("of process 0")[0]
    assert re.search(r"not shared: .*/w/[01]: process 1 \(.+\) does not see", log)


def assert_rows(log, i):
    """Each process brings its rows; split by tensor alone, the same ones."""
    total = (np.arange(24).reshape(8, 3) * np.arange(8)[:, None]).sum()
    for blocks in ((i, 2), (0, 1)):
        assert f"batch: {blocks} (8, 3) {total}\n" in log


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.slow
def test_a_killed_process_ends_the_rest(tmp_path, victim):
    """Process 0 holds the coordination service: its death is noticed at once."""
    with Processes(DIE, 2, [HEARTBEAT_S, -1], tmp_path) as processes:
        processes.await_line("step 3\n")
        start = time.monotonic()
        processes.signal(victim, signal.SIGKILL)
        codes = processes.codes(30)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == RESTART_EXIT_CODE, processes.log(1 - victim)
        assert time.monotonic() - start < 30
        assert "another process of this run has died" in processes.log(1 - victim)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_process_ends_the_rest(tmp_path, failing):
    with Processes(DIE, 2, [HEARTBEAT_S, failing], tmp_path) as processes:
        codes = processes.codes(60)
        assert codes[failing] == 1 and codes[1 - failing] == RESTART_EXIT_CODE, codes
        assert "OSError: mistake" in processes.log(failing)


@pytest.mark.slow
def test_all_fail_alike(tmp_path):
    """None of them asks to be restarted, though the coordination service ends too."""
    with Processes(DIE, 2, [HEARTBEAT_S, 2], tmp_path) as processes:
        assert processes.codes(60) == [1, 1]
        for i in range(2):
            assert "error: mistake\n" in processes.log(i)
            assert "Traceback" not in processes.log(i)


def test_most_processes_are_right():
    reports = [
        {"host": f"h{i}", "values": {"mesh": mesh, "step": "4"}}
        for i, mesh in enumerate(["2x2", "4x1", "4x1"])
    ]
    (line,) = distributed._differences(reports)
    assert line == "process 0 (h0): mesh is 2x2, of process 1 (h1; 2 of 3 agree) it is 4x1"
    del reports[2]["values"]["step"]
    assert any(
        "process 2 (h2): step is absent" in line for line in distributed._differences(reports)
    )


def test_arguments_that_make_no_sense(monkeypatch):
    for variable in distributed._VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: joined.append((a, k)))
    monkeypatch.setattr(distributed, "_end_on_abort", lambda: None)
    distributed.initialize()
    assert joined == []
    with pytest.raises(DistributedError) as error:
        distributed.initialize(process_id=2)
    for part in ("--coordinator or JAX_COORDINATOR_ADDRESS", "--num_processes or JAX_NUM_PRO"):
        assert part in str(error.value)
    with pytest.raises(DistributedError) as error:
        distributed.initialize("host", 2, 2)
    for part in ("coordinator 'host': need HOST:PORT", "process_id 2: need 0 to 1"):
        assert part in str(error.value)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(DistributedError, match="num_processes 'many' is no number"):
        distributed.initialize("host:1", process_id=0)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    distributed.initialize("host:1", process_id=3)
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    distributed.initialize(heartbeat_s=7)
    assert joined == [
        (("host:1", 4, 3), {"heartbeat_timeout_seconds": distributed.HEARTBEAT_S}),
        ((), {"heartbeat_timeout_seconds": 7}),
    ]


def test_batch_of_one_process():
    mesh, rules = make_mesh(2, 2, 2), Rules()
    assert distributed.data_block(mesh, rules) == (0, 1)
    x = {"a": np.arange(8, dtype=np.uint8), "b": {"c": np.ones((8, 3), np.float32)}, "d": None}
    batch = distributed.global_batch(x, mesh, rules)
    assert batch["d"] is None and np.array_equal(batch["a"], x["a"])
    assert {s.data.shape for s in batch["b"]["c"].addressable_shards} == {(2, 3)}
    with pytest.raises(DistributedError, match="6 sequences in a batch do not divide among 4"):
        distributed.global_batch({"a": np.ones(6)}, mesh, rules)


def test_rows_that_are_no_block(monkeypatch):
    """A process in the middle of the mesh, or with every other device."""
    mesh = make_mesh(1, 8, 1)
    devices = list(mesh.devices.flat)
    for mine, wanted in ((range(2, 4), (1, 4)), (range(0, 8, 2), None), (range(1, 3), None)):
        local = {devices[i]: (slice(i, i + 1),) for i in mine}
        monkeypatch.setattr(
            jax.sharding.NamedSharding, "addressable_devices_indices_map", lambda *_, x=local: x
        )
        if wanted is None:
            with pytest.raises(DistributedError, match="order the mesh's devices by process"):
                distributed.data_block(mesh, Rules())
        else:
            assert distributed.data_block(mesh, Rules()) == wanted


def test_sigterm_to_a_single_process():
    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption()
    assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached(2) and preemption.reached(3)
    assert signal.getsignal(signal.SIGTERM) is before  # a second one ends the process
    Preemption().close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_single_process_fails_as_usual():
    with pytest.raises(KeyError), distributed.ending_together():
        raise KeyError("mistake")
    distributed.check_agreement({"config": "x"})
