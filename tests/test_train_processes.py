"""The real command over several processes: the same run, whatever their number and their ends."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from st4vla_jax.train_checkpoints import complete_steps
from tests.reference import runs
from tests.test_train_step import ZERO_GRADIENT

pytestmark = pytest.mark.xdist_group("runs")
SAVE_ALL = {"save_every": 1, "checkpoint.keep_last": 9}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return runs.place(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir of the run on one process and one device."""
    return runs.whole(tmp_path_factory.getbasetemp())[0]


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


# Step 1: what the text loss reaches, since the DiT's last layer starts at zero.  Step 3: all.
CHECKED = {1: 60, 3: 160}


def assert_same_run(workdir, whole):
    """Losses and norms of every step; moments, of which the first holds the gradients."""
    got, want = (runs.numbers(folder) for folder in (workdir, whole))
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for mine, other in zip(got, want, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            where = f"{name} of step {other['step']}"
            np.testing.assert_allclose(mine[name], value, rtol=1e-5, err_msg=where)
    for step, least in CHECKED.items():
        got, want = (runs.arrays(folder, step) for folder in (workdir, whole))
        assert got.keys() == want.keys()
        moments = [path for path in want if "/mu/" in path or "/nu/" in path]
        assert len([path for path in moments if want[path].any()]) > least
        for path in moments:
            if not path.endswith(ZERO_GRADIENT):
                scale = np.abs(want[path]).max()
                np.testing.assert_allclose(
                    got[path], want[path], rtol=0, atol=1e-5 * scale, err_msg=f"{path} of {step}"
                )


def stopped(args, workdir, count, devices):
    """Trains in ``count`` processes until SIGTERM to the last one; the step that was saved."""
    with runs.together(args, count, devices) as processes:
        runs.wait_until(lambda: logged(workdir) >= max(CHECKED), processes, timeout=900)
        processes[-1].send_signal(signal.SIGTERM)
        ends = [runs.finish(process, 120) for process in processes]
    assert [status for status, _ in ends] == [75] * count, ends
    (step,) = re.findall(r"stopped by a signal, saved at step (\d+)", ends[0][1])
    assert complete_steps(workdir / "checkpoints")[-1] == int(step) >= max(CHECKED)
    assert int(step) < runs.STEPS
    return int(step), ends[0][1]


def resumed(args, step, count=1, devices=1):
    with runs.together(args, count, devices) as processes:
        ends = [runs.finish(process, 900) for process in processes]
    assert [status for status, _ in ends] == [0] * count, ends
    assert f"resumed at step {step} " in ends[0][1], ends[0][1]


def test_two_processes_then_one(place, whole):
    """Both save and stop at a signal to one; a single process goes on."""
    folder, args = place
    step, output = stopped(args("two", **SAVE_ALL), folder / "two", 2, 2)
    assert "4 cpu, mesh data 1 x fsdp 4 x tensor 1, 2 process(es)" in output
    resumed(args("two", **SAVE_ALL), step)
    assert_same_run(folder / "two", whole)


def test_a_process_with_another_config_is_named(place):
    folder, args = place
    with runs.together(args("odd"), 2, 1, {1: ["--config.loss.text=0.2"]}) as processes:
        ends = [runs.finish(process, 120) for process in processes]
    assert [status for status, _ in ends] == [1, 1], ends
    for _, output in ends:
        assert re.search(
            r"process 1 \(.*\): config.loss.text is 0.2, of process 0 .* is 0.1", output
        )
        assert "Traceback" not in output and "config.loss.action" not in output
    assert not complete_steps(folder / "odd/checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "count", "left"),
    [((1, 4, 1), 4, 1), ((1, 4, 1), 4, 2), ((2, 2, 1), 4, 1), ((1, 2, 2), 2, 1)],
)
def test_more_processes_then_fewer(mesh, count, left, place, whole):
    """Four devices in all; a tensor axis lies inside a process, as it does in a TPU host."""
    folder, args = place
    name = f"{count}_{'_'.join(map(str, mesh))}_{left}"
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    step, output = stopped(args(name, **SAVE_ALL, **sizes), folder / name, count, 4 // count)
    expected = "mesh data {} x fsdp {} x tensor {}, {} process(es)".format(*mesh, count)
    assert expected in output
    resumed(args(name, **SAVE_ALL), step, left)
    assert_same_run(folder / name, whole)


def test_a_tensor_axis_over_cpu_processes_is_refused(place):
    _, args = place
    with runs.together(args("tensor", **{"mesh.tensor": 2}), 2, 1) as processes:
        ends = [runs.finish(process, 120) for process in processes]
    assert [status for status, _ in ends] == [1, 1], ends
    assert all("mesh.tensor: a tensor axis over several CPU processes" in o for _, o in ends), ends


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_all_start_again(place, tmp_path):
    """A loop of launch/run_forever.sh for each of two; process 1 is killed in the middle."""
    folder, args = place
    settings = SAVE_ALL | {"steps": 12, "checkpoint.keep_last": 12}
    with runs.together(args("two_whole", **settings), 2, 1) as processes:
        ends = [runs.finish(process, 600) for process in processes]
    assert [status for status, _ in ends] == [0, 0], ends

    workdir, logs = folder / "two_killed", [tmp_path / "0.log", tmp_path / "1.log"]
    loops = start_loops(args("two_killed", **settings), logs)
    try:
        runs.wait_until(lambda: logged(workdir) >= 3, loops, timeout=600)
        os.kill(child_of(loops[1].pid), signal.SIGKILL)
        killed = time.monotonic()
        runs.wait_until(lambda: "ended with 75" in logs[0].read_text(), loops, timeout=60)
        waited = time.monotonic() - killed
        assert waited < 30
        codes = [loop.wait(600) for loop in loops]
    finally:
        for loop in loops:
            loop.terminate()
            loop.wait(60)
    texts = [log.read_text() for log in logs]
    assert codes == [0, 0], texts
    assert "another process of this run has died: this one ends, to be restarted" in texts[0]
    assert "ended with 137" in texts[1] and "resumed at step" in texts[0]
    print(f"the other process ended {waited:.1f} s after the kill")
    runs.same_arrays(runs.arrays(workdir, 12), runs.arrays(folder / "two_whole", 12))
    assert runs.numbers(workdir) == runs.numbers(folder / "two_whole")


def start_loops(args, logs):
    """launch/run_forever.sh for each of the processes of a run, each with its log."""
    port, loops = runs.free_port(), []
    env = runs.environment() | {"PYTHON": sys.executable, "RESTART_DELAY_S": "1", "PLATFORM": "cpu"}
    for i, log in enumerate(logs):
        command = ["bash", "launch/run_forever.sh", *args, *runs.joining(i, len(logs), port)]
        with log.open("w") as out:
            loops.append(subprocess.Popen(command, cwd=runs.ROOT, stdout=out, stderr=out, env=env))
    return loops


def child_of(pid):
    found = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, timeout=10
    )
    (child,) = found.stdout.split()
    return int(child)
