import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.image import ImageError, decode_image
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import Part, RobotSpec
from st4vla_jax.data.source import BadRecordError, Region, Turn
from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.tfds_write import EpisodeError, ShardWriter, check_columns, checksums
from st4vla_jax.data.tfrecord import masked_crc32c
from st4vla_jax.data.writer import FLAGS, RECORDS, EpisodeWriter, GroundingWriter
from tests.reference import shards as reference

COLUMNS = {
    "observation/image": Column("image", (32, 40, 3), "uint8", "png"),
    "observation/wrist": Column("image", (-1, -1, 3), "uint8", "jpeg"),
    "observation/state": Column("tensor", (7,), "float64", "bytes"),
    "observation/clock": Column("tensor", (), "float64", "bytes"),
    "observation/contacts": Column("tensor", (2, 3), "int32"),
    "action": Column("tensor", (7,), "float32"),
}
METADATA = {"path": Column("text"), "seed": Column("tensor", (), "int64")}
STEPS = (3, 1, 5, 2, 4)


def episode(number):
    rng = np.random.default_rng(number)
    steps = STEPS[number]
    return {
        "observation/image": rng.integers(0, 256, (steps, 32, 40, 3), np.uint8),
        "observation/wrist": reference.random_images(rng, steps, 24, 24),
        "observation/state": rng.normal(size=(steps, 7)),
        "observation/clock": rng.normal(size=steps),
        "observation/contacts": rng.integers(-(2**31), 2**31, (steps, 2, 3), np.int32),
        "action": rng.normal(size=(steps, 7)).astype(np.float32),
        "language_instruction": f"stack cup {number} – slowly",
    }


def write(out, **options):
    with EpisodeWriter(
        out, COLUMNS, name="tiny", metadata=METADATA, shard_episodes=2, **options
    ) as writer:
        for number in range(len(STEPS)):
            split = "val" if number == 3 else "train"
            metadata = {"path": f"raw/{number}.npz", "seed": -number}
            writer.add(episode(number), split=split, metadata=metadata)
    return out


# --- Episodes -----------------------------------------------------------------------------------

READ = """
import sys
import numpy as np
import tensorflow_datasets as tfds
sys.path.insert(0, {root!r})
from tests.data.test_writer import STEPS, episode
builder = tfds.builder_from_directory({out!r})
assert builder.info.name == "tiny" and str(builder.info.version) == "2.1.0"
sources = builder.as_data_source()
for split, numbers in (("train", (0, 1, 2, 4)), ("val", (3,))):
    assert builder.info.splits[split].num_examples == len(sources[split]) == len(numbers)
    for number, read in zip(numbers, sources[split]):
        expected, last = episode(number), STEPS[number] - 1
        path = read["episode_metadata"]["path"].decode()
        assert (path, read["episode_metadata"]["seed"]) == (f"raw/{{number}}.npz", -number)
        assert len(read["steps"]) == STEPS[number]
        for t, step in enumerate(read["steps"]):
            seen = step["observation"]
            np.testing.assert_array_equal(seen["image"], expected["observation/image"][t])
            for name in ("state", "clock", "contacts"):
                np.testing.assert_array_equal(seen[name], expected["observation/" + name][t])
                assert seen[name].dtype == expected["observation/" + name].dtype
            assert seen["wrist"].shape == (24, 24, 3)
            np.testing.assert_array_equal(step["action"], expected["action"][t])
            assert step["language_instruction"].decode() == expected["language_instruction"]
            flags = [step[n] for n in ("is_first", "is_last", "is_terminal", "reward", "discount")]
            assert flags == [t == 0, t == last, t == last, float(t == last), 1.0], flags
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""


@pytest.mark.parity
def test_tfds_reads_episodes_without_tensorflow(tmp_path, pytestconfig):
    out = write(tmp_path / "tiny", version="2.1.0")
    root = str(pytestconfig.rootpath.parent)
    code = READ.format(root=root, out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]


def test_folder_is_named_as_tfds_names_it(tmp_path):
    out = write(tmp_path / "tiny/1.0.0")
    assert sorted(p.name for p in out.iterdir()) == [
        "dataset_info.json",
        "features.json",
        "tiny-train.array_record-00000-of-00002",
        "tiny-train.array_record-00001-of-00002",
        "tiny-val.array_record-00000-of-00001",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["1.0.0"]
    info = json.loads((out / "dataset_info.json").read_text())
    assert [s["shardLengths"] for s in info["splits"]] == [["2", "2"], ["1"]]


def test_rlds_source_reads_it(tmp_path):
    spec = RobotSpec(
        name="tiny",
        embodiment="arm",
        images={"primary": "observation/image", "wrist": "observation/wrist"},
        language="language_instruction",
        action=(Part("action"),),
        state=(Part("observation/state"), Part("observation/contacts")),
    )
    source = RldsSource(write(tmp_path / "tiny"), spec, chunk=2, views=("primary", "wrist"))
    assert len(source) == sum(STEPS) - STEPS[3]
    expected = episode(0)
    for t in range(STEPS[0]):
        sample = source[t]
        np.testing.assert_array_equal(sample.images[0], expected["observation/image"][t])
        wrist = decode_image(expected["observation/wrist"][t])
        np.testing.assert_array_equal(sample.images[1], wrist)
        np.testing.assert_array_equal(sample.robot.actions[0], expected["action"][t])
        state = [expected["observation/state"][t], expected["observation/contacts"][t].ravel()]
        np.testing.assert_array_equal(sample.robot.state, np.concatenate(state).astype(np.float32))
        assert sample.turns[0].text == expected["language_instruction"]


def test_same_episodes_give_the_same_bytes_in_every_process(tmp_path, pytestconfig):
    # Protobuf orders maps by addresses, so one process alone shows nothing.
    write(tmp_path / "here")
    for name in ("b", "c"):
        code = f"from tests.data.test_writer import write; write({str(tmp_path / name)!r})"
        root = pytestconfig.rootpath.parent
        subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
        for path in (tmp_path / "here").iterdir():
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path.name


def test_given_flags_are_kept(tmp_path):
    failed = {"is_terminal": np.zeros(3, bool), "reward": np.array([0.5, 0, 0], np.float32)}
    with EpisodeWriter(tmp_path / "out", {}, name="x") as writer:
        writer.add({"language_instruction": ["a", "b", "c"], **failed})
    (shard,) = (tmp_path / "out").glob("*array_record*")
    reader = reference_reader(shard)
    feature = reference.parse(reader.read([0])[0]).features.feature
    assert list(feature["steps/reward"].float_list.value) == [0.5, 0, 0]
    assert list(feature["steps/is_terminal"].int64_list.value) == [0, 0, 0]
    assert list(feature["steps/is_last"].int64_list.value) == [0, 0, 1]


def reference_reader(path):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"action": np.zeros((3, 6), np.float32)}, ["steps/action", "[6]", "[7]"]),
        ({"action": np.zeros((2, 7), np.float32)}, ["same length", "'action': 2"]),
        ({"action": None}, ["action: missing"]),
        ({"reach": np.zeros(3)}, ["reach: not declared"]),
        ({"observation/contacts": np.zeros((3, 2, 3))}, ["contacts", "float64 values", "int32"]),
        ({"observation/image": np.zeros((3, 32, 41, 3), np.uint8)}, ["image", "[32, 41, 3]"]),
        ({"observation/image": np.zeros((3, 32, 40, 3))}, ["image", "float64", "uint8"]),
    ],
)
def test_an_episode_that_does_not_fit_says_why_and_leaves_nothing(tmp_path, change, words):
    steps = {k: v for k, v in {**episode(0), **change}.items() if v is not None}
    with (
        pytest.raises(EpisodeError) as error,
        EpisodeWriter(tmp_path / "out", COLUMNS, name="x") as writer,
    ):
        writer.add(episode(1))
        writer.add(steps)
    assert all(word in str(error.value) for word in words), error.value
    assert not list(tmp_path.iterdir())


def test_columns_that_cannot_be_written_are_all_named(tmp_path):
    columns = {
        "a": Column("image", (2, 2, 3), "uint8"),
        "b": Column("tensor", (2,), "float64"),
        "c/d": Column("tensor", (), "uint64"),
        "c": Column("text"),
        "e": Column("other"),
    }
    with pytest.raises(EpisodeError) as error:
        EpisodeWriter(tmp_path / "out", columns, name="x")
    for word in ("a: an image", "b: float64", "c/d: uint64", "c/d: c is a column", "e: "):
        assert word in str(error.value)
    check_columns(FLAGS)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="already there"):
        write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_no_episode_is_no_data_set(tmp_path):
    with (
        pytest.raises(ValueError, match="no episode"),
        EpisodeWriter(tmp_path / "out", {}, name="x"),
    ):
        pass
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys
import numpy as np
from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.writer import EpisodeWriter, GroundingWriter
from st4vla_jax.data.source import Turn
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
rng = np.random.default_rng(0)
pixels = rng.integers(0, 256, (5, 128, 128, 3), np.uint8)
out = sys.argv[2]
try:
    if sys.argv[1] == "episodes":
        columns = {"image": Column("image", (128, 128, 3), "uint8", "png")}
        with EpisodeWriter(out, columns, name="x") as writer:
            for _ in range(4):
                writer.add({"image": pixels, "language_instruction": "go"})
    else:
        with GroundingWriter(out) as writer:
            for number in range(2000):
                text = str(number) * 60
                writer.add([pixels[0]], [Turn("user", "<image>?"), Turn("assistant", text)])
except OSError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("what", ["episodes", "grounding"])
def test_a_full_disk_leaves_nothing(tmp_path, what, pytestconfig):
    done = subprocess.run(
        [sys.executable, "-c", FULL, what, str(tmp_path / "out")],
        capture_output=True, text=True, cwd=pytestconfig.rootpath.parent,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert "large" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_shard_that_reads_back_otherwise_is_no_shard(tmp_path):
    with pytest.raises(OSError, match="not what was written"), ShardWriter(tmp_path / "s") as shard:
        shard.write(b"one")
        shard._checksums[0] ^= 1
    assert not list(tmp_path.iterdir())
    with ShardWriter(tmp_path / "s") as shard:
        shard.write(b"one")
    assert list(checksums(tmp_path / "s")) == [masked_crc32c(b"one")]


# --- Grounding ----------------------------------------------------------------------------------


def test_grounding_source_reads_what_was_added(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
    encoded = reference.encode_image(rng.integers(0, 256, (30, 20, 3), np.uint8))
    box = Region("box", np.array([[3.5, 4], [40, 44.25]], np.float32), 0, "red cup")
    point = Region("point", np.array([[7, 8]], np.float32), 1)
    trace = Region("trajectory", np.array([[1, 2], [3, 4], [60, 5]], np.float32))
    records = [
        ((pixels,), (Turn("user", "<image>where?"), Turn("assistant", "<region>", (box,)))),
        (
            (pixels, encoded),
            (
                Turn("user", "<image>and<image>?"),
                Turn("assistant", "at <coordinates> via <region>", (point, trace)),
            ),
        ),
        ((), (Turn("user", "hello"), Turn("assistant", "hi"))),
    ]
    with GroundingWriter(tmp_path / "out") as writer:
        for images, turns in records:
            writer.add(images, turns, source="made")
    source = GroundingSource(tmp_path / "out" / RECORDS, name="made")
    assert len(source) == len(records)
    assert len(list((tmp_path / "out/images").rglob("*.*"))) == 2  # the shared one is stored once
    for index, (images, turns) in enumerate(records):
        sample = source[index]
        assert source.record(index)["source"] == "made"
        for seen, given in zip(sample.images, images, strict=True):
            np.testing.assert_array_equal(seen, decode_image(given))
        for seen, given in zip(sample.turns, turns, strict=True):
            assert (seen.role, seen.text) == (given.role, given.text)
            for a, b in zip(seen.regions, given.regions, strict=True):
                assert (a.kind, a.image, a.label) == (b.kind, b.image, b.label)
                np.testing.assert_array_equal(a.coordinates, b.coordinates)
    stored = (tmp_path / "out/images").rglob("*.jpeg")
    assert [p.read_bytes() for p in stored] == [encoded]


@pytest.mark.parametrize(
    ("images", "turns", "error", "words"),
    [
        (1, [Turn("user", "<image>?")], BadRecordError, "no answer"),
        (0, [Turn("user", "<image>?"), Turn("assistant", "x")], BadRecordError, "image"),
        (
            1,
            [
                Turn("user", "<image>?"),
                Turn("assistant", "<region>", (Region("box", np.array([[5, 5], [99, 9]])),)),
            ],
            BadRecordError,
            "outside its image",
        ),
        (None, [Turn("user", "<image>?"), Turn("assistant", "x")], ImageError, "image"),
    ],
)
def test_records_that_cannot_be_read_are_refused(tmp_path, images, turns, error, words):
    given = [b"no image"] if images is None else [np.zeros((32, 32, 3), np.uint8)] * images
    with pytest.raises(error, match=words), GroundingWriter(tmp_path / "out") as writer:
        writer.add(given, turns)
    assert not list(tmp_path.iterdir())


def test_jpeg_on_request(tmp_path):
    pixels = np.full((40, 40, 3), 90, np.uint8)
    with GroundingWriter(tmp_path / "out", encoding="jpeg") as writer:
        writer.add([pixels], [Turn("user", "<image>?"), Turn("assistant", "gray")])
    (path,) = (tmp_path / "out/images").rglob("*.*")
    assert path.suffix == ".jpeg" and Image.open(path).format == "JPEG"
