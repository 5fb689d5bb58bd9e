"""The preview counts what batches hold; settings become a pipeline; the bench commands run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from st4vla_jax.bench_data import BUFFERS, IN_MEMORY, fitted
from st4vla_jax.data.pipeline import DataSet, Pipeline
from st4vla_jax.data.preview import longer_sequences, main, preview, table
from st4vla_jax.data.schedule import ScheduleConfig
from st4vla_jax.data.settings import DataSettings, SettingsError, open_pipeline
from tests.reference.sources import ArmSource, BoxSource, encoder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ScheduleConfig(robot_samples=20, grounding_samples=4, tokens=640, window=4)


def test_preview_counts_what_the_batches_hold():
    sets = [
        DataSet(ArmSource(), (encoder(),), 3.0),
        DataSet(ArmSource(12, "small", seed=5), (encoder(),), 1.0),
        DataSet(BoxSource(), (encoder(),)),
    ]
    pipeline = Pipeline(sets, CONFIG)
    found = preview(pipeline, 12, start=8)
    assert [s.draws for s in found.sets] == [180, 60, 48]
    np.testing.assert_allclose([s.share for s in found.sets], [0.75, 0.25, 1])
    assert [s.weight for s in found.sets] == [0.75, 0.25, 1]
    batches = pipeline.batches(8)
    used, groups = [], np.zeros(2)
    for _ in range(12):
        batch = next(batches)
        used.append((batch.vlm.segment_ids > 0).mean())
        groups += np.bincount(batch.action.valid.sum(axis=1), minlength=2)[:2]
    batches.close()
    assert found.efficiency == pytest.approx(np.mean(used))
    assert found.lowest_efficiency == pytest.approx(np.min(used))
    duplicates = []
    for member in range(2):
        episode, hits, total = sets[member].source.episode, 0, 0
        for step in range(8, 20):
            own = [d.index for row in pipeline.schedule.plan(step) for d in row]
            own = [i for row in pipeline.schedule.plan(step) for i in
                   (d.index for d in row if d.member == member)]  # fmt: skip
            hits += sum(np.sum(episode[own] == episode[i]) > 1 for i in own)
            total += len(own)
        duplicates.append(hits / total)
    np.testing.assert_allclose([s.duplicates for s in found.sets[:2]], duplicates)
    assert found.sets[2].duplicates is None
    text = "\n".join(table(found, pipeline))
    assert "20 robot + 4 grounding (the paper: 256 + 64)" in text and "0.7500" in text
    assert f"a multiple of 1, allow {pipeline.schedule.bound:.1%}" in text
    for tokens, sequences, efficiency in longer_sequences(pipeline.schedule)[:3]:
        line = f"schedule.tokens {tokens} would take {sequences} sequences: {efficiency:.1%}"
        assert line in text


def test_command_on_the_real_bridge(shared, tmp_path, capsys):
    path = shared / "data/bridge_dataset/1.0.0"
    main([
        f"--config={ROOT}/configs/data.py", "--steps=20", f"--config.data.sets.bridge.path={path}",
        f"--config.data.index_dir={tmp_path}", "--config.data.schedule.robot_samples=24",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "bridge_orig" in out and "packing efficiency over 20 steps" in out
    assert "480" in out and "200" in out  # draws, samples


def test_batches_of_the_real_bridge_and_llava(shared, tmp_path):
    """All the way from files to a batch: three paraphrases, a mixture, statistics of the data."""
    settings = DataSettings.from_dict({
        "sets": {
            "bridge": {"kind": "rlds", "path": str(shared / "data/bridge_dataset/1.0.0"),
                       "spec": "bridge_orig", "prompts": ["paper", "upstream", "none"]},
            "demo": {"kind": "grounding", "path": str(grounding_file(tmp_path))},
        },
        "schedule": {"robot_samples": 12, "grounding_samples": 4, "window": 4, "multiple": 2},
        "index_dir": str(tmp_path / "index"), "chunk": 8, "augment": {"scale": [0.8, 1.0]},
    })  # fmt: skip
    pipeline = open_pipeline(settings)
    batches = pipeline.batches(1000)
    batch = next(batches)
    batches.close()
    assert batch.action.valid.sum() == 12 and not pipeline.bad_records
    assert batch.action.actions.shape[2:] == (8, 7)
    assert np.abs(batch.action.actions).max() <= 1
    assert (batch.vlm.target_weight > 0).any()
    halves = [open_pipeline(settings, host=h, num_hosts=2).batches(1000) for h in (0, 1)]
    tokens = np.concatenate([next(half).vlm.tokens for half in halves])
    np.testing.assert_array_equal(tokens, batch.vlm.tokens)


def grounding_file(folder: Path) -> Path:
    from PIL import Image

    lines = []
    for number in range(8):
        Image.new("RGB", (84 + 14 * number, 84), (number, 0, 0)).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\nWhere is cup {number}?"},
            {"from": "gpt", "value": "There" * (number + 1)},
        ]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    path = folder / "demo.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_settings_name_every_wrong_key():
    with pytest.raises(SettingsError) as e:
        DataSettings.from_dict({
            "sets": {"a": {"kind": "rldz", "path": "x"}, "b": {"kind": "rlds"}},
            "schedule": {"robot_sample": 3}, "chunks": 4, "augment": {"scale": [2.0, 1.0]},
        })  # fmt: skip
    for text in ("sets.a.kind: 'rldz', did you mean 'rlds'", "sets.b.path: missing",
                 "schedule.robot_sample: unknown key, did you mean 'robot_samples'",
                 "data.chunks: unknown key, did you mean 'chunk'", "augment: "):  # fmt: skip
        assert text in str(e.value)
    with pytest.raises(SettingsError, match="sets: no data set"):
        DataSettings.from_dict({})


def test_every_set_that_cannot_be_opened_is_named(tmp_path):
    sets = {name: {"kind": kind, "path": str(tmp_path / name), **rest} for name, kind, rest in (
        ("a", "rlds", {"spec": "bridge_orig"}), ("b", "grounding", {}),
        ("c", "rlds", {"spec": "brigde_orig"}))}  # fmt: skip
    with pytest.raises(SettingsError) as e:
        open_pipeline(DataSettings.from_dict({"sets": sets}))
    for text in (
        f"sets.a: {tmp_path / 'a'}: ",
        "sets.b: ",
        str(tmp_path / "b"),
        "sets.c: no robot",
    ):
        assert text in str(e.value)


def test_config_has_the_settings_and_their_defaults():
    from configs.data import get_config

    tree = get_config().data.to_dict()
    assert set(tree) == {f.name for f in dataclasses.fields(DataSettings)}
    settings = DataSettings.from_dict(tree)
    plain = DataSettings(settings.sets)
    schedule = dataclasses.replace(plain.schedule, grounding_samples=0)
    assert settings == dataclasses.replace(plain, schedule=schedule)


def test_memory_is_fitted_by_a_line():
    found = {"frames": 1_000, "index_bytes": 200_000, "ours": {"peak_mib": 250.0},
             f"tf.data {BUFFERS[0]}": {"peak_mib": 500.0},
             f"tf.data {BUFFERS[1]}": {"peak_mib": 700.0}}  # fmt: skip
    fit = fitted(found)
    assert fit["tf.data"] == pytest.approx(500 + 200 * (256_000 - 1_000) / 8_000)
    assert fit["tf.data_bytes_a_frame"] == pytest.approx(200 * 2**20 / 8_000)
    assert fit["ours"] == pytest.approx(250 + (200 + IN_MEMORY) * (2_100_000 - 1_000) / 2**20)
    del found[f"tf.data {BUFFERS[1]}"]
    assert "tf.data" not in fitted(found)


def test_bench_data_runs_and_says_what_it_did_not_measure(tmp_path):
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "st4vla_jax.bench", "data", "--episodes", "4", "--batch", "8",
        "--steps", "2", "--warm", "1", "--threads", "2", "--rounds", "1", "--json", str(out),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    result = json.loads(out.read_text())
    assert result["ours"]["samples_s"] > 0 and result["frames"] > 100
    assert result["array_record"]["samples_s"] > 0 and "ours, array_record" in run.stdout
    # Index columns of a step: image place 16, action 28 twice, language, kept, step, lengths.
    assert 100 < result["fit"]["ours_bytes_a_frame"] - IN_MEMORY < 250
    if "tf.data" not in result["fit"]:
        assert "tf.data     not measured: no tensorflow" in run.stdout
