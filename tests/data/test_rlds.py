import concurrent.futures
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from st4vla_jax.data import shards as shards_module
from st4vla_jax.data.encoder import SampleEncoder
from st4vla_jax.data.episode_table import Filters
from st4vla_jax.data.image import decode_image
from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.source import BadRecordError, Source
from st4vla_jax.data.source_files import SourceError
from st4vla_jax.data.tokenizer import byte_level_tokenizer
from st4vla_jax.data.transforms import encode_robot
from tests.reference import shards as reference

BRIDGE = SPECS["bridge_orig"]
FRACTAL = SPECS["fractal20220817_data"]
BOTH = ("primary", "secondary")


def folder(root: Path, shape: str, steps=(4, 5, 6, 3), edit=lambda episodes: None, **options):
    rng = np.random.default_rng(0)
    episodes = [getattr(reference, shape)(rng, n, f"task {i}") for i, n in enumerate(steps)]
    edit(episodes)
    columns = getattr(reference, shape.upper())
    return episodes, reference.write_folder(root, columns, {"train": episodes}, **options)


def assert_samples_equal(a, b):
    assert (a.turns, a.group, a.record) == (b.turns, b.group, b.record)
    for x, y in zip(a.images, b.images, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.robot.actions, b.robot.actions)
    np.testing.assert_array_equal(a.robot.action_mask, b.robot.action_mask)
    np.testing.assert_array_equal(a.robot.state, b.robot.state)


# --- Samples ------------------------------------------------------------------------------------


@pytest.mark.parity
def test_real_bridge_equals_an_independent_reading(shared, tmp_path):
    root = shared / "data/bridge_dataset"
    source = RldsSource(root, BRIDGE, views=BOTH, chunk=4, index_dir=tmp_path)
    assert isinstance(source, Source) and len(source) == 25 * 8
    records = reference.tfrecord_records(
        root / "1.0.0/bridge_dataset-train.tfrecord-00000-of-00001"
    )
    number = 0
    for record, data in enumerate(records):
        step = reference.parse(data).features.feature
        states = np.array(step["steps/observation/state"].float_list.value, np.float32)
        raw = np.array(step["steps/action"].float_list.value, np.float32).reshape(10, 7)
        states = states.reshape(10, 7)
        images = [step[f"steps/observation/image_{i}"].bytes_list.value for i in range(2)]
        text = step["steps/language_instruction"].bytes_list.value[0].decode()
        grippers = raw[:, 6].copy()
        for t in range(9, -1, -1):  # in between: what is decided next
            if raw[t, 6] > 0.95 or raw[t, 6] < 0.05:
                grippers[t] = raw[t, 6] > 0.95
            elif t < 9:
                grippers[t] = grippers[t + 1]
        for t in range(1, 9):
            sample = source[number]
            number += 1
            assert sample.record.endswith(f"record {record} step {t}")
            assert [turn.text for turn in sample.turns] == [text.strip()]
            for view in range(2):
                expected = decode_image(images[view][t])
                np.testing.assert_array_equal(sample.images[view], expected)
            np.testing.assert_allclose(sample.robot.state[:6], states[t, :6])
            assert sample.robot.state[7] == states[t, 6]
            for c in range(4):
                action, mask = sample.robot.actions[c], sample.robot.action_mask[c]
                at = min(t + c, 8)
                delta = states[at + 1, :6] - states[at, :6] if t + c < 9 else np.zeros(6)
                np.testing.assert_array_equal(action[:6], delta)
                assert action[6] == grippers[at] and (mask == (t + c < 9)).all()
    assert number == len(source)


@pytest.mark.parametrize("shape", ["fractal", "kuka"])
def test_google_format(tmp_path, shape):
    episodes, root = folder(tmp_path / "set", shape, shards=2)
    spec = FRACTAL if shape == "fractal" else SPECS["kuka"]
    source = RldsSource(root, spec, chunk=2)
    assert len(source) == 18
    starts = np.cumsum([0, 4, 5, 6, 3])
    for number, episode in enumerate(episodes):
        first = np.concatenate(
            [episode["action/world_vector"], episode["action/rotation_delta"]], axis=1
        )
        for t in range(len(first)):
            sample = source[int(starts[number]) + t]
            np.testing.assert_array_equal(sample.robot.actions[0, :6], first[t])
            assert sample.robot.action_mask[:, 0].tolist() == [True, t + 1 < len(first)]
            expected = decode_image(episode["observation/image"][t])
            np.testing.assert_array_equal(sample.images[0], expected)
            assert sample.turns[0].text == f"task {number}"
            if shape == "kuka":
                key = "observation/clip_function_input/base_pose_tool_reached"
                pose = np.frombuffer(reference.zlib.decompress(episode[key][t]), "<f4")
                np.testing.assert_array_equal(sample.robot.state[:7], pose)
            else:
                key = "observation/base_pose_tool_reached"
                np.testing.assert_array_equal(sample.robot.state[:7], episode[key][t])
            assert len(sample.robot.state) == 8


def test_language_table(tmp_path):
    episodes, root = folder(tmp_path / "set", "language_table", steps=(3,))
    sample = RldsSource(root, SPECS["language_table"], chunk=2)[1]
    assert sample.turns[0].text == "task 0" and sample.images[0].shape == (36, 64, 3)
    np.testing.assert_array_equal(sample.robot.actions[:, :2], episodes[0]["action"][1:])
    assert (sample.robot.actions[:, 6] == 1).all()


def test_array_record_gives_the_same_samples(tmp_path):
    sources = []
    for file_format in ("tfrecord", "array_record"):
        _, root = folder(tmp_path / file_format, "bridge", shards=2, file_format=file_format)
        sources.append(RldsSource(root, BRIDGE, views=BOTH, chunk=3))
    a, b = sources
    assert len(a) == len(b) == 10
    for x, y in zip(a, b, strict=True):
        y = dataclasses.replace(y, record=y.record.replace("array_record", "tfrecord"))
        assert_samples_equal(x, y)


def test_views_come_in_the_order_asked_for(tmp_path):
    spec = dataclasses.replace(BRIDGE, images={**BRIDGE.images, "wrist": "observation/image_1"})
    episodes, root = folder(tmp_path / "set", "bridge")
    sample = RldsSource(root, spec, views=("wrist", "primary"))[0]
    for view, path in enumerate(("observation/image_1", "observation/image_0")):
        np.testing.assert_array_equal(sample.images[view], decode_image(episodes[0][path][1]))


def test_wrong_settings_are_all_named(tmp_path):
    with pytest.raises(SourceError) as error:
        RldsSource(
            tmp_path, BRIDGE, views=("wrist", "primry"), pad="zeros", chunk=0, part="held_out"
        )
    for text in ("no view 'wrist'", "did you mean 'primary'", "did you mean 'zero'", "chunk: 0",
                 "part: nothing is held out"):  # fmt: skip
        assert text in str(error.value)


# --- One source, many readers -------------------------------------------------------------------


def test_sixteen_threads_read_what_one_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 2)  # shards close under their readers
    _, root = folder(tmp_path / "set", "bridge", steps=(6,) * 12, shards=6)
    source = RldsSource(root, BRIDGE, views=BOTH)
    expected = list(source)
    fresh = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).integers(len(source), size=1500)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for i, sample in zip(order, pool.map(fresh.__getitem__, order.tolist()), strict=True):
            assert_samples_equal(sample, expected[i])
    # Other tests' sources may still be open in this process.
    opened = [str(fd.resolve()) for fd in Path("/proc/self/fd").iterdir()]
    held = [path for path in opened if path.startswith(str(root)) and ".tfrecord-" in path]
    assert len(fresh._reader._open) <= 2 and len(held) <= 4  # of both sources


def test_pickle_is_small_and_gives_the_same(tmp_path):
    _, root = folder(tmp_path / ("long" * 40), "bridge", steps=(30,) * 8)
    source = RldsSource(root, BRIDGE, views=BOTH)
    _ = source[3]
    data = pickle.dumps(source)
    again = pickle.loads(data)
    assert len(data) < 1024
    assert again.fingerprint() == source.fingerprint() and again.name == source.name
    assert_samples_equal(again[5], source[5])


def test_indices_outside_are_index_errors(tmp_path):
    _, root = folder(tmp_path / "set", "bridge")
    source = RldsSource(root, BRIDGE)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"sample {index} of 10"):
            source[index]
    assert_samples_equal(source[np.int64(2)], source[2])


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    _, a = folder(tmp_path / "a", "bridge")
    _, b = folder(tmp_path / "b", "bridge")
    _, c = folder(tmp_path / "c", "bridge", steps=(4, 5, 6, 4))

    def fingerprint(root, **options):
        return RldsSource(root, BRIDGE, **options).fingerprint()

    assert fingerprint(a) == fingerprint(b)
    others = [
        fingerprint(c),
        fingerprint(a, chunk=3),
        fingerprint(a, pad="zero"),
        fingerprint(a, views=BOTH),
        fingerprint(a, filters=Filters(pause=1.0)),
        RldsSource(a, BRIDGE).drop(np.array([0]), "too long").fingerprint(),
    ]
    assert len({fingerprint(a), *others}) == 7


def test_nothing_heavy_is_imported():
    code = (
        "import sys, st4vla_jax.data.rlds\n"
        "print([m for m in ('tensorflow', 'torch', 'jax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


# --- Steps that are no samples ------------------------------------------------------------------


def test_empty_language_is_left_out_and_counted(tmp_path):
    def edit(episodes):
        episodes[1]["language_instruction"] = [b"  "] * 5

    _, root = folder(tmp_path / "set", "bridge", edit=edit)
    source = RldsSource(root, BRIDGE)
    assert len(source) == 2 + 4 + 1 and source.left_out() == {"empty language": 3}
    kept = RldsSource(root, BRIDGE, filters=Filters(empty_language=False))
    assert len(kept) == 10 and kept.left_out() == {}


def test_pauses_are_left_out_as_a_loop_finds_them(tmp_path):
    rng = np.random.default_rng(4)

    def edit(episodes):
        for episode in episodes:
            still = rng.random(len(episode["action/world_vector"])) < 0.6
            still[0] = True  # the gripper of the episode before does not count
            episode["action/world_vector"][still] = 4e-4
            # It closes in the last step, so that the next episode starts with another state.
            episode["action/gripper_closedness_action"][:] = 0
            episode["action/gripper_closedness_action"][-1] = 1

    _, root = folder(tmp_path / "set", "fractal", steps=(9, 1, 7, 12), edit=edit)
    source = RldsSource(root, FRACTAL, chunk=1, filters=Filters(pause=5e-4))
    everything = RldsSource(root, FRACTAL, chunk=1)
    expected, previous = [], None
    for sample in everything:
        action = sample.robot.actions[0]
        new = sample.record.endswith(" step 0")
        same = new or action[6] == previous[6]
        if not (same and (np.abs(action[:3]) <= 5e-4).all()):
            expected.append(sample.record)
        previous = action
    assert [sample.record for sample in source] == expected
    assert source.left_out() == {"pause": len(everything) - len(expected)} and len(expected) > 3


def test_episodes_of_one_step(tmp_path):
    _, root = folder(tmp_path / "fractal", "fractal", steps=(1, 2))
    source = RldsSource(root, FRACTAL, chunk=3)
    assert len(source) == 3
    assert source[0].robot.action_mask[:, 0].tolist() == [True, False, False]
    _, root = folder(tmp_path / "bridge", "bridge", steps=(1, 2, 3))
    source = RldsSource(root, BRIDGE, chunk=3)
    assert len(source) == 1 and source.left_out() == {"records too short": 2}
    _, root = folder(tmp_path / "short", "bridge", steps=(1, 2))
    with pytest.raises(SourceError, match="no episode can be used.*\n.*record 0: 1 steps"):
        RldsSource(root, BRIDGE)


def test_values_that_are_not_finite_are_bad_records(tmp_path, caplog):
    def edit(episodes):
        episodes[1]["action/world_vector"][2] = np.nan
        episodes[3]["observation/base_pose_tool_reached"][0, 0] = np.inf

    _, root = folder(tmp_path / "set", "fractal", edit=edit, shards=2)
    with pytest.raises(SourceError) as error:
        RldsSource(root, FRACTAL)
    for text in ("2 bad records, max_bad_records is 0", "-00000-of-00002 record 1", "not finite",
                 "-00001-of-00002 record 1", "action/world_vector"):  # fmt: skip
        assert text in str(error.value)
    source = RldsSource(root, FRACTAL, max_bad_records=2)
    assert len(source) == 10 and source.left_out() == {"bad records": 2}
    assert "left out 2 bad records" in caplog.text
    assert all(np.isfinite(sample.robot.actions).all() for sample in source)


def test_a_flipped_byte_is_refused_or_counted(tmp_path):
    episodes, root = folder(tmp_path / "set", "bridge")
    (path,) = root.glob("*.tfrecord-*")
    data = bytearray(path.read_bytes())
    data[data.index(episodes[2]["observation/image_0"][3]) + 200] ^= 4
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"{path.name} record 2: fails its checksum"):
        RldsSource(root, BRIDGE)
    source = RldsSource(root, BRIDGE, max_bad_records=1)
    assert len(source) == 2 + 3 + 1 and source.left_out() == {"bad records": 1}


def test_images_without_a_header_are_left_out_where_a_view_needs_them(tmp_path):
    def edit(episodes):
        episodes[0]["observation/image_1"][1] = b""
        episodes[0]["observation/image_1"][2] = b"not an image"

    _, root = folder(tmp_path / "set", "bridge", edit=edit)
    assert len(RldsSource(root, BRIDGE)) == 10
    source = RldsSource(root, BRIDGE, views=BOTH)
    assert source.left_out() == {"no readable image in observation/image_1": 2}
    assert len(source) == 8


def test_an_image_that_does_not_decode_is_a_bad_record(tmp_path):
    def edit(episodes):
        image = episodes[0]["observation/image_0"][1]
        episodes[0]["observation/image_0"][1] = image[: len(image) // 2]

    _, root = folder(tmp_path / "set", "bridge", edit=edit)
    source = RldsSource(root, BRIDGE)
    with pytest.raises(BadRecordError, match="record 0 step 1 observation/image_0: not a readable"):
        source[0]
    assert source[1].record.endswith("record 0 step 2")


def test_samples_that_the_caller_drops_are_counted(tmp_path):
    _, root = folder(tmp_path / "set", "bridge")
    source = RldsSource(root, BRIDGE)
    shorter = source.drop(np.array([0, 3, 9]), "too long").drop(np.array([0]), "too wide")
    expected = [source[i] for i in range(10) if i not in (0, 1, 3, 9)]
    for a, b in zip(shorter, expected, strict=True):
        assert_samples_equal(a, b)
    assert shorter.left_out() == {"too long": 3, "too wide": 1}
    assert pickle.loads(pickle.dumps(shorter)).left_out() == shorter.left_out()
    assert len(source) == 10
    with pytest.raises(IndexError, match="0..9"):
        source.drop(np.array([10]), "too long")
    with pytest.raises(SourceError, match="no step is kept"):
        source.drop(np.arange(10), "too long")


# --- What the schedule asks ---------------------------------------------------------------------


def test_lengths_are_those_of_encoded_samples(tmp_path):
    def edit(episodes):
        rng = np.random.default_rng(9)
        episodes[1]["observation/image_1"] = reference.random_images(rng, 5, 120, 180)

    _, root = folder(tmp_path / "set", "bridge", edit=edit)
    source = RldsSource(root, BRIDGE, views=BOTH)
    encoder = SampleEncoder(byte_level_tokenizer())
    lengths = source.lengths(encoder)
    for i, sample in enumerate(source):
        encoded = encode_robot(
            sample.turns[0].text, sample.images, encoder.prompt, encoder.tokenizer,
            image_config=encoder.image_config,
        )  # fmt: skip
        assert lengths.tokens[i] == len(encoded.tokens)
        assert lengths.slots[i] == len(encoded.slots.patches)
    assert lengths.robot.tolist() == [1] * 10 and lengths.targets.tolist() == [0] * 10
    assert len(set(lengths.tokens.tolist())) == 2
    again = pickle.loads(pickle.dumps(source)).lengths(encoder)
    np.testing.assert_array_equal(again.tokens, lengths.tokens)


def test_episodes_are_those_of_the_samples(tmp_path):
    _, root = folder(tmp_path / "set", "fractal", steps=(3, 1, 2))
    source = RldsSource(root, FRACTAL, chunk=1)
    assert source.episodes().tolist() == [0, 0, 0, 1, 2, 2]
    whole = list(source.standard_episodes())
    assert [len(episode.actions) for episode in whole] == [3, 1, 2]
    actions = np.concatenate([episode.actions for episode in whole])
    for i, sample in enumerate(source):
        np.testing.assert_array_equal(sample.robot.actions[0], actions[i])
