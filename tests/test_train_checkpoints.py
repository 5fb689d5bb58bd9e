"""Checkpoints of a run: layout, exactness, what is kept, and what failures leave behind."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st4vla_jax import checkpoint as ckpt
from st4vla_jax import train_checkpoints
from st4vla_jax.checkpoint import CheckpointError
from st4vla_jax.sharding import make_mesh
from st4vla_jax.train_checkpoints import CheckpointSettings, complete_steps, kept_steps
from tests.reference import run_state
from tests.reference.run_state import META, RUN, abstract, assert_same, numpy_state, on_mesh

ROOT = Path(__file__).parents[1]


@functools.cache
def mesh():
    return make_mesh(1, 8, 1)


def state(step=0, **kwargs):
    return on_mesh(numpy_state(step, **kwargs), mesh())


@pytest.fixture
def checkpoints(tmp_path):
    opened = []

    def make(**settings):
        opened.append(run_state.open_checkpoints(tmp_path, **settings))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ema", [True, False])
def test_restores_bit_by_bit_on_another_mesh(checkpoints, ema):
    saver = checkpoints()
    saver.save(state(7, ema=ema), RUN)
    saver.wait()
    assert saver.latest() == 7 and saver.run_record(7) == RUN
    for sizes in ((2, 4, 1), (8, 1, 1)):
        wanted = abstract(numpy_state(7, ema=ema), make_mesh(*sizes))
        found = saver.restore(7, wanted)
        assert_same(found, numpy_state(7, ema=ema))
        assert all(
            jax.tree.leaves(jax.tree.map(lambda x, w: x.sharding == w.sharding, found, wanted))
        )
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    single = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=one), numpy_state(7, ema=ema)
    )
    assert_same(saver.restore(7, single), numpy_state(7, ema=ema))


def test_a_step_is_a_checkpoint(checkpoints):
    saver = checkpoints()
    saver.save(state(12), RUN)
    saver.wait()
    folder = saver.folder / "00000012"
    meta = ckpt.read_meta(folder)
    assert (meta.step, meta.model, meta.prompt) == (12, META.model, META.prompt)
    assert meta.git_revision == ckpt.git_revision()
    found = dict(ckpt.iter_params(folder))
    host = numpy_state(12)
    assert set(found) == {"vlm/a", "vlm/b", "vlm/visual/d", "dit/c"}
    assert np.array_equal(found["vlm/visual/d"], host.frozen["vlm"]["visual"]["d"])
    assert np.array_equal(found["vlm/a"], host.params["vlm"]["a"])
    for name, content in run_state.FILES.items():
        assert (folder / "meta" / name).read_bytes() == content
    assert {"params", "opt_state", "ema", "meta"} <= set(names(folder))


def test_large_parameters_are_stored_in_pieces(checkpoints, monkeypatch):
    monkeypatch.setattr("st4vla_jax.checkpoint_trees.CHUNK_BYTES", 32)  # less than a shard
    saver = checkpoints()
    saver.save(state(1), RUN)
    saver.wait()
    (metadata,) = (saver.folder / "00000001/params/array_metadatas").iterdir()
    chunks = {m["array_metadata"]["param_name"]: m["array_metadata"]["chunk_shape"]
              for m in json.loads(metadata.read_text())["array_metadatas"]}  # fmt: skip
    assert np.prod(chunks["vlm.a"]) * 4 <= 32
    assert_same(saver.restore(1, abstract(numpy_state(1), mesh())), numpy_state(1))


def test_a_donated_state_is_saved_as_it_was(checkpoints):
    """The copy is made before `save` returns: later updates write into the same buffers."""
    saver = checkpoints()
    big = np.random.default_rng(0).standard_normal((8 * 512, 512), np.float32)
    host = numpy_state(4).replace(params={"vlm": {"a": big}}, ema=None)
    live = on_mesh(host, mesh())
    step = jax.jit(run_state.update, donate_argnums=0)
    step(on_mesh(host, mesh()))  # compiled beforehand, so that the updates come at once
    saver.save(live, RUN)
    for _ in range(5):
        live = step(live)
    jax.block_until_ready(live)
    saver.wait()
    assert_same(saver.restore(4, abstract(host, mesh())), host)


def test_what_does_not_fit_is_listed(checkpoints):
    saver = checkpoints()
    saver.save(state(3, ema=False), RUN)
    saver.wait()
    other = numpy_state(3)
    other.params["vlm"]["a"] = np.ones((16, 4), np.float32)
    other.params["vlm"]["new"] = np.ones(3, np.float32)
    del other.params["dit"]
    with pytest.raises(CheckpointError) as error:
        saver.restore(3, abstract(other, mesh()))
    for part in (
        "00000003: does not fit",
        "params/vlm/a: float32[16, 8] in the checkpoint, float32[16, 4] in this run",
        "params/vlm/new: not in the checkpoint",
        "params/dit/c: not in this run",
        "ema: not in the checkpoint",
    ):
        assert part in str(error.value)
    cast = numpy_state(3, ema=False)
    moments = jax.tree.map(lambda x: x.astype(np.float32), cast.opt_state)
    with pytest.raises(CheckpointError, match="mu/dit/c: bfloat16.* float32"):
        saver.restore(3, abstract(cast.replace(opt_state=moments), mesh()))
    with pytest.raises(CheckpointError, match="00000004: no complete checkpoint, lacks meta/train"):
        saver.restore(4, abstract(cast, mesh()))


def test_what_is_kept():
    loss = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 3.0}
    metrics = {s: {} if v is None else {"eval/loss": v} for s, v in loss.items()}

    def kept(**settings):
        return kept_steps(metrics, CheckpointSettings(**settings))

    assert kept(keep_last=2) == {5, 6}
    assert kept(keep_last=1, keep_every=2) == {2, 4, 6}
    assert kept(keep_last=1, best_metric="eval/loss") == {2, 6}
    assert kept(keep_last=1, best_metric="eval/loss", best_mode="max") == {1, 6}
    assert kept(keep_last=1, keep_every=3, best_metric="eval/loss") == {2, 3, 6}
    assert kept(keep_last=1, best_metric="other") == {6}


def test_the_best_and_the_latest_stay(checkpoints, caplog):
    saver = checkpoints(keep_last=1, best_metric="eval/loss", keep_every=4)
    for step, metrics in enumerate(
        ({"eval/loss": 1.0}, {"eval/loss": 2.0}, None, None, None, None), 1
    ):
        saver.save(state(step), RUN, metrics)
    saver.wait()
    assert complete_steps(saver.folder) == [1, 4, 6]
    assert names(saver.folder) == [".lock", "00000001", "00000004", "00000006"]
    saver.save(state(7), RUN, {"eval/lost": 1.0})  # work is never thrown away for a name
    saver.wait()
    assert "'eval/loss' is none of the metrics of the evaluation (eval/lost)" in caplog.text
    assert complete_steps(saver.folder) == [1, 4, 7]


def test_settings_that_make_no_sense():
    with pytest.raises(CheckpointError) as error:
        CheckpointSettings(keep_last=0, keep_every=-1, best_mode="least")
    for part in ("keep_last 0", "keep_every -1", "best_mode 'least'"):
        assert part in str(error.value)


def test_a_step_without_its_marker_is_never_picked(checkpoints, caplog):
    saver = checkpoints()
    for step in (1, 2, 3):
        saver.save(state(step), RUN)
    saver.wait()
    saver.close()
    (saver.folder / "00000003" / train_checkpoints.RUN).unlink()
    saver = checkpoints()
    assert saver.latest() == 2
    assert "00000003: ignored, it is not complete (lacks meta/train.json)" in caplog.text
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        saver.restore(3, abstract(numpy_state(3), mesh()))
    saver.save(state(3), RUN)  # it is not in the way
    saver.wait()
    assert saver.latest() == 3 and len(list(saver.folder.glob("00000003.incomplete-*"))) == 1


def test_a_newer_format(checkpoints):
    saver = checkpoints()
    saver.save(state(1), RUN)
    saver.wait()
    path = saver.folder / "00000001" / train_checkpoints.RUN
    record = json.loads(path.read_text())
    for changed, message in (
        (record | {"format_version": 2}, "format_version 2 of meta/train.json is newer"),
        ({"format_version": 1, "step": 1}, "lacks metrics, run"),
        ([], "not readable"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            saver.run_record(1)
        with pytest.raises(CheckpointError, match=message):
            saver.restore(1, abstract(numpy_state(1), mesh()))


@pytest.mark.parametrize("async_", [True, False])
def test_a_full_disk_leaves_what_was_there(checkpoints, async_):
    """Files may not grow beyond 200 bytes, as on a disk without room."""
    saver = checkpoints(async_=async_)
    saver.save(state(1), RUN)
    saver.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            saver.save(state(2), RUN)
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for part in ("saving step 2 failed (no room on the disk?)", "step 1 is complete"):
        assert part in str(error.value)
    assert names(saver.folder) == [".lock", "00000001"]
    assert_same(saver.restore(1, abstract(numpy_state(1), mesh())), numpy_state(1))
    saver.save(state(2), RUN)  # there is room again
    saver.wait()
    assert saver.latest() == 2


def test_a_failure_in_the_background_is_raised_later(checkpoints, monkeypatch):
    saver = checkpoints()
    saver.save(state(1), RUN)
    saver.wait()

    def broken(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(train_checkpoints, "sync", broken)
    saver.save(state(2), RUN)
    deadline = time.monotonic() + 30
    with pytest.raises(
        CheckpointError, match="saving step 2 failed: OSError: disk on fire; step 1"
    ):
        while time.monotonic() < deadline:
            saver.check()
            time.sleep(0.01)
    saver.save(state(3), RUN)
    with pytest.raises(CheckpointError, match="saving step 3 failed"):
        saver.save(state(4), RUN)
    assert names(saver.folder) == [".lock", "00000001"]


def test_two_runs_in_one_workdir(checkpoints, tmp_path):
    saver = checkpoints()
    with pytest.raises(CheckpointError, match="another run writes there"):
        checkpoints()
    saver.close()
    checkpoints()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/checkpoints: cannot be written .Not a dir"):
        run_state.open_checkpoints(tmp_path / "file")
    with pytest.raises(CheckpointError, match="gs://b/w: not a folder"):
        run_state.open_checkpoints("gs://b/w")
    with pytest.raises(CheckpointError, match="absent.json: cannot be read .No such file"):
        train_checkpoints.TrainCheckpoints(
            tmp_path / "w", CheckpointSettings(), META, {"a.json": tmp_path / "absent.json"}
        )


# Saves steps 2, 3, ... and dies as told: "write" before the arrays are complete, "name" with
# everything written but the name, "delete" while an old step is removed, else after some seconds.
KILLED = """
import os, shutil, signal, sys, threading
from pathlib import Path
from st4vla_jax import train_checkpoints
from st4vla_jax.sharding import make_mesh
from tests.reference.run_state import RUN, numpy_state, on_mesh, open_checkpoints

folder, where = Path(sys.argv[1]), sys.argv[2]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
checkpoints = open_checkpoints(folder, keep_last=1)
first = (checkpoints.latest() or 0) + 1
finalize = train_checkpoints._StepHandler.finalize
if where == "write":
    train_checkpoints._StepHandler.finalize = die
elif where == "name":
    train_checkpoints._StepHandler.finalize = lambda *args: (finalize(*args), die())
elif where == "delete":
    shutil.rmtree = lambda path, **_: ((Path(path) / "meta/meta.json").unlink(), die())
else:
    print("ready", flush=True)
    threading.Timer(float(where), die).start()
for step in range(first, 100_000):
    checkpoints.save(on_mesh(numpy_state(step), make_mesh(1, 1, 1)), RUN)
    print(step, flush=True)
"""


def run_and_kill(folder, where):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", KILLED, str(folder), str(where)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.split()


def assert_sound(saver):
    """Only complete steps are left, each as it was saved."""
    steps = complete_steps(saver.folder)
    assert names(saver.folder) == [".lock", *(f"{step:08d}" for step in steps)]
    for step in steps:
        found = saver.restore(step, abstract(numpy_state(step), mesh()))
        assert_same(found, numpy_state(step))
    return steps


@pytest.mark.parametrize(("where", "left"), [("write", [1]), ("name", [1]), ("delete", [2])])
def test_killed_while_saving(tmp_path, where, left):
    saver = run_state.open_checkpoints(tmp_path)
    saver.save(state(1), RUN)
    saver.close()
    run_and_kill(tmp_path, where)
    assert len(names(saver.folder)) == 3  # something half-written or half-deleted
    saver = run_state.open_checkpoints(tmp_path)
    assert assert_sound(saver) == left
    saver.close()


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path):
    rng, before = np.random.default_rng(0), 0
    for _ in range(20):
        saved = run_and_kill(tmp_path, rng.uniform(0.05, 1.0))
        saver = run_state.open_checkpoints(tmp_path)
        steps = assert_sound(saver)
        saver.close()
        # A save has returned once the next one was asked for.
        assert steps[-1:] == [] or steps[-1] >= before
        if len(saved) > 2:
            assert steps[-1] >= int(saved[-2])
        before = steps[-1] if steps else 0


def test_restores_on_one_cpu_what_a_step_holds(checkpoints):
    """Parameters only, without the mesh of the run, cast."""
    saver = checkpoints()
    saver.save(state(5), RUN)
    saver.wait()
    found = ckpt.read_params(saver.folder / "00000005", dtype=jnp.bfloat16)
    assert isinstance(found["vlm"]["a"], np.ndarray) and found["vlm"]["a"].dtype == jnp.bfloat16
    wanted = numpy_state(5).params["vlm"]["a"].astype(jnp.bfloat16)
    assert np.array_equal(found["vlm"]["a"], wanted)
