"""The real command: whole runs, kills, signals, refusals, replay."""

import random
import re
import shutil
import time

import numpy as np
import pytest

from st4vla_jax.checkpoint import read_meta
from st4vla_jax.metrics import read_metrics
from st4vla_jax.policy.policy import Policy
from st4vla_jax.train_checkpoints import complete_steps
from tests.reference import runs

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return runs.place(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.whole(tmp_path_factory.getbasetemp())


def lines_of(workdir, since=0.0):
    """Lines of metrics, if any was written since a time."""
    path = workdir / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime < since:
        return 0
    return path.read_text().count("\n")


def complete(workdir):
    return complete_steps(workdir / "checkpoints")


def test_a_run_says_what_it_does_and_keeps_it(whole):
    workdir, output = whole
    assert complete(workdir) == [1, 2, 3, 4, 5, 6]
    for part in ("an update: 2 robot + 2 grounding", "parameters  lr 0.001", "fresh: bridge, dino",
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


def test_it_is_compiled_once(whole):
    """Counted in jax's own log of compilations (runs.environment asks for it)."""
    before, _, after = whole[1].partition("step 2/6")
    assert before.count("Compiling jit(train_step) ") == 1
    assert "Compiling" not in after


def test_a_step_of_it_acts(whole):
    policy = Policy.load(whole[0] / "checkpoints/00000006")
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    result = policy.act([image], "reach the red ball", state=np.zeros(7, np.float32))
    assert result.actions.shape == (1, 8, 7) and np.isfinite(result.actions).all()


@pytest.fixture(scope="module")
def interrupted(place, whole):
    """Workdir of a run that was killed, then stopped by a signal, then left to its end."""
    folder, args = place
    workdir = folder / "interrupted"
    process = runs.start(args("interrupted"))
    runs.wait_until(lambda: complete(workdir), [process])
    process.kill()
    runs.finish(process)
    killed_at = complete(workdir)[-1]
    assert killed_at < 5
    shutil.copytree(workdir, folder / "changed")

    later, started = args("interrupted", save_every=1000), time.time()
    process = runs.start(later)
    runs.wait_until(lambda: lines_of(workdir, started) > killed_at, [process])
    process.terminate()
    status, output = runs.finish(process)
    assert status == 75 and f"resumed at step {killed_at} " in output, output
    (stopped_at,) = re.findall(r"stopped by a signal, saved at step (\d+)", output)
    assert complete(workdir)[-1] == int(stopped_at)
    assert killed_at < int(stopped_at) < runs.STEPS

    status, output = runs.run(later)
    assert status == 0 and f"resumed at step {stopped_at} " in output, output
    return workdir


def test_killed_and_stopped_it_ends_bitwise_equal(interrupted, whole):
    runs.same_arrays(runs.arrays(interrupted, runs.STEPS), runs.arrays(whole[0], runs.STEPS))
    assert runs.numbers(interrupted) == runs.numbers(whole[0])
    (logged,) = read_metrics(interrupted)[-1:]
    assert logged["goodput/restart"] > 0  # one account over all three processes


def test_a_finished_run_has_nothing_to_do(place, whole):
    status, output = runs.run(place[1]("whole"))
    assert status == 0 and "nothing to do: step 6 of 6" in output


def test_changes_are_refused_by_key(place, whole):
    _, args = place
    changed = {"steps": 8, "optim.b1": 0.8, "data.schedule.seed": 7, "loss.text": 0.3}
    status, output = runs.run(args("whole", **changed))
    assert status == 1
    for part in ("config.optim.b1: 0.95 -> 0.8", "--restart_optimizer", "config.data.schedule.seed",
                 "data_fingerprint", "--allow_data_change", "config.loss.text"):  # fmt: skip
        assert part in output, output
    assert "config.steps" not in output and "Traceback" not in output


def test_a_changed_mixture_goes_on_when_told(place, interrupted):
    """With the old optimizer: --restart_optimizer has nothing to do where its settings are."""
    folder, args = place
    extra = ("--allow_data_change", "--restart_optimizer")
    status, output = runs.run(args("changed", *extra, **{"data.schedule.seed": 7}))
    assert status == 0 and "resumed at step" in output, output
    run = runs.record(folder / "changed", runs.STEPS)["run"]
    assert run["config"]["data"]["schedule"]["seed"] == 7
    assert runs.numbers(folder / "changed")[-1] != runs.numbers(interrupted)[-1]


@pytest.mark.slow
def test_a_changed_optimizer_starts_anew_when_told(place, whole):
    folder, args = place
    workdir = folder / "restarted"
    shutil.copytree(whole[0], workdir)
    changed = {"optim.b1": 0.8, "steps": runs.STEPS + 1}
    status, output = runs.run(args("restarted", "--restart_optimizer", **changed))
    assert status == 0 and f"step {runs.STEPS} of this workdir, with a new optimizer" in output
    # One update from zero moments: the first is a fifth of the clipped gradient.
    found = runs.arrays(workdir, runs.STEPS + 1)
    assert found["opt_state/step"] == runs.STEPS + 1
    first = [value for path, value in found.items() if "/mu/" in path]
    norm = np.sqrt(sum(np.sum(np.square(np.float64(value))) for value in first))
    clipped = min(runs.numbers(workdir)[-1]["grad/norm"], 1.0)
    np.testing.assert_allclose(norm, 0.2 * clipped, rtol=1e-4)


def test_replay_repeats_a_step_exactly(place, interrupted):
    status, output = runs.run(place[1]("interrupted", "--replay=2"))
    assert status == 0, output
    assert re.search(r"equal to what the run logged, all \d+ numbers", output), output
    for name in ("batch.png", "samples.json", "metrics.json"):
        assert (interrupted / "replay/2" / name).stat().st_size > 10


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


KILLS, KILL_STEPS = 20, 30


@pytest.mark.slow
def test_twenty_random_kills(tmp_path, place):
    """Anywhere from the first save on, every other one while a save is being written."""
    folder, args = place
    settings = {"steps": KILL_STEPS, "save_every": 1}
    status, output = runs.run(args("long", **settings, **{"checkpoint.keep_last": KILL_STEPS}))
    assert status == 0, output
    workdir, rng = folder / "kills", random.Random(0)
    during = checked = 0
    for kill in range(KILLS):
        started, saving = time.time(), kill % 2
        process = runs.start(args("kills", **settings))
        due = max(complete(workdir), default=0) + rng.randrange(2)

        def reached(due=due, saving=saving, started=started):
            return lines_of(workdir, started) > due and (not saving or temporary(workdir))

        runs.wait_until(reached, [process])
        time.sleep(rng.uniform(0, 0.02 if saving else 1.0))
        during += bool(temporary(workdir))
        process.kill()
        runs.finish(process)
        found = complete(workdir)
        print(f"kill {kill + 1}: complete {found}, left {temporary(workdir)}", lines_of(workdir))
        for step in found:
            runs.same_arrays(runs.arrays(workdir, step), runs.arrays(folder / "long", step))
            checked += 1
    assert during >= KILLS // 4, during
    status, output = runs.run(args("kills", **settings))
    assert status == 0, output
    assert not temporary(workdir)
    runs.same_arrays(runs.arrays(workdir, KILL_STEPS), runs.arrays(folder / "long", KILL_STEPS))
    assert runs.numbers(workdir) == runs.numbers(folder / "long")
    print(f"{KILLS} kills, {during} during a save; {checked} checkpoints compared bitwise")


def temporary(workdir):
    """What is being written or deleted, or was left so."""
    folder = workdir / "checkpoints"
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir() if path.name != ".lock"]
    return sorted(name for name in names if not name.isdigit())
