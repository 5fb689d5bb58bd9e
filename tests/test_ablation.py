"""The ablation: what it plans, that it goes on where it stopped, and its table."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy.stats import binomtest

from configs import ablation as config_file
from st4vla_jax import ablation
from st4vla_jax.ablation_rows import (
    BUDGETS,
    DOMAINS,
    HELD_OUT,
    ROWS,
    STAGES,
    AblationError,
    Budget,
    Job,
    Plan,
    chosen_rows,
)
from st4vla_jax.ablation_run import StoppedError, claim, run_chains, run_jobs, seconds
from st4vla_jax.ablation_table import orderings, read_row, table, write_results
from st4vla_jax.eval.statistics import Rate
from st4vla_jax.train_config import TrainConfig, plain

ROOT = Path(__file__).parents[1]
OUT = Path("/somewhere")
SMOKE = BUDGETS["smoke"]


def jobs(rows=(), **plan):
    return {job.name: job.command for job in all_jobs(Plan(OUT, SMOKE, **plan), chosen_rows(rows))}


def all_jobs(plan, rows):
    return [*plan.shared(rows), *itertools.chain.from_iterable(plan.chains(rows))]


def settings(command):
    """{config key: value} of a train command."""
    flags = [
        word.removeprefix("--config.").split("=", 1) for word in command if "--config." in word
    ]
    return dict(flags)


# --- Plan ---------------------------------------------------------------------------------------


def test_rows_differ_where_they_should_and_nowhere_else():
    trees = {part: plain(config_file.get_config(part)) for part in config_file.ROWS}
    for part, tree in trees.items():
        assert TrainConfig.from_dict(tree).without_effect() == [], part
        assert tree["data"]["schedule"]["robot_samples"] == 32
        assert (tree["steps"], tree["seed"]) == (trees["decay"]["steps"], 0)
    scales = {part: tree["model"]["bridge"]["gradient_scale"] for part, tree in trees.items()}
    assert scales == {part: 0.5 if part == "decay" else 1.0 for part in trees}
    spatial = [part for part, tree in trees.items() if tree["data"]["prompts"] != ["none"]]
    assert spatial == ["prompt", "decay", "frozen"]
    alone = [part for part, tree in trees.items() if set(tree["data"]["sets"]) == {"tabletop"}]
    assert alone == ["vanilla_vla", "frozen"]
    for group in ("vlm", "words"):
        frozen = [part for part, tree in trees.items() if tree["optim"]["groups"][group]["freeze"]]
        assert frozen == ["frozen"]
    trees["prompt"]["model"]["bridge"]["gradient_scale"] = 0.5
    assert trees["prompt"] == trees["decay"]
    with pytest.raises(ValueError, match="nothing: there are stage0"):
        config_file.get_config("nothing")


def test_jobs_come_after_what_they_need():
    found = jobs()
    names = list(found)
    assert names[:5] == [
        "data/train",
        "data/test",
        "stage0/train",
        "stage0/generic",
        "stage0/robot",
    ]
    assert names.index("stage1/train") < names.index("vanilla_vla/train")
    starts = [settings(found[f"{part}/train"]).get("init.checkpoint") for part in STAGES]
    assert starts == [None, f"{OUT}/stage0/run/checkpoints/00000004"]
    rows = [name.split("/")[0] for name in names if name.endswith("/final")]
    assert rows == list(ROWS)
    for row in ROWS:
        own = settings(found[f"{row}/train"])
        assert own["steps"] == str(SMOKE.row)
        assert own["save_every"] == str(SMOKE.row // SMOKE.curve)
        assert own["init.checkpoint"].endswith(f"{ROWS[row].start}/run/checkpoints/00000004")
        asked = [name for name in names if name.startswith(f"{row}/generic_")]
        assert asked == [f"{row}/generic_00000002", f"{row}/generic_00000004"]
        assert found[f"{row}/splits"][-2:] == ("--episodes", str(SMOKE.rollouts // 4))
        assert set(HELD_OUT) <= set(found[f"{row}/splits"])
    starts = {row.name: row.start for row in ROWS.values()}
    assert starts == dict.fromkeys(ROWS, "stage0") | {"full": "stage1", "frozen": "stage1"}


def test_every_key_of_a_command_is_one_of_its_config():
    for name, command in jobs().items():
        if not name.endswith("/train") or name == "data/train":
            continue
        part = next(w for w in command if w.startswith("--config=")).partition(":")[2]
        tree = config_file.get_config(part)
        for key in settings(command):
            node = tree
            for step in key.split("."):
                assert step in node, (name, key)
                node = node[step]
        used = {key.split(".")[2] for key in settings(command) if key.startswith("data.sets.")}
        assert used == set(tree.data.sets), name


def test_only_what_is_needed_is_planned():
    assert not any(name.startswith("stage1") for name in jobs(["prompt"]))
    given = jobs(["prompt"], stage0=OUT / "given")
    assert "stage0/train" not in given and "stage0/generic" in given
    assert settings(given["prompt/train"])["init.checkpoint"] == str(OUT / "given")


def test_sweeps_are_full_but_for_one_value():
    rows = chosen_rows(["full"], decays=[1.0, 0.0], ratios=[20])
    assert [row.name for row in rows] == ["full", "full_decay_1", "full_decay_0", "full_ratio_20"]
    commands = {j.name: settings(j.command) for j in all_jobs(Plan(OUT, SMOKE), rows)}
    full = commands["full/train"]
    for name, key, value in (
        ("full_decay_0", "model.bridge.gradient_scale", "0.0"),
        ("full_ratio_20", "loss.text", "0.05"),
    ):
        assert commands[f"{name}/train"] == full | {key: value}


def test_all_that_cannot_be_is_named():
    with pytest.raises(AblationError) as error:
        chosen_rows(["ful", "x"], decays=[2.0], ratios=[0.5, math.nan])
    for part in ("--rows ful, did you mean 'full'?", "--rows x", "--decay 2", "--ratio 0.5", "nan"):
        assert part in str(error.value)
    with pytest.raises(AblationError, match=r"(?s)episodes 0.*records -1.*'fly'"):
        Budget(0, 1, 1, 1, 1, 1, 1, -1, 1, ("fly",))
    with pytest.raises(AblationError, match="row 5 is no multiple of curve 2"):
        Budget(1, 1, 1, 1, 1, 5, 2, 1, 1)


def test_command_line(tmp_path, capsys):
    args = ["--out", str(tmp_path / "x"), "--budget", "small"]
    parsed = ablation.parse_args([*args, "--updates", "5", "6", "10", "--records", "7"])
    parsed.data = [8, 9, 11]
    budget = ablation.chosen_budget(parsed)
    assert (budget.stage0, budget.stage1, budget.row) == (5, 6, 10)
    assert budget.records == 7
    assert (budget.episodes, budget.grounding, budget.generic) == (8, 9, 11)
    assert budget.rollouts == BUDGETS["small"].rollouts
    assert ablation.main([*args, "--rows", "fulll"]) == 1
    assert "did you mean 'full'" in capsys.readouterr().err
    assert ablation.main([*args, "--jobs", "0"]) == 1
    assert "--jobs 0: at least 1" in capsys.readouterr().err
    assert ablation.main([*args, "--stage0", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# --- Run ----------------------------------------------------------------------------------------


def python(name, code):
    return Job(name, (sys.executable, "-S", "-c", code))


def test_what_is_done_is_not_done_again(tmp_path):
    claim(tmp_path / "out", {"a": (1, 2)})
    claim(tmp_path / "out", {"a": [1, 2]})
    file, out = tmp_path / "log", tmp_path / "out"
    first = python("row/a", f"open({str(file)!r}, 'a').write('a')")
    fails = python("row/b", "print('line of output'); raise SystemExit(3)")
    said = []
    for _ in range(2):
        with pytest.raises(AblationError, match=r"(?s)row/b: exit status 3.*line of output"):
            run_jobs(out, [first, fails], said.append)
    assert file.read_text() == "a"
    assert "row/a: done already" in said
    assert seconds(out, "row/a") > 0 and seconds(out, "row/b") is None
    run_jobs(out, [first, python("row/b", "import time; time.sleep(0.2)")], said.append)
    assert seconds(out, "row/b") > 0.2  # with the two starts that failed
    stopped = python("row/c", "raise SystemExit(75)")
    with pytest.raises(StoppedError, match="the same command goes on"):
        run_jobs(out, [stopped], said.append)


@pytest.mark.parametrize("call", ["run_jobs(out, [job])", "run_chains(out, [[job]], 2)"])
def test_a_signal_reaches_the_job(tmp_path, call):
    """The job ends in order, and its time is kept."""
    code = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'saved')!r}, 'w'), "
        "sys.exit(75)))\n"
        f"open({str(tmp_path / 'started')!r}, 'w')\n"
        "time.sleep(60)"
    )
    runner = (
        "import sys, signal; from pathlib import Path\n"
        "from st4vla_jax.ablation_rows import Job\n"
        "from st4vla_jax.ablation_run import run_chains, run_jobs\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"out, job = Path({str(tmp_path)!r}), Job('a', (sys.executable, '-S', '-c', {code!r}))\n"
        f"{call}"
    )
    process = subprocess.Popen([sys.executable, "-c", runner], cwd=ROOT, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "saved").exists()
    assert seconds(tmp_path, "a") is None
    assert list((tmp_path / "done").glob("*.unfinished"))


def waits_for(name, mine, others):
    code = "import pathlib, sys, time\n"
    code += f"pathlib.Path({str(mine)!r}).touch(); end = time.monotonic() + 30\n"
    code += f"while not pathlib.Path({str(others)!r}).exists():\n"
    code += "    time.sleep(0.01); time.monotonic() < end or sys.exit(1)"
    return python(name, code)


def test_chains_run_side_by_side(tmp_path):
    """Each job waits for a file of the other chain's job."""
    chains = [[waits_for(n, tmp_path / n, tmp_path / o)] for n, o in ("ab", "ba")]
    (tmp_path / "out").mkdir()
    run_chains(tmp_path / "out", chains, 2, [].append)
    assert all(seconds(tmp_path / "out", name) is not None for name in "ab")


def test_the_first_failure_stops_the_other_chains(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    never = waits_for("never", tmp_path / "on", tmp_path / "nothing")
    fails = [
        waits_for("waits", tmp_path / "x", tmp_path / "on"),
        python("fails", "raise SystemExit(3)"),
    ]
    start = time.monotonic()
    with pytest.raises(AblationError, match="fails: exit status 3"):
        run_chains(out, [[never, python("later", "")], fails, [python("last", "")]], 2, [].append)
    assert time.monotonic() - start < 20
    assert [seconds(out, name) for name in ("never", "later", "last")] == [None] * 3
    assert seconds(out, "waits") is not None


def test_other_settings_are_refused(tmp_path):
    claim(tmp_path / "out", {"row": 4, "rollouts": 2})
    with pytest.raises(AblationError, match=r"(?s)other settings.*rollouts: 2 there, 3 asked for"):
        claim(tmp_path / "out", {"row": 4, "rollouts": 3})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(AblationError, match="not empty, and no ablation"):
        claim(tmp_path / "mine", {})


# --- Table --------------------------------------------------------------------------------------


def write_row(plan, row, won, hit):
    """What a row's jobs leave: ``won`` of 40 episodes a split, ``hit[step]`` of 20 boxes."""
    folder = plan.out / row.name
    for name, splits in (("final", ("val",)), ("splits", ("paraphrase", "spatial"))):
        lines = [
            {"task": "reach", "split": split, "seed": seed, "success": seed < won}
            for split in splits
            for seed in range(40)
        ]
        write_lines(folder / name / "episodes.jsonl", lines)
    start, own = plan.answers(row.start), plan.answers(row.name)
    for domain in DOMAINS:
        for step, out in (start[domain] | own[domain]).items():
            record = f"/d/{domain}.jsonl:"
            lines = [
                {"record": f"{record}{i}", "values": {"iou": [0.5 if i < hit[step] else 0.4]}}
                for i in range(20)
            ]
            lines.append({"record": f"{record}99", "values": {"exact": [1.0]}})
            write_lines(out / f"grounding_{domain}.jsonl", lines)
    metrics = [{"step": 2, "loss/action": 0.5}, {"step": 4, "align/pss": 0.25}]
    metrics.append({"step": 4, "align/pss": "NaN"})
    write_lines(folder / "run" / "metrics.jsonl", metrics)


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def written(tmp_path):
    plan, rows = Plan(tmp_path, SMOKE), chosen_rows(["vanilla_vla", "decay"])
    write_row(plan, rows[0], 10, {0: 14, 2: 6, 4: 2})
    write_row(plan, rows[1], 18, {0: 14, 2: 13, 4: 12})
    return plan, rows


def test_the_table_says_what_the_files_say(written):
    plan, rows = written
    vanilla, decay = (read_row(plan, row) for row in rows)
    assert vanilla.success(held_out=False) == Rate(10, 40)
    assert decay.success(held_out=True) == Rate(36, 80)
    assert decay.by(1) == {s: Rate(18, 40) for s in ("paraphrase", "spatial", "val")}
    assert {step: sum(hits.values()) for step, hits in vanilla.boxes["generic"].items()} == {
        0: 14, 2: 6, 4: 2,
    }  # fmt: skip
    header, cells = table([vanilla, decay])
    named = [dict(zip(header, row, strict=True)) for row in cells]
    assert named[1]["success"] == str(Rate(18, 40)) and named[1]["PSS"] == "0.250"
    assert named[1]["IoU@0.5 generic: start"] == str(Rate(14, 20))
    assert named[1]["end"] == str(Rate(12, 20))
    first_p = cells[1][3]
    assert float(first_p) == pytest.approx(binomtest(0, 8).pvalue, rel=0.05)  # 8 pairs differ
    assert cells[0][3] == "-"
    told = orderings([vanilla, decay])
    assert told[0] == "success in distribution: decay 0.45 > vanilla_vla 0.25"
    assert told[1] == "IoU@0.5 at the end, generic: decay 0.60 > vanilla_vla 0.10"


def test_differences_that_chance_explains_are_no_order(written):
    plan, rows = written
    write_row(plan, rows[1], 13, {0: 14, 2: 13, 4: 2})
    told = orderings([read_row(plan, row) for row in rows])
    assert told[0] == "success in distribution: decay 0.33 ~ vanilla_vla 0.25"
    assert told[1].endswith("vanilla_vla 0.10 ~ decay 0.10")


def test_files(written):
    plan, rows = written
    lines = write_results(plan, rows, {"budget": "smoke"})
    assert (plan.out / "table.md").read_text() == "\n".join(lines) + "\n"
    tree = json.loads((plan.out / "table.json").read_text())
    assert tree["about"]["budget"] == "smoke" and "jax" in tree["about"]["versions"]
    low, high = Rate(10, 40).interval()
    assert tree["rows"][0]["success"]["in_distribution"] == {
        "p": 0.25, "low": low, "high": high, "n": 40,
    }  # fmt: skip
    assert tree["rows"][1]["iou50"]["generic"]["4"]["p"] == 0.6
    assert tree["rows"][1]["curves"]["PSS"] == [[4, 0.25]]
    pairs = 3 * 8  # episodes that decay alone solved
    assert tree["rows"][1]["against_first"]["success"] == pytest.approx(binomtest(0, pairs).pvalue)
    report = (plan.out / "report.html").read_text()
    for part in ("IoU@0.5, generic", "PSS", "McNemar", "polyline", "paraphrase"):
        assert part in report


@pytest.mark.slow
def test_smoke(tmp_path):
    """Everything, twice: the second time nothing is left to do."""
    command = [
        sys.executable, "-m", "st4vla_jax.ablation", "--out", str(tmp_path), "--budget", "smoke",
        "--rows", "vanilla_vla", "full", "frozen", "--decay", "0",
    ]  # fmt: skip
    for expected in (False, True):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("full/train: done already" in done.stdout) == expected
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["vanilla_vla", "full", "frozen", "full_decay_0"]
    for row in rows:
        assert row["success"]["in_distribution"]["n"] == SMOKE.rollouts
        assert set(row["iou50"]["generic"]) == {"0", "2", "4"}
    assert rows[2]["iou50"]["robot"]["0"] == rows[2]["iou50"]["robot"]["4"]  # it is frozen
    assert set(STAGES) <= {path.name for path in tmp_path.iterdir()}
