"""Held-out parts: the rule, every kind of source, and the pipeline of either part."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.holdout import is_held_out
from st4vla_jax.data.image import decode_image
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.settings import (
    DataSettings,
    SettingsError,
    open_held_out,
    open_pipeline,
    open_source,
)
from st4vla_jax.data.source_files import SourceError
from st4vla_jax.data.stats import accumulate
from tests.data.test_rlds import BRIDGE, FRACTAL, folder
from tests.reference import shards as reference


def contents(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(25, 0.2, 5), (25, 0.01, 1), (4, 0.25, 1), (1000, 0.1, 100), (3, 1.0, 3), (3, 0.0, 0)],
)
def test_the_share_is_met_to_rounding(count, share, held):
    assert is_held_out(contents(count), share).sum() == held


def test_copies_order_and_growth():
    content = contents(500)
    held = is_held_out(content, 0.1)
    order = np.random.default_rng(1).permutation(500)
    np.testing.assert_array_equal(is_held_out(content[order], 0.1), held[order])
    # Repeats are one episode: they count once and stay together.
    twice = is_held_out(np.concatenate([content, content[:200]]), 0.1)
    np.testing.assert_array_equal(twice, np.concatenate([held, held[:200]]))
    assert (is_held_out(content, 0.2) >= held).all()
    grown = is_held_out(np.concatenate([content, contents(50, seed=2)]), 0.1)[:500]
    assert 0 < (grown != held).sum() + 1 <= 12  # only near the cut
    assert abs(grown.sum() - 50) <= 12


def bridge(shared, tmp_path, **sets):
    own = {"kind": "rlds", "path": str(shared / "data/bridge_dataset/1.0.0"), "spec": "bridge_orig"}
    return DataSettings.from_dict({
        "sets": {name: own | changes for name, changes in sets.items()},
        "schedule": {"robot_samples": 10, "grounding_samples": 0, "window": 4},
        "index_dir": str(tmp_path), "augment": {"scale": [0.8, 1.0]},
    })  # fmt: skip


def both_parts(settings):
    train = open_pipeline(settings)
    return {"train": train, "held_out": open_held_out(settings, train)}


def drawn(pipeline, steps):
    plans = [pipeline.schedule.plan(step) for step in range(steps)]
    return [pipeline.data_sets[d.member].source[d.index] for p in plans for row in p for d in row]


def about(sample):
    return sample.turns[0].text, sample.robot.state.tobytes()


def test_five_of_the_25_bridge_episodes_whatever_the_split(shared, tmp_path):
    settings = bridge(shared, tmp_path, bridge={"holdout": 0.2})
    parts = both_parts(settings)
    train, held = (parts[p].data_sets[0].source for p in parts)
    assert [len(np.unique(s.episodes())) for s in (train, held)] == [20, 5]
    trained = {about(s) for s in train}
    val = bridge(shared, tmp_path, bridge={"holdout": 0.2, "split": "val"})
    copies = open_source(val.sets[0], val, "held_out")
    assert {about(s) for s in copies} == {about(s) for s in held}
    assert not trained & {about(s) for s in copies} and len(trained) == 20 * 8
    assert {about(s) for s in drawn(parts["held_out"], 8)} == {about(s) for s in held}
    assert {about(s) for s in drawn(parts["train"], 32)} <= trained
    assert parts["held_out"].schedule.config.robot_samples == 10


def test_statistics_fingerprint_and_views_of_both_parts(shared, tmp_path):
    settings = bridge(shared, tmp_path, bridge={"holdout": 0.2})
    train, held = both_parts(settings).values()
    whole = open_pipeline(bridge(shared, tmp_path, bridge={}))
    assert len({p.fingerprint for p in (train, held, whole)}) == 3
    # Statistics are of the training part, in both.
    for pipeline in (train, held):
        found = pipeline.data_sets[0].encoders[0].statistics
        source = train.data_sets[0].source
        expected = accumulate(source.spec, source.standard_episodes()).result()
        np.testing.assert_array_equal(found["oxe_bridge"].action.q99, expected.action.q99)
        np.testing.assert_array_equal(found["oxe_bridge"].state.mean, expected.state.mean)
        assert found["oxe_bridge"].num_trajectories == 20
    # No augmentation of what is held out: a view is the image resized, nothing else.
    assert train.data_sets[0].encoders[0].augment is not None
    assert held.data_sets[0].encoders[0].augment is None
    one, other = (open_held_out(settings, train).batches() for _ in range(2))
    np.testing.assert_array_equal(next(one).vlm.patches, next(other).vlm.patches)
    one.close()
    other.close()


def test_episodes_held_out_in_one_set_and_trained_on_in_another(shared, tmp_path):
    sets = {"a": {"holdout": 0.2}, "b": {"split": "val"}}
    with pytest.raises(SettingsError, match="sets.b trains on 5 episodes that sets.a holds out"):
        open_pipeline(bridge(shared, tmp_path, **sets))
    open_pipeline(bridge(shared, tmp_path, a={"holdout": 0.2}, b={"split": "val", "holdout": 0.2}))
    with pytest.raises(SettingsError, match="no data set holds anything out"):
        both_parts(bridge(shared, tmp_path, a={}))


def records(folder, count=20):
    lines = []
    for number in range(count):
        Image.new("RGB", (56, 56), (number, 0, 0)).save(folder / f"{number}.png")
        for question in ("What?", "Where?"):
            turns = [{"from": "human", "value": f"<image>{question}"},
                     {"from": "gpt", "value": f"Cup {number}"}]  # fmt: skip
            lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    path = folder / "demo.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_grounding_holds_out_images_with_all_their_records(shared, tmp_path):
    path = records(tmp_path)
    train, held = (GroundingSource(path, name="x", holdout=0.25, part=p)
                   for p in ("train", "held_out"))  # fmt: skip
    names = [{s.record(i)["image"] for i in range(len(s))} for s in (train, held)]
    assert [len(n) for n in names] == [15, 5] and not names[0] & names[1]
    assert (len(train), len(held)) == (30, 10)
    assert held[3].turns[1].text == f"Cup {held.record(3)['image'].split('.')[0]}"
    assert held.record_name(0).startswith(str(path)) and train.fingerprint() != held.fingerprint()

    settings = bridge(shared, tmp_path, bridge={"holdout": 0.2})
    grounding = dataclasses.replace(
        settings.sets[0], name="x", kind="grounding", path=str(path), holdout=0.25
    )
    schedule = dataclasses.replace(settings.schedule, grounding_samples=6)
    both = dataclasses.replace(settings, sets=(*settings.sets, grounding), schedule=schedule)
    pipeline = both_parts(both)["held_out"]
    batches = pipeline.batches()
    batch = next(batches)
    batches.close()
    assert batch.action.valid.sum() == 10 and not pipeline.bad_records
    assert pipeline.schedule.config.grounding_samples == 6
    assert (batch.vlm.target_weight > 0).any()
    # A grounding set without a holdout takes no part.
    without = dataclasses.replace(grounding, holdout=0.0)
    plain = dataclasses.replace(both, sets=(settings.sets[0], without))
    pipeline = both_parts(plain)["held_out"]
    assert pipeline.schedule.config.grounding_samples == 0 and len(pipeline.data_sets) == 1


def test_wrong_parts_are_named(tmp_path):
    path = records(tmp_path, 2)
    with pytest.raises(SourceError, match="x: part: nothing is held out"):
        GroundingSource(path, name="x", part="held_out")
    with pytest.raises(SourceError, match="share 1.5 must lie in 0..1; part: 'val'"):
        GroundingSource(path, name="x", holdout=1.5, part="val")
    with pytest.raises(SourceError, match="none of 4 samples is kept: {'held out': 4}"):
        GroundingSource(path, name="x", holdout=1.0)


@pytest.mark.parity
def test_copies_in_another_split_fall_on_the_same_side(shared, tmp_path):
    root = shared / "data/bridge_dataset"

    def instructions_and_states(split, held_out):
        part = "held_out" if held_out else "train"
        source = RldsSource(root, BRIDGE, split, holdout=0.2, part=part, index_dir=tmp_path)
        return {(s.turns[0].text, s.robot.state.tobytes()) for s in source}

    held = instructions_and_states("val", True)
    assert held == instructions_and_states("train", True) and len(held) == 5 * 8
    trained = instructions_and_states("all", False)
    assert len(trained) == 20 * 8 and not held & trained


def test_the_side_survives_reencoding_and_order(tmp_path):
    episodes, a = folder(tmp_path / "a", "fractal", steps=(3,) * 20)
    for episode in episodes:
        episode["observation/image"] = [
            reference.encode_image(np.array(Image.fromarray(decode_image(data)).resize((20, 16))))
            for data in episode["observation/image"]
        ]
    b = reference.write_folder(
        tmp_path / "b", reference.FRACTAL, {"test": episodes[::-1]}, file_format="array_record"
    )
    first = RldsSource(a, FRACTAL, holdout=0.4, part="held_out")
    second = RldsSource(b, FRACTAL, "test", holdout=0.4, part="held_out")
    texts = {s.turns[0].text for s in first}
    assert texts == {s.turns[0].text for s in second} and len(texts) == 8
