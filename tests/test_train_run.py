"""The real command: whole runs, kills, signals, refusals, replay."""

import re
import signal
import time

import numpy as np
import pytest

from st4vla_jax.checkpoint import read_meta
from st4vla_jax.policy.policy import Policy
from tests.reference import runs

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, compile cache, and the uninterrupted run that others are compared with."""
    folder = tmp_path_factory.mktemp("runs")
    data = runs.make_data(folder / "data")
    return folder, lambda name, *extra, **settings: runs.arguments(
        data, folder / name, folder / "cache", *extra, **settings
    )


@pytest.fixture(scope="module")
def whole(place):
    folder, args = place
    status, output = runs.run(args("whole"))
    assert status == 0, output
    return folder / "whole", output


def wait_for_step(workdir, step, process, timeout=240):
    """Until a checkpoint of at least ``step`` is complete."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(name) >= step for name in runs.steps_of(workdir) if name.isdigit()):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not saved; the process ended with {process.poll()}")


def test_a_run_says_what_it_does_and_keeps_it(whole):
    workdir, output = whole
    assert runs.steps_of(workdir) == ["00000002", "00000004", "00000006"]
    for part in ("an update: 4 robot + 4 grounding", "parameters  lr 0.001", "fresh: bridge, dino",
                 "lowered in", "compiled in", "first_batch_0.png", "step 6/6"):  # fmt: skip
        assert part in output, output
    lines = runs.numbers(workdir)
    assert [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    for name in ("loss/total", "loss/action/tabletop/action", "loss/text", "grad/norm",
                 "grad/bridge", "grad/vlm/visual", "lr/vlm", "data/packing"):  # fmt: skip
        assert all(np.isfinite(line[name]) for line in lines), name
    assert any(name.startswith("loss/text/grounding/") for name in lines[-1])
    assert (workdir / "images/first_batch_0.png").stat().st_size > 10_000
    meta = read_meta(workdir / "checkpoints/00000006")
    assert (
        meta.step == 6 and meta.action.control_hz == 5 and "{instruction}" in meta.prompt.template
    )


def test_a_step_of_it_acts(whole):
    policy = Policy.load(whole[0] / "checkpoints/00000006")
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    result = policy.act([image], "reach the red ball")
    assert result.actions.shape == (1, 8, 7) and np.isfinite(result.actions).all()


def test_killed_and_started_again_it_ends_bitwise_equal(place, whole):
    folder, args = place
    process = runs.start(args("killed"))
    wait_for_step(folder / "killed", 2, process)
    process.send_signal(signal.SIGKILL)
    runs.finish(process)
    assert runs.steps_of(folder / "killed")[-1] != "00000006"
    status, output = runs.run(args("killed"))
    assert status == 0 and "resumed at step" in output, output
    runs.same_arrays(runs.arrays(folder / "killed", 6), runs.arrays(whole[0], 6))
    assert runs.numbers(folder / "killed") == runs.numbers(whole[0])


def test_a_signal_saves_the_present_step(place, whole):
    folder, args = place
    process = runs.start(args("stopped", save_every=1000))
    deadline = time.monotonic() + 240
    metrics = folder / "stopped/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    status, output = runs.finish(process)
    assert status == 75 and "stopped by a signal, saved at step" in output, output
    (saved,) = runs.steps_of(folder / "stopped")
    assert 2 <= int(saved) < 6
    status, output = runs.run(args("stopped", save_every=1000))
    assert status == 0 and f"resumed at step {int(saved)}" in output, output
    runs.same_arrays(runs.arrays(folder / "stopped", 6), runs.arrays(whole[0], 6))


def test_a_finished_run_has_nothing_to_do(place, whole):
    status, output = runs.run(place[1]("whole"))
    assert status == 0 and "nothing to do: step 6 of 6" in output


def test_changes_are_refused_by_key(place, whole):
    _, args = place
    changed = {"steps": 8, "optim.b1": 0.8, "data.schedule.seed": 7, "loss.text": 0.3}
    status, output = runs.run(args("whole", **changed))
    assert status == 1
    for part in ("config.optim.b1: 0.9 -> 0.8", "--restart_optimizer", "config.data.schedule.seed",
                 "data_fingerprint", "--allow_data_change", "config.loss.text"):  # fmt: skip
        assert part in output, output
    assert "config.steps" not in output and "Traceback" not in output


def test_a_changed_mixture_goes_on_when_told(place, whole):
    folder, args = place
    extra = ("--allow_data_change", "--restart_optimizer")
    changed = {"steps": 7, "optim.b1": 0.8, "data.schedule.seed": 7}
    status, output = runs.run(args("whole", *extra, **changed))
    assert status == 0 and "with a new optimizer" in output, output
    assert runs.steps_of(folder / "whole")[-1] == "00000007"
    assert runs.record(folder / "whole", 7)["run"]["config"]["data"]["schedule"]["seed"] == 7


def test_replay_repeats_a_step_exactly(place, whole):
    folder, args = place
    status, output = runs.run(args("killed", "--replay=4"))
    assert status == 0, output
    assert re.search(r"equal to what the run logged, all \d+ numbers", output), output
    for name in ("batch.png", "samples.json", "metrics.json"):
        assert (folder / "killed/replay/4" / name).stat().st_size > 10


def test_bad_command_lines(place, tmp_path):
    _, args = place
    status, output = runs.run([*args("bad"), "--config.optim.clipp=3"])
    assert status != 0 and "clip" in output and "Did you mean" in output
    bad = args(
        "bad", **{"data.sets.tabletop.path": tmp_path / "none", "mesh.tensor": 3,
                  "init.vlm": str(tmp_path / "nowhere"), "optim.groups.dit.pattern": "dot/"},
    )  # fmt: skip
    status, output = runs.run(bad)
    assert status == 1 and "Traceback" not in output
    for part in ("mesh", "no pattern matches parameter dit/", "nowhere"):
        assert part in output, output
