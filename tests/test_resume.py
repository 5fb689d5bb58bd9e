"""What a run may start from: comparison with the run before, weights from elsewhere."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from st4vla_jax import checkpoint as ckpt
from st4vla_jax import predict
from st4vla_jax.checkpoint import CheckpointError
from st4vla_jax.resume import compare_runs, find_checkpoint, init_from
from st4vla_jax.sharding import make_mesh
from st4vla_jax.state import TrainState, split
from st4vla_jax.train_checkpoints import RUN as RUN_FILE
from st4vla_jax.train_checkpoints import CheckpointSettings, TrainCheckpoints
from tests.reference.run_state import (
    META,
    RUN,
    abstract,
    numpy_state,
    on_mesh,
    open_checkpoints,
    sharding,
)

OLD = {
    "config": {
        "seed": 1,
        "log_every": 10,
        "mesh": {"data": 1, "fsdp": 8},
        "data": {"sets": {"bridge": {"weight": 1.0}}, "sizes": (1, 2)},
        "optim": {"lr": 1e-3},
    },
    "data_fingerprint": "aa",
    "trainable": ["vlm/a", "dit/c"],
}
KEYS = {
    "free": ("config.log_every", "config.mesh"),
    "data": ("config.data",),
    "optimizer": ("config.optim",),
}


def changed(**at):
    new = copy.deepcopy(OLD)
    for path, value in at.items():
        *parents, leaf = path.split("__")
        node = new
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return new


def refused(new, **flags):
    with pytest.raises(CheckpointError) as error:
        compare_runs(json.loads(json.dumps(OLD)), new, **KEYS, **flags)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_an_equal_run_goes_on():
    compare_runs(json.loads(json.dumps(OLD)), OLD)
    new = changed(config__log_every=1, config__mesh={"data": 8, "tensor": 2})
    compare_runs(OLD, new, **KEYS)


def test_every_change_is_named():
    new = changed(
        config__seed=2,
        config__new=None,
        config__data__sets={"droid": {"weight": 1.0}},
        data_fingerprint="bb",
        trainable=["vlm/a"],
        config__optim__lr=1e-4,
    )
    data, optimizer = "[--allow_data_change accepts it]", "[--restart_optimizer accepts it]"
    strict = ["config.new: 'absent' -> None", "config.seed: 1 -> 2"]
    data_lines = [
        f"config.data.sets.bridge.weight: 1.0 -> 'absent'  {data}",
        f"config.data.sets.droid.weight: 'absent' -> 1.0  {data}",
        f"data_fingerprint: 'aa' -> 'bb'  {data}",
    ]
    optimizer_lines = [
        f"config.optim.lr: 0.001 -> 0.0001  {optimizer}",
        f"trainable: ['vlm/a', 'dit/c'] -> ['vlm/a']  {optimizer}",
    ]
    assert refused(new) == sorted(strict + data_lines + optimizer_lines)
    assert refused(new, allow_data_change=True) == sorted(strict + optimizer_lines)
    assert refused(new, restart_optimizer=True) == sorted(strict + data_lines)
    new["config"] |= {"seed": 1}
    del new["config"]["new"]
    compare_runs(OLD, new, **KEYS, allow_data_change=True, restart_optimizer=True)


def test_a_run_from_before_a_key_goes_on_with_what_it_did():
    old = {"config": {"optim": {"groups": {"vlm": {"lr": 1.0}}}}}
    new = copy.deepcopy(old)
    new["config"]["optim"]["groups"]["vlm"]["rule"] = "adam"
    compare_runs(old, new)
    new["config"]["optim"]["groups"]["vlm"]["rule"] = "muon"
    with pytest.raises(CheckpointError, match="groups.vlm.rule: .*adam.*muon"):
        compare_runs(old, new)


def test_of_long_lists_only_the_difference_is_shown():
    old, new = ({"trainable": [f"p{i}" for i in range(start, start + 50)]} for start in (0, 2))
    with pytest.raises(CheckpointError, match="trainable: -p0, -p1, .p50, .p51  "):
        compare_runs(old, new)


@pytest.fixture
def workdir(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(on_mesh(numpy_state(step), make_mesh(1, 8, 1)), RUN)
    checkpoints.close()
    return tmp_path


def wanted(mesh, dtype=None):
    """The parameters of a model that has a bridge besides."""
    shapes = abstract(numpy_state(), mesh).all_params
    shapes["bridge"] = {"query": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    if dtype is not None:
        shapes["vlm"]["a"] = shapes["vlm"]["a"].update(dtype=dtype)
    return shapes


def test_stage_two_from_a_stage_one_run(workdir):
    mesh, host = make_mesh(2, 4, 1), numpy_state(2)
    start = init_from(workdir, wanted(mesh, jnp.bfloat16), ("vlm",))
    assert (start.step, start.fresh) == (2, ("bridge", "dit"))
    assert start.folder == workdir / "checkpoints/00000002" == find_checkpoint(start.folder)
    assert set(start.params) == {"vlm"}
    a = start.params["vlm"]["a"]
    assert a.dtype == jnp.bfloat16 and a.sharding == sharding(mesh, host.params["vlm"]["a"])
    assert np.array_equal(a, host.params["vlm"]["a"].astype(jnp.bfloat16))
    assert np.array_equal(start.params["vlm"]["visual"]["d"], host.frozen["vlm"]["visual"]["d"])
    start = init_from(workdir / "checkpoints/00000001", wanted(mesh))
    assert (start.step, start.fresh, set(start.params)) == (1, ("bridge",), {"vlm", "dit"})


def test_from_a_converted_checkpoint(tmp_path):
    leaves = [("vlm/a", np.ones((16, 8), np.float16)), ("extra/x", np.ones(2))]
    ckpt.write_checkpoint(tmp_path / "c", leaves, META, {})
    shapes = {"vlm": {"a": wanted(make_mesh(1, 8, 1))["vlm"]["a"]}}
    shapes["vlm"]["lora"] = dict.fromkeys(("down", "up"), shapes["vlm"]["a"])
    start = init_from(tmp_path / "c", shapes, may_be_fresh=("vlm/lora/(up|down)",))
    assert (start.step, start.fresh) == (None, ("vlm/lora/down", "vlm/lora/up"))
    assert start.params["vlm"]["a"].dtype == jnp.float32 and set(start.params["vlm"]) == {"a"}
    with pytest.raises(CheckpointError, match="vlm/lora/up: not in the checkpoint"):
        init_from(tmp_path / "c", shapes, may_be_fresh=("lora", "vlm/lora/down"))
    with pytest.raises(CheckpointError, match="it holds extra, vlm, this model none of that"):
        init_from(tmp_path / "c", {"dit": shapes["vlm"]})


def test_all_that_does_not_fit_is_listed(workdir):
    shapes = wanted(make_mesh(1, 8, 1))
    shapes["vlm"]["a"] = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    shapes["vlm"]["z"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    del shapes["vlm"]["visual"]
    with pytest.raises(CheckpointError) as error:
        init_from(workdir, shapes, ("vlm", "bridge", "dino"))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "dino: not in this model",
        "bridge: not in the checkpoint",
        "dino: not in the checkpoint",
        "params/vlm/a: float32[16, 8] in the checkpoint, float32[4, 4] in this run",
        "params/vlm/visual/d: not in this run",
        "params/vlm/z: not in the checkpoint",
    ]


def test_nothing_to_start_from(workdir):
    with pytest.raises(CheckpointError, match="absent: no complete checkpoint"):
        init_from(workdir / "absent", {})
    for step in (1, 2):
        (workdir / f"checkpoints/{step:08d}" / RUN_FILE).unlink()
    with pytest.raises(CheckpointError, match="no step in its checkpoints is complete"):
        init_from(workdir, {})


def run(main, *args):
    assert main([str(a) for a in args]) == 0


@pytest.fixture
def converted_and_step(tmp_path):
    """A converted policy, and the same saved as a step of a run."""
    pytest.importorskip("torch")
    from convert_weights import to_jax
    from tests.reference import checkpoints as tiny

    weights, _ = tiny.run_folder(tmp_path)
    converted, statistics = tmp_path / "converted", tmp_path / "statistics.json"
    statistics.write_text(json.dumps(tiny.STATISTICS))
    run(to_jax.main, "--st4vla", weights, "--statistics", statistics, "--out", converted)
    params, frozen = split(ckpt.read_params(converted), lambda path: not path.startswith("dino"))
    state = TrainState(np.int32(70), params, frozen, (), None, np.int32(0))
    files = {
        str(path.relative_to(converted / "meta")): path
        for path in (converted / "meta").rglob("*")
        if path.is_file() and path != converted / ckpt.META
    }
    meta = ckpt.read_meta(converted)
    checkpoints = TrainCheckpoints(tmp_path / "w", CheckpointSettings(), meta, files)
    checkpoints.save(on_mesh(state, make_mesh(1, 8, 1)), RUN)
    checkpoints.close()
    return converted, tmp_path / "w/checkpoints/00000070"


@pytest.mark.parity
def test_converters_read_a_step(converted_and_step, tmp_path):
    from convert_weights import to_torch, verify
    from tests.reference import checkpoints as tiny

    run(verify.main, *converted_and_step)
    exported = []
    for folder in converted_and_step:
        out = tmp_path / f"{folder.name}.torch"
        run(to_torch.main, "--checkpoint", folder, "--out", out, "--format", "upstream",
            "--safetensors", "--allow-custom-sizes")  # fmt: skip
        exported.append(tiny.disk_state(out / "checkpoints"))
    tiny.same_tensors(*exported)


@pytest.mark.slow
def test_predict_reads_a_step(converted_and_step, tmp_path):
    image, noise, out = (tmp_path / name for name in ("a.png", "noise.npy", "out.json"))
    Image.fromarray(np.full((60, 90, 3), 99, np.uint8)).save(image)
    found = []
    for folder in converted_and_step:
        model = ckpt.read_meta(folder).model
        np.save(noise, np.ones((1, model.dit.chunk, model.dit.action_dim), np.float32))
        run(predict.main, "action", "--checkpoint", folder, "--image", image, "--instruction",
            "go", "--noise", noise, "--out", out)  # fmt: skip
        found.append(json.loads(out.read_text())["actions"])
    assert found[0] == found[1]
