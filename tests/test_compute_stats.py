import json
import subprocess
import sys

import numpy as np
import pytest

from st4vla_jax.compute_stats import main
from st4vla_jax.data.normalize import MOMENTS, Statistics

SIM = {
    "name": "sim", "embodiment": "franka", "control_hz": 30, "language": "task",
    "images": {"primary": "video.ego_view"},
    "action": [
        {"column": "action.delta_joints"},
        {"column": "action.gripper_close", "scale": -0.5, "offset": 0.5},
    ],
    "state": [{"column": "state.joints"}], "state_encoding": "joint",
    "names": ["j1", "j2", "j3", "j4", "j5", "j6", "j7", "gripper"],
    "units": ["rad", "rad", "rad", "rad", "rad", "rad", "rad", "1 = open"],
    "gripper": [7], "absolute": [7], "mode": "min_max",
}  # fmt: skip


def spec_file(folder, **changes):
    path = folder / "spec.json"
    path.write_text(json.dumps(SIM | changes))
    return str(path)


@pytest.fixture
def bridge(shared):
    return str(shared / "data/bridge_dataset/1.0.0")


@pytest.fixture
def sim(shared):
    pytest.importorskip("pyarrow", reason="the lerobot extra")
    return str(shared / "data/lerobot_sim_pick_place")


def test_bridge_end_to_end(bridge, tmp_path, capsys):
    """The command, and the numbers of spec data.md section 5."""
    out = tmp_path / "new/stats.json"
    arguments = ["--data", bridge, "--spec", "bridge_orig", "--out", str(out)]
    assert main([*arguments, "--index-dir", str(tmp_path / "index")]) == 0
    entry = Statistics.load(out)["oxe_bridge"]
    assert (entry.num_transitions, entry.num_trajectories) == (200, 25)
    np.testing.assert_array_equal(entry.action.q01[:3].round(3), [-0.014, -0.019, -0.017])
    np.testing.assert_array_equal(entry.action.q99[:3].round(3), [0.016, 0.009, 0.015])
    assert len(entry.state.mean) == 8
    assert list(tmp_path.glob("new/*")) == [out]  # no temporary file is left
    printed = capsys.readouterr().out
    assert "oxe_bridge: 25 episodes, 200 steps" in printed
    assert "look at this" not in printed


def test_data_sets_of_one_embodiment_are_merged(bridge, tmp_path):
    """The two splits hold the same 25 episodes: twice the counts, the same everything else."""

    def statistics(*data, split):
        out = tmp_path / f"{len(data)}{split}.json"
        paths = [word for path in data for word in ("--data", path)]
        index = str(tmp_path / "index")
        assert (
            main(
                [
                    *paths,
                    "--spec",
                    "bridge_orig",
                    "--out",
                    str(out),
                    "--split",
                    split,
                    "--index-dir",
                    index,
                ]
            )
            == 0
        )
        return Statistics.load(out)["oxe_bridge"]

    one = statistics(bridge, split="train")
    for twice in (statistics(bridge, bridge, split="val"), statistics(bridge, split="all")):
        assert (twice.num_transitions, twice.num_trajectories) == (400, 50)
        for name in ("mean", "std", "min", "max"):
            for field in ("action", "state"):
                expected = getattr(getattr(one, field), name)
                np.testing.assert_array_equal(getattr(getattr(twice, field), name), expected)


def test_lerobot_equals_the_statistics_that_upstream_wrote(sim, tmp_path, capsys):
    """Without its videos, most of which are missing: nothing here looks at an image."""
    out = tmp_path / "stats.json"
    assert main(["--data", sim, "--spec", spec_file(tmp_path), "--out", str(out)]) == 0
    entry = Statistics.load(out)["franka"]
    assert (entry.num_transitions, entry.num_trajectories) == (412 + 411 + 398 + 446, 4)
    with open(f"{sim}/meta/stats_gr00t.json") as file:
        upstream = json.load(file)
    for name in MOMENTS:
        np.testing.assert_allclose(
            getattr(entry.action, name)[:7], upstream["action.delta_joints"][name],
            rtol=1e-6, atol=1e-8, err_msg=name,
        )  # fmt: skip
        np.testing.assert_allclose(
            getattr(entry.state, name), upstream["state.joints"][name], rtol=1e-6, atol=1e-7
        )
    assert (entry.action.min[7], entry.action.max[7]) == (0, 1)
    assert not entry.action.mask[7]
    assert "look at this" not in capsys.readouterr().out


def test_a_gripper_of_the_wrong_range_is_pointed_out(sim, tmp_path, capsys):
    action = [{"column": "action.delta_joints"}, {"column": "action.gripper_close"}]
    spec = spec_file(tmp_path, action=action)
    assert main(["--data", sim, "--spec", spec, "--out", str(tmp_path / "stats.json")]) == 0
    assert "look at this: gripper 'gripper' spans -1..1" in capsys.readouterr().out


def test_constant_dimensions_are_pointed_out(sim, tmp_path, capsys):
    action = [{"column": "action.delta_joints", "scale": 0}, SIM["action"][1]]
    spec = spec_file(tmp_path, action=action)
    assert main(["--data", sim, "--spec", spec, "--out", str(tmp_path / "stats.json")]) == 0
    assert "look at this: 'j7' is always 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{bridge}", "--spec", "bridge_origin"], "did you mean 'bridge_orig'"),
        (["--data", "{tmp}", "--spec", "bridge_orig"], "not a tfds data set"),
        (["--data", "{bridge}", "--spec", "bridge_orig", "--split", "test"], "no split 'test'"),
        (["--data", "{bridge}", "--spec", "taco_play"], "no column 'observation/rgb_static'"),
        (["--data", "{sim}", "--spec", "bridge_orig"], "no columns observation/state, action"),
        (
            ["--data", "{sim}", "--spec", "{spec}", "--data", "{bridge}", "--spec", "{as_sim}"],
            "bridge_orig and sim share the embodiment 'franka', but their actions differ",
        ),
    ],
)
def test_bad_input_is_one_message(arguments, message, bridge, sim, shared, tmp_path, capsys):
    from st4vla_jax.data.oxe import SPECS

    as_sim = tmp_path / "as_sim.json"
    as_sim.write_text(json.dumps(SPECS["bridge_orig"].to_dict() | {"embodiment": "franka"}))
    places = {"tmp": tmp_path, "bridge": bridge, "sim": sim, "as_sim": as_sim}
    places["spec"] = spec_file(tmp_path)
    out = tmp_path / "stats.json"
    words = [word.format(**places) for word in arguments]
    index = ["--index-dir", str(tmp_path / "index")]
    assert main([*words, "--out", str(out), *index]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].strip()
    assert message in error
    assert not out.exists()


def test_it_needs_no_jax_and_runs_as_a_module(bridge, tmp_path):
    code = (
        "import sys; from st4vla_jax.compute_stats import main; "
        "assert main(sys.argv[1:]) == 0; "
        "print(sorted({'jax', 'torch', 'tensorflow'} & set(sys.modules)))"
    )
    arguments = ["--data", bridge, "--spec", "bridge_orig", "--out", str(tmp_path / "s.json")]
    index = ["--index-dir", str(tmp_path / "index")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, *index],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
