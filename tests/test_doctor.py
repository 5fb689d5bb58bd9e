"""Doctor: each finding on a machine made wrong on purpose; the command as a user runs it."""

import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections import namedtuple

import jax
import numpy as np
import pytest
from PIL import Image

from configs.common import tiny, train_config, vlm_alone
from st4vla_jax import doctor, doctor_config
from st4vla_jax.data.settings import open_source
from st4vla_jax.data.tokenizer import byte_level_tokenizer
from st4vla_jax.train_config import TrainConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in (*doctor._PROCESS_VARIABLES, *doctor._LAUNCHERS.values(), "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def records(folder):
    """One grounding record about one picture."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cup"}]
    path = folder / "r.json"
    path.write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    return path


def grounding_config(tmp_path, **changes):
    entry = {"kind": "grounding", "path": str(records(tmp_path / "data"))}
    config = vlm_alone(tiny(train_config(cups=entry)))
    config.data.index_dir = str(tmp_path / "index")
    config.update_from_flattened_dict(changes)
    return TrainConfig.from_dict(config)


def only(findings):
    (found,) = findings
    return found


# --- Software -----------------------------------------------------------------------------------


def test_this_environment_is_fine():
    found = list(doctor.versions())
    names = {f.check for f in found}
    assert {"python", "jax", "jaxlib", "flax", "orbax-checkpoint", "grain"} <= names
    assert not [f for f in found if f.status == "fail"]
    assert not names & {"torch", "pytest", "av"}  # extras


@pytest.mark.parametrize(
    "package,version,status",
    [
        ("jax", "0.9.2", "fail"), ("jax", "0.10.1", "ok"), ("jax", "0.12.0", "fail"),
        ("jaxlib", "0.4.1", "fail"), ("grain", None, "fail"), ("wandb", None, "warn"),
    ],
)  # fmt: skip
def test_versions(monkeypatch, package, version, status):
    real = importlib.metadata.version

    def fake(name):
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    found = {f.check: f for f in doctor.versions()}[package]
    assert found.status == status
    assert (f"pip install '{package}" in found.advice) == (status != "ok")


# --- Machine ------------------------------------------------------------------------------------


def probe(monkeypatch, **result):
    """Lets the device process end like this; an exception is raised."""

    def run(*args, **kwargs):
        if "error" in result:
            raise result["error"]
        return subprocess.CompletedProcess(args, result["code"], result["out"], result["err"])

    monkeypatch.setattr(subprocess, "run", run)
    return list(doctor.devices(5))


def answer(backend, **device):
    entry = {"id": 3, "kind": "TPU v5 lite", "limit": 2**34, "error": "", "ms": 1.0} | device
    return "a log line\n" + json.dumps({"backend": backend, "devices": [entry]}) + "\n"


def test_devices_that_hang_crash_or_compute_wrongly(monkeypatch):
    hanging = only(probe(monkeypatch, error=subprocess.TimeoutExpired("x", 5)))
    assert hanging.status == "fail" and "no answer within 5 s" in hanging.text
    crashed = only(probe(monkeypatch, code=-6, out="", err="one\nRuntimeError: no TPU"))
    assert crashed.status == "fail" and crashed.text.endswith("RuntimeError: no TPU")
    wrong = probe(
        monkeypatch, code=0, out=answer("tpu", error="its matrix product is wrong"), err=""
    )
    assert wrong[0].status == "fail" and "TPU v5 lite (tpu, 16.0 GiB): its matrix" in wrong[0].text
    fine = probe(monkeypatch, code=0, out=answer("tpu"), err="")
    assert fine[0].status == "ok" and not [f for f in fine if f.status != "ok"]


def test_unknown_peak_and_unused_hardware(monkeypatch, tmp_path):
    odd = probe(monkeypatch, code=0, out=answer("gpu", kind="NVIDIA Moon"), err="")
    assert [f.text for f in odd if f.status == "warn"] == [
        "the peak of 'NVIDIA Moon' is not known: MFU is not reported"
    ]
    (tmp_path / "nvidia").touch()
    files = {"an NVIDIA GPU": (str(tmp_path / "nvidia"),), "a TPU": ("/nowhere",)}
    monkeypatch.setattr(doctor, "_ACCELERATOR_FILES", files)
    unused = probe(monkeypatch, code=0, out=answer("cpu", kind="cpu"), err="")
    (warned,) = [f for f in unused if f.status == "warn"]
    assert warned.text == "an NVIDIA GPU is there, but jax uses cpu" and "[cuda]" in warned.advice
    assert not [f for f in probe(monkeypatch, code=0, out=answer("gpu", kind="NVIDIA L4"), err="")
                if f.status == "warn"]  # fmt: skip


def test_the_product_of_every_device_is_checked(monkeypatch, capsys):
    doctor.probe_devices()
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "cpu" and len(found["devices"]) == len(jax.local_devices())
    assert not any(d["error"] for d in found["devices"])
    monkeypatch.setattr(jax.numpy, "dot", lambda x, y, **_: x + y)
    doctor.probe_devices()
    found = json.loads(capsys.readouterr().out)
    assert {d["error"] for d in found["devices"]} == {"its matrix product is wrong"}


@pytest.mark.parametrize(
    "coordinator,count,index,status,text",
    [
        ("", "", "", "ok", "one (no settings of more)"),
        ("localhost:1234", "4", "3", "ok", "process 3 of 4, coordinator at localhost"),
        ("localhost:1234", "4", "4", "fail", "process 4 of 4 makes no sense"),
        ("localhost:1234", "", "0", "fail", "JAX_NUM_PROCESSES is not set"),
        ("host.invalid:1", "2", "0", "fail", "coordinator's host 'host.invalid' is not found"),
    ],
)
def test_processes(monkeypatch, coordinator, count, index, status, text):
    for name, value in zip(doctor._PROCESS_VARIABLES, (coordinator, count, index), strict=True):
        monkeypatch.setenv(name, value)
    found = only(doctor.processes())
    assert found.status == status and text in found.text


def test_launchers(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert only(doctor.processes()).text == "several, started by SLURM"


def test_host(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(doctor, "_memory", lambda: (2**34, 2**31))
    cores, memory = doctor.host(grounding_config(tmp_path, **{"data.threads": 64}))
    assert cores.status == "warn" and cores.text == "2 cores for 64 reader threads (data.threads)"
    assert memory.status == "warn" and memory.text == "2.0 of 16.0 GiB are free"
    assert [f.status for f in doctor.host(None)] == ["ok", "warn"]


def test_memory_of_this_machine():
    total, free = doctor._memory()
    assert 0 < free <= total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_folder(monkeypatch, tmp_path):
    new = tmp_path / "a" / "b"
    assert only(doctor.folder("workdir", new)).status == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    blocked = only(doctor.folder("workdir", tmp_path / "file" / "run"))
    assert blocked.status == "fail" and "cannot be written" in blocked.text
    usage = namedtuple("usage", "total used free")(100, 0, 3 * 2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert only(doctor.folder("workdir", new, 2 * 2**30)).status == "ok"
    low = only(doctor.folder("workdir", new, 4 * 2**30))
    assert low.status == "warn" and "3.0 GiB free (needed: about 4.0 GiB)" in low.text


# --- What a config asks for ---------------------------------------------------------------------


def test_size_of_checkpoints(tmp_path):
    config = grounding_config(tmp_path, **{"optim.ema": 0.9, "checkpoint.keep_last": 2})
    with open(os.path.join(ROOT, "tests/golden/params_tiny.json")) as file:
        shapes = json.load(file)
    count = sum(math.prod(entry[0]) for path, entry in shapes.items() if path.startswith("vlm/"))
    assert doctor_config.parameters(config) == (count, 0)
    # Parameter, two moments and average of 4 bytes; frozen ones have the first alone.
    assert doctor_config.checkpoint_bytes(config, 10, 7) == 3 * (10 * 16 + 7 * 4)
    half = grounding_config(tmp_path, **{"optim.mu_dtype": "bfloat16", "checkpoint.keep_last": 1})
    assert doctor_config.checkpoint_bytes(half, 10, 0) == 2 * 10 * 10


def test_groups_that_do_not_cover_the_model(tmp_path):
    config = grounding_config(tmp_path)
    few = {"vlm": dataclasses.replace(config.optim.groups["vlm"], pattern="vlm/visual/")}
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, groups=few))
    found = {f.check: f for f in doctor_config.examine(config, tmp_path)}
    assert found["model"].status == "fail"
    assert found["model"].text.count("vlm/language_model") > 10
    assert found["workdir"].status == "ok"


def test_index_of_grounding_data(tmp_path):
    config = grounding_config(tmp_path)
    entry = config.data.sets[0]

    def text():
        found = only(doctor_config.data_set(entry, config.data))
        assert found.status == "ok"
        return found.text

    assert "no index yet" in text()
    assert not (tmp_path / "index").exists()
    open_source(entry, config.data)
    assert f"indexed in {tmp_path / 'index'}" in text()
    path = tmp_path / "data" / "r.json"
    path.write_text(path.read_text() + "\n")
    assert "changed since it was indexed" in text()
    path.unlink()
    gone = only(doctor_config.data_set(entry, config.data))
    assert gone.status == "fail" and str(path) in gone.text and "data.sets.cups" in gone.advice


def test_index_of_robot_data(shared, tmp_path):
    bridge = {
        "kind": "rlds", "path": str(shared / "data/bridge_dataset"), "spec": "bridge_orig"
    }  # fmt: skip
    config = tiny(train_config(bridge=bridge))
    config.data.index_dir = str(tmp_path)
    config.data.schedule.grounding_samples = 0
    settings = TrainConfig.from_dict(config).data
    assert "no index yet" in only(doctor_config.data_set(settings.sets[0], settings)).text
    open_source(settings.sets[0], settings)
    assert "1 files of 3.3 MiB, indexed in" in (
        only(doctor_config.data_set(settings.sets[0], settings)).text
    )


def test_tokenizer(tmp_path):
    fine = only(doctor_config.tokenizer(grounding_config(tmp_path)))
    assert fine.status == "ok" and "278 tokens for 320 rows" in fine.text
    big = only(doctor_config.tokenizer(grounding_config(tmp_path, **{"model.vlm": "3b"})))
    assert big.status == "warn" and "convert_weights.tokenizer" in big.advice
    tiny_model = grounding_config(tmp_path).model
    text = dataclasses.replace(tiny_model.text, vocab_size=200)
    small = dataclasses.replace(
        grounding_config(tmp_path), model=dataclasses.replace(tiny_model, text=text)
    )
    assert only(doctor_config.tokenizer(small)).status == "fail"
    byte_level_tokenizer().save(tmp_path / "tok")
    given = grounding_config(tmp_path, **{"data.tokenizer": str(tmp_path / "tok")})
    assert only(doctor_config.tokenizer(given)).status == "ok"


def test_weights(tmp_path):
    assert only(doctor_config.weights(grounding_config(tmp_path))).text == "fresh: vlm"
    big = only(doctor_config.weights(grounding_config(tmp_path, **{"model.vlm": "3b"})))
    assert big.status == "warn" and "init.checkpoint" in big.advice
    config = grounding_config(tmp_path, **{"init.checkpoint": str(tmp_path / "none")})
    found = {f.check: f for f in doctor_config.examine(config, None)}
    assert found["weights"].status == found["tokenizer"].status == "fail"
    assert "none" in found["weights"].text and found["data cups"].status == "ok"


def test_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert only(doctor_config.wandb("online")).status == "warn"
    assert only(doctor_config.wandb("offline")).status == "ok"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert only(doctor_config.wandb("online")).status == "ok"
    monkeypatch.setattr(doctor_config.importlib.util, "find_spec", lambda _: None)
    assert "not installed" in only(doctor_config.wandb("online")).text


# --- The command --------------------------------------------------------------------------------


def test_the_command(tmp_path):
    """As a user runs it, on a config with one wrong path: one failure, exit status 1."""
    config = tmp_path / "config.py"
    config.write_text(
        "from configs.common import tiny, train_config, vlm_alone\n"
        "def get_config():\n"
        "    entry = {'kind': 'grounding', 'path': 'missing.json'}\n"
        "    return vlm_alone(tiny(train_config(cups=entry)))\n"
    )
    command = [sys.executable, "-m", "st4vla_jax.doctor", "--json"]
    arguments = [f"--config={config}", "--config.steps=7", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        command + arguments, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    found = {f["check"]: f for f in json.loads(done.stdout)}
    failed = [check for check, f in found.items() if f["status"] == "fail"]
    assert done.returncode == 1 and failed == ["data cups"], done.stderr
    assert found["config"]["text"] == "7 steps" and found["device 0"]["status"] == "ok"
    assert found["workdir"]["status"] == "ok" and not (tmp_path / "run").exists()


def test_lines_and_exit_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "devices", lambda: iter([doctor.Finding("d", "warn", "x", "y")]))
    assert doctor.main(["--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\nwarn  d: x\n          -> y\n" in out and "1 warn, 0 fail" in out
    assert doctor.main(["--config=/nowhere.py"]) == 1
    assert "fail  config: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main(["--wrkdir=x"])
    assert "unknown: --wrkdir=x" in capsys.readouterr().err


def test_a_check_that_breaks_is_a_finding():
    def broken():
        yield doctor.Finding("a", "ok", "b")
        raise RuntimeError("one\ntwo")

    first, second = doctor.look("mine", broken)
    assert first.status == "ok" and second.status == "fail" and second.check == "mine"
    assert second.text == "RuntimeError: one\n          two"


def test_importing_it_imports_no_jax():
    code = "import sys; from st4vla_jax import doctor; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
