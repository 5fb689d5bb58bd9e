"""Real runs with what is off by default: adapters, moving average, full disk, trace, one batch."""

import resource
import shutil

import numpy as np
import pytest

from convert_weights import averaged, to_torch
from st4vla_jax.checkpoint import iter_params, read_meta
from st4vla_jax.evaluate import run_config
from st4vla_jax.metrics import read_metrics
from st4vla_jax.models.lora import merged_kernel
from st4vla_jax.resume import find_checkpoint
from st4vla_jax.train_checkpoints import complete_steps
from tests.reference import runs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("runs")]

# Keys below config.lora are names of the user's choice: a config file has them, no flag.
CONFIG = """
from configs import tabletop


def get_config(stage):
    config = tabletop.get_config(stage)
    pattern = "vlm/language_model/blocks/self_attn/[qkvo]_proj"
    config.lora = {"attention": {"pattern": pattern, "rank": 4}}
    groups = config.optim.groups
    groups.vlm.freeze = groups.words.freeze = True
    groups.adapters = {**groups.dit, "pattern": "vlm/.*/lora_[ab]$"}
    config.optim.ema = 0.5
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return runs.place(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.whole(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def adapted(place):
    """Arguments of a run of adapters with a moving average, and its workdir after the last step."""
    folder, args = place
    (folder / "adapted.py").write_text(CONFIG)
    file = folder / "adapted.py"
    # A kernel's adapter starts at zero and the first step of the warm-up does nothing.
    settings = {"config": file, "save_every": 1, "checkpoint.keep_last": 9, "optim.warmup": 0}
    status, output = runs.run(args("adapted", **settings))
    assert status == 0, output
    return lambda name: args(name, **settings), folder / "adapted"


def test_only_adapters_of_a_frozen_vlm_are_trained(adapted):
    first, last = (
        dict(iter_params(adapted[1] / f"checkpoints/{step:08d}")) for step in (1, runs.STEPS)
    )
    assert first.keys() == last.keys()
    changed = {path for path in first if not np.array_equal(first[path], last[path])}
    module = "vlm/language_model/blocks/self_attn/"
    adapters = {f"{module}{n}_proj/lora_{side}" for n in "qkvo" for side in "ab"}
    assert {path for path in changed if path.startswith("vlm/")} == adapters
    assert any(path.startswith("dit/") for path in changed)
    trained = {path for path in runs.arrays(adapted[1], runs.STEPS) if "/mu/vlm/" in path}
    assert {path.partition("/mu/")[2] for path in trained} == adapters
    lines = read_metrics(adapted[1])
    assert all(line["grad/vlm/language_model"] > 0 for line in lines)
    assert not any("grad/vlm/visual" in line for line in lines)


def test_adapters_and_averages_go_on_bitwise(place, adapted):
    args, workdir = adapted
    again = place[0] / "adapted_again"
    process = runs.start(args("adapted_again"))
    runs.wait_until(lambda: complete_steps(again / "checkpoints"), [process])
    process.kill()
    runs.finish(process)
    killed_at = complete_steps(again / "checkpoints")[-1]
    assert killed_at < runs.STEPS
    status, output = runs.run(args("adapted_again"))
    assert status == 0 and f"resumed at step {killed_at} " in output, output
    got, want = (runs.arrays(folder, runs.STEPS) for folder in (again, workdir))
    assert any(path.startswith("ema/vlm/language_model") for path in want)
    runs.same_arrays(got, want)
    assert runs.numbers(again) == runs.numbers(workdir)


def test_the_average_is_one(adapted):
    """ema = 0.5 ema + 0.5 params after each step, of trainable parameters alone."""
    before, after = (runs.arrays(adapted[1], step) for step in (3, 4))
    averages = [path for path in after if path.startswith("ema/")]
    assert len(averages) == len([path for path in after if "/mu/" in path])
    for path in averages:
        params = after["params/" + path.removeprefix("ema/")]
        want = 0.5 * np.float64(before[path]) + 0.5 * params
        rounding = np.finfo(np.float32).eps * np.abs(want).max()
        np.testing.assert_allclose(after[path], want, rtol=0, atol=rounding, err_msg=path)


def test_averaged_weights_become_a_checkpoint(tmp_path, adapted, capsys):
    command = ["--checkpoint", str(adapted[1]), "--out", str(tmp_path / "policy")]
    assert averaged.main(command) == 0
    stored, found = runs.arrays(adapted[1], runs.STEPS), dict(iter_params(tmp_path / "policy"))
    assert {f"params/{path}" for path in found} == {p for p in stored if p.startswith("params/")}
    means = [path for path in found if f"ema/{path}" in stored]
    assert any(np.any(found[path] != stored[f"params/{path}"]) for path in means)
    for path, value in found.items():
        want = stored[f"ema/{path}" if path in means else f"params/{path}"]
        np.testing.assert_array_equal(value, want, err_msg=path)
    assert read_meta(tmp_path / "policy") == read_meta(find_checkpoint(adapted[1]))
    assert run_config(tmp_path / "policy") == run_config(find_checkpoint(adapted[1]))
    assert averaged.main(command) == 1 and "already there" in capsys.readouterr().err


def test_a_run_without_averages(tmp_path, whole, capsys):
    assert averaged.main(["--checkpoint", str(whole), "--out", str(tmp_path / "policy")]) == 1
    assert "keeps no moving average; train with optim.ema" in capsys.readouterr().err


def test_export_folds_the_adapters(tmp_path, adapted):
    from safetensors.numpy import load_file

    folder = adapted[1] / f"checkpoints/{runs.STEPS:08d}"
    command = ["--checkpoint", str(folder), "--out", str(tmp_path / "hf"), "--format", "hf",
               "--allow-custom-sizes"]  # fmt: skip
    assert to_torch.main(command) == 0
    found = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        found |= load_file(file)
    assert not any("lora" in key for key in found)
    params = dict(iter_params(folder))
    module = "vlm/language_model/blocks/self_attn/q_proj/"
    leaves = [params[module + name] for name in ("kernel", "lora_a", "lora_b")]
    kernel = merged_kernel(*leaves)  # [layers,D,N,H]
    assert not np.array_equal(kernel, leaves[0])
    for layer, own in enumerate(kernel):
        weight = found[f"model.layers.{layer}.self_attn.q_proj.weight"]  # [N*H,D]
        np.testing.assert_array_equal(weight, own.reshape(own.shape[0], -1).T)


def test_a_full_disk_leaves_the_last_checkpoint(place, whole):
    folder, args = place
    workdir = folder / "full"
    shutil.copytree(whole, workdir)
    before = runs.arrays(workdir, runs.STEPS)
    limit = 300_000  # bytes of one file: less than a parameter's
    status, output = runs.run(
        args("full", steps=runs.STEPS + 2, save_every=1),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert status == 1, output
    # Orbax's own log of its background thread stands above it, or below.
    last = next((line for line in output.splitlines() if line.startswith("error: ")), "")
    assert "(no room on the disk?)" in last, output
    assert f"step {runs.STEPS} is complete" in last
    assert complete_steps(workdir / "checkpoints")[-1] == runs.STEPS
    runs.same_arrays(runs.arrays(workdir, runs.STEPS), before)
    assert [path.name for path in (workdir / "checkpoints").glob("*tmp*")] == []


def test_profile_writes_a_trace(place, whole):
    folder, args = place
    status, output = runs.run(args("traced", "--profile=2:3"))
    assert status == 0 and "trace: " in output, output
    assert list((folder / "traced/profile").rglob("*.xplane.pb"))
    runs.same_arrays(runs.arrays(folder / "traced", runs.STEPS), runs.arrays(whole, runs.STEPS))


def test_one_batch_is_learned(place):
    folder, args = place
    settings = {
        "steps": 60, "save_every": 60, "log.every": 10, "optim.warmup": 5,
        "optim.groups.vlm.lr": 2e-3, "log.wandb": "project",
        "log.wandb_mode": "offline", "evaluation.samples": 2,
    }  # fmt: skip
    status, output = runs.run(args("one", "--overfit_one_batch", **settings))
    assert status == 0, output
    lines = [line for line in read_metrics(folder / "one") if "loss/text" in line]
    assert lines[-1]["loss/text"] < 0.6 * lines[0]["loss/text"]
    assert any("fit/text_loss" in line for line in read_metrics(folder / "one"))
    assert "wandb is not installed" in output or (folder / "one/wandb").is_dir()
