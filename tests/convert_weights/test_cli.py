"""Commands end in order: expected errors are messages, a signal leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert_weights.cli import ERRORS, command
from convert_weights.st4vla import policy_rules
from st4vla_jax.checkpoint import Meta, write_checkpoint
from st4vla_jax.config import model_config
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.prompts import PromptConfig
from tests.reference import checkpoints as tiny

ROOT = Path(__file__).parents[2]

# Writes parameters without end, so that a signal always comes in the midst of Orbax's threads.
TO_JAX = """
import itertools, sys
import numpy as np
from convert_weights import to_jax
from st4vla_jax import checkpoint
checkpoint._GROUP_BYTES = 1 << 20
array = np.zeros(1 << 18, np.float32)
to_jax.leaves = lambda *_: ((f"x/p{i}", array) for i in itertools.count())
sys.exit(to_jax.main(sys.argv[1:]))
"""
# Stops within the weights of the run folder.
TO_TORCH = """
import sys, time
from convert_weights import safetensors_io, to_torch
safetensors_io.SafetensorsWriter.write = lambda *_: time.sleep(60)
sys.exit(to_torch.main(sys.argv[1:]))
"""


def test_expected_errors_are_one_message(capsys):
    for kind in ERRORS:

        @command
        def main(argv=None, kind=kind):
            raise kind("what to do")

        assert main([]) == 1
        assert capsys.readouterr().err == "error: what to do\n"

    @command
    def mistake(argv=None):
        raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        mistake()
    assert signal.getsignal(signal.SIGTERM) is before


def appeared(folder, pattern):
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # Orbax renamed a folder that is being looked through
        return False


@pytest.mark.parametrize(
    ("script", "number"),
    [(TO_JAX, signal.SIGTERM), (TO_JAX, signal.SIGINT), (TO_TORCH, signal.SIGTERM)],
    ids=["to_jax-term", "to_jax-int", "to_torch-term"],
)
def test_a_signal_leaves_nothing_behind(tmp_path, script, number):
    target = tmp_path / "target"
    target.mkdir()
    if script is TO_JAX:
        tiny.hf_folder(tmp_path / "hf")
        args = ["--vlm", tmp_path / "hf"]
        halfway = "**/.out.*.tmp/params.session*/**/ocdbt*/**/*"  # Orbax is at work
    else:
        cfg = model_config("tiny", None, None)
        zeros = [(r.jax, np.zeros(r.jax_shape, np.float32)) for r in policy_rules(cfg)]
        write_checkpoint(tmp_path / "c", zeros, Meta(cfg, PromptConfig(), ImageConfig()), {})
        args = ["--checkpoint", tmp_path / "c", "--format", "hf"]
        halfway = "**/.out.*.tmp"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--out", target / "out", *args],
        start_new_session=True, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not appeared(target, halfway):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, errors
    # tensorstore's threads may complain that Orbax's event loop was closed under them.
    ours = [f'File "{ROOT}/{folder}' for folder in ("convert_weights", "st4vla_jax")]
    assert not any(place in errors for place in ours), errors
    assert list(target.iterdir()) == []
