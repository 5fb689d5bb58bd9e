"""launch/tpu_vm.sh: what it prints, and what it does on this machine behind a fake gcloud."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"NAME": "pod", "PROJECT": "proj", "ZONE": "us-east5-a", "TYPE": "v5p-128"}
WHERE = "--project=proj --zone=us-east5-a"

# Runs ssh's command here, in HOME; takes the queued resource's states from a file, the last of
# which stays; notes every call.
GCLOUD = r"""#!/usr/bin/env bash
echo "$3 $4 $5" >> "$HOME/calls"
for arg in "$@"; do
    case $arg in --command=*) cd "$HOME" && exec bash -c "${arg#--command=}" ;; esac
done
if [[ $4 == describe ]]; then
    head -n 1 "$HOME/states"
    [[ $(wc -l < "$HOME/states") -le 1 ]] || sed -i 1d "$HOME/states"
fi
"""
# Stands for the training: saves and asks for a restart the first time, or when told to stop.
PYTHON = r"""#!/usr/bin/env bash
echo "$PLATFORM|$*|$LIBTPU_INIT_ARGS"
if [[ ! -e started ]]; then touch started; exit 75; fi
trap 'echo saved; exit 75' TERM
for i in $(seq 100); do [[ -e finish ]] && exit "$(cat finish)"; sleep 0.05; done
"""


def launch(*args, home=None, **settings):
    env = {"PATH": os.environ["PATH"], "HOME": str(home or "/nonexistent")} | settings
    if home:
        env["PATH"] = f"{home / 'bin'}:{env['PATH']}"
    command = ["bash", str(ROOT / "launch" / "tpu_vm.sh"), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def printed(*args, **settings):
    """Commands that a dry run prints, with quotes resolved."""
    result = launch(*args, DRY_RUN="1", **SETTINGS, **settings)
    assert result.returncode == 0, result.stderr
    script = "".join(
        f"printf '%s ' {line[2:]}; echo\n"
        for line in result.stderr.splitlines()
        if line[:2] == "+ "
    )
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
    return [" ".join(c.split(" ")) for c in shown.stdout.split(" \n") if c.strip()]


def test_create_asks_for_a_queued_resource():
    (command,) = printed("create")
    assert command == (
        "gcloud compute tpus queued-resources create pod --accelerator-type=v5p-128 "
        f"--runtime-version=v2-alpha-tpuv5 --node-id=pod {WHERE}"
    )


def test_create_of_several_preemptible_slices_with_a_disk():
    (command,) = printed("create", SLICES="2", SPOT="1", DATA_DISK="oxe", VERSION="image")
    assert "--runtime-version=image --node-count=2 --node-prefix=pod --spot" in command
    assert "--data-disk=source=projects/proj/zones/us-east5-a/disks/oxe,mode=read-only" in command


@pytest.mark.parametrize(
    "accelerator,image",
    [("v5litepod-64", "v2-alpha-tpuv5-lite"), ("v6e-64", "v2-alpha-tpuv6e")],
)
def test_image_follows_the_type(accelerator, image):
    result = launch("create", DRY_RUN="1", **SETTINGS | {"TYPE": accelerator})
    assert f"--runtime-version={image} " in result.stderr


def test_install_copies_this_revision_and_mounts_disks():
    bundle, copy, ssh = printed("install", NFS="10.0.0.2:/st4vla", DATA_DISK="oxe")
    assert bundle.startswith("git bundle create") and bundle.endswith("HEAD")
    assert copy.startswith("gcloud compute tpus tpu-vm scp /") and "--worker=all" in copy
    assert "sudo mount -t nfs '10.0.0.2:/st4vla' /mnt/st4vla" in ssh
    assert "/dev/disk/by-id/google-persistent-disk-1 /mnt/data" in ssh
    assert ".venv/bin/python '.[tpu]'" in ssh
    assert "mount" not in printed("install")[2]


def test_run_starts_every_slice_detached_with_the_cache():
    commands = printed("run", "--config=c.py", "--workdir=/mnt/a b", SLICES="2", CACHE="gs://b/c")
    assert [c.split(" ssh ")[1].split(" ")[0] for c in commands] == ["pod-0", "pod-1"]
    line = (
        r"launch/run_forever.sh --config=c.py --workdir=/mnt/a\ b --config.log.cache_dir=gs://b/c"
    )
    assert all(line in c and "nohup setsid" in c and "--worker=all" in c for c in commands)


def test_logs_stop_and_delete():
    assert (
        "--worker=3 --command=tail -n 100 -F st4vla_jax/train.log" in printed("logs", WORKER="3")[0]
    )
    assert "kill -TERM $(cat run.pid)" in printed("stop")[0]
    assert printed("delete") == [
        f"gcloud compute tpus queued-resources delete pod --force --quiet {WHERE}"
    ]


def test_keep_prints_all_steps():
    commands = printed("keep", "--config=c", "--workdir=w")
    verbs = ["tpus queued-resources create", "git bundle", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    assert len(commands) == len(verbs)
    assert all(verb in command for verb, command in zip(verbs, commands, strict=True))


@pytest.mark.parametrize(
    "args,settings,message",
    [
        ([], {}, "keep      create, install and run"),
        (["create"], {"NAME": "pod"}, "not set: PROJECT ZONE"),
        (["create"], {k: v for k, v in SETTINGS.items() if k != "TYPE"}, "not set: TYPE"),
        (["create"], SETTINGS | {"TYPE": "v5e-64"}, "need v4-N, v5litepod-N, v5p-N or v6e-N"),
        (["run"], SETTINGS, "run needs the flags of train"),
        (["stop", "now"], SETTINGS, "stop takes no flags"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked_for(args, settings, message):
    result = launch(*args, DRY_RUN="1", **settings)
    assert result.returncode == 2 and message in result.stderr
    assert "+ gcloud" not in result.stderr


@pytest.fixture
def host(tmp_path):
    """A home folder as `install` leaves it, whose gcloud is a fake and whose training a script."""
    checkout = tmp_path / "st4vla_jax"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    files = {"bin/gcloud": GCLOUD, "st4vla_jax/.venv/bin/python": PYTHON, "states": "ACTIVE\n"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    yield tmp_path
    (checkout / "finish").write_text("0")  # lets a training that a failed test left behind end


def wait_for(path, text="", seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(
        f"{path.name} has no {text!r}: {path.read_text() if path.exists() else None}"
    )


FAST = SETTINGS | {"RESTART_DELAY_S": "0", "POLL_S": "0.1"}
FLAGS = ("--config=configs/a.py", "--workdir=/mnt/a b")


def test_run_restarts_stops_and_reports(host):
    checkout = host / "st4vla_jax"
    assert launch("run", *FLAGS, home=host, **FAST).returncode == 0
    wait_for(checkout / "train.log", "ended with 75")
    line = "tpu|-m st4vla_jax.train --config=configs/a.py --workdir=/mnt/a b|--xla_tpu_"
    log = wait_for(checkout / "train.log", "starting again")
    assert line in log

    again = launch("run", *FLAGS, home=host, **FAST)
    assert again.returncode == 1 and "training runs here: stop it first" in again.stderr
    assert "training" in launch("status", home=host, **FAST).stdout

    time.sleep(0.3)  # the second start's trap
    assert launch("stop", home=host, **FAST).returncode == 0
    assert wait_for(checkout / "run.status", "\n") == "75\n"
    log = (checkout / "train.log").read_text()
    assert log.count("-m st4vla_jax.train") == 2 and "saved" in log
    assert "ended with 75" in launch("status", home=host, **FAST).stdout


def test_keep_asks_again_after_a_preemption_and_ends_with_the_training(host):
    # `install` would replace the checkout and build an environment.
    checkout = host / "st4vla_jax"
    (checkout / "started").touch()
    (checkout / "finish").write_text("0")
    (host / "states").write_text("ACTIVE\nSUSPENDED\nSUSPENDED\nWAITING_FOR_RESOURCES\nACTIVE\n")
    script = checkout / "launch" / "tpu_vm.sh"
    script.write_text(script.read_text().replace("\ninstall() {", "\ninstall() {\n    return 0"))
    env = {"PATH": f"{host / 'bin'}:{os.environ['PATH']}", "HOME": str(host)} | FAST
    result = subprocess.run(
        ["bash", str(script), "keep", *FLAGS], env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "training is done" in result.stderr
    calls = (host / "calls").read_text().splitlines()
    assert calls.count("queued-resources delete pod") == 1
    assert calls.index("queued-resources create pod") > calls.index("queued-resources delete pod")


def test_keep_tells_a_failed_training(host):
    checkout = host / "st4vla_jax"
    (checkout / "run.status").write_text("1\n")
    result = launch("keep", *FLAGS, home=host, **FAST)
    assert result.returncode == 2 and "training ended with 1" in result.stderr


def readme_lines(script):
    """Command lines of launch/README.md that start a script, continued lines joined."""
    text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if f"bash launch/{script}" in line and not line.startswith("|")]


@pytest.mark.parametrize("line", readme_lines("tpu_vm.sh"))
def test_the_readmes_lines_are_understood(line):
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DRY_RUN": "1"} | SETTINGS
    result = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and "+ gcloud" in result.stderr


def test_the_readme_names_every_command():
    named = {line.split("tpu_vm.sh ")[1].split(" ")[0] for line in readme_lines("tpu_vm.sh")}
    commands = launch().stderr.split("Settings")[0].splitlines()
    assert named == {line.split()[0] for line in commands if line.startswith("  ")}
