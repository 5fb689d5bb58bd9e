"""The presets of configs/tpu.py, and the table of what the compiler said about them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import tpu
from configs.tpu import PRESETS
from st4vla_jax import plan_presets
from st4vla_jax.chips import parse_slice
from st4vla_jax.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fill_their_slices(name):
    topology, slices, mesh, samples, *_ = PRESETS[name]
    found = parse_slice(topology, slices)
    config = TrainConfig.from_dict(tpu.get_config(name))
    assert math.prod(mesh) == found.chips
    assert mesh[0] % slices == 0  # only the data axis crosses slices
    model, chip, count, *_ = name.split("-")
    assert (model, chip) == (config.tree["model"]["vlm"], found.chip.name)
    assert math.prod(map(int, count.split("x"))) == found.chips
    schedule = config.data.schedule
    assert (schedule.robot_samples, schedule.grounding_samples) == samples
    assert sum(samples) >= mesh[0] * mesh[1]


def test_the_paper_on_both_small_slices():
    slices = {entry[0] for entry in PRESETS.values() if entry[3] == (256, 64)}
    assert {"v5e:8x8", "v5p:4x4x4"} <= slices


COMPILED = {
    "peak_bytes": 7.5 * 2**30, "hbm_bytes": 15.75 * 2**30, "bound": 0.312, "step_s": 0.16,
    "host_bytes": 4.8 * 2**30,
    "collectives": {"all-gather": {"bytes": 7e9}, "all-reduce": {"bytes": 1e9}},
}  # fmt: skip


def test_table():
    batch = {"sequences": 64, "tokens": 704}
    found = {
        "3b-v5e-64": {"batch": batch, "compiled": COMPILED, "cpu_s": 290.4},
        "3b-v5e-2x64": {"error": "does not fit"},
    }
    _, _, first, second = plan_presets.table(list(found), found)
    assert first == (
        "| 3b-v5e-64 | v5e:8x8 | 4 x 16 x 1 | 256 + 64 | 64 x 704 | 7.5 of 15.8 | 8.0 | 31 % | "
        "2000 | 290, 4.8 |"
    )
    assert second.startswith("| 3b-v5e-2x64 | 2 x v5e:8x8 | 8 x 16 x 1 | 512 + 128 | does not fit")
    assert first.count("|") == second.count("|")


def test_a_preset_that_takes_too_long():
    found = plan_presets.compile_preset("3b-v5e-64", 0.1)
    assert found == {"error": "not compiled within 0.1 s"}


def test_unknown_names():
    done = subprocess.run(
        [sys.executable, "-m", "st4vla_jax.plan_presets", "--out=/nowhere.json", "nope"], cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "no preset nope; there are 3b-v5e-64" in done.stdout
