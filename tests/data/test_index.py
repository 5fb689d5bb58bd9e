import io
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data.episode_scan import image_size
from st4vla_jax.data.index import open_index
from st4vla_jax.data.index_folder import ArrayWriter, build_once, cache_root, open_array
from st4vla_jax.data.shards import ShardReader
from st4vla_jax.data.tfds_folder import FolderError, read_folder
from st4vla_jax.data.tfrecord import ShardError
from tests.reference import shards as reference

CAMERAS = tuple(f"observation/image_{i}" for i in range(2))
COLUMNS = ("observation/state", "action", "is_first")
REPO = Path(__file__).parents[2]


def bridge_folder(root: Path, steps=(4, 5, 6, 3), **options) -> Path:
    rng = np.random.default_rng(0)
    episodes = [reference.bridge(rng, n, f"task {i % 2}") for i, n in enumerate(steps)]
    return reference.write_folder(root, reference.BRIDGE, {"train": episodes}, **options)


def opened(root: Path, split: str = "train", images=CAMERAS, columns=COLUMNS, **options):
    return open_index(
        read_folder(root), split,
        images=images, columns=columns, language="language_instruction", **options,
    )  # fmt: skip


def shard(root: Path, number: int = 0) -> Path:
    return sorted(root.glob("*-train.*-of-*"))[number]


# --- What it holds ------------------------------------------------------------------------------


@pytest.mark.parity
def test_a_thousand_real_samples_are_byte_equal_to_a_protobuf_parse(shared, tmp_path):
    cameras = tuple(f"observation/image_{i}" for i in range(4))
    root = shared / "data/bridge_dataset"
    index = opened(root, images=cameras, index_dir=tmp_path)
    path = root / "1.0.0" / index.shards[0].name
    parsed = [reference.parse(r).features.feature for r in reference.tfrecord_records(path)]
    assert len(index.episodes) == 25 and index.episodes["steps"].tolist() == [10] * 25
    reader = ShardReader(path.parent, index.shards)
    rng = np.random.default_rng(0)
    for episode, step in zip(rng.integers(25, size=250), rng.integers(10, size=250), strict=True):
        row = index.episodes[episode]
        rows = [index.images(camera)[row["start"] + step] for camera in cameras]
        ranges = [(int(image["start"]), int(image["size"])) for image in rows]
        found = reader.read(
            int(row["shard"]), int(row["record"]), int(row["offset"]), ranges, lambda _: True
        )
        expected = [parsed[episode][f"steps/{c}"].bytes_list.value[step] for c in cameras]
        assert found == expected
        assert [(image["height"], image["width"]) for image in rows] == [(64, 64)] * 4
    for features, columns in zip(parsed, index.columns(), strict=True):
        for name in ("observation/state", "action"):
            expected = np.array(features[f"steps/{name}"].float_list.value, np.float32)
            np.testing.assert_array_equal(columns[name], expected.reshape(10, 7))
    texts = [index.instructions[i] for i in index.language[::10]]
    key = "steps/language_instruction"
    assert texts == [f[key].bytes_list.value[0].decode().strip() for f in parsed]


def test_columns_keep_their_dtypes_and_packed_ones_their_bytes(tmp_path):
    rng = np.random.default_rng(1)
    episodes = [reference.kuka(rng, n) for n in (3, 1, 5)]
    root = reference.write_folder(tmp_path / "kuka", reference.KUKA, {"train": episodes}, shards=2)
    columns = ("observation/clip_function_input/base_pose_tool_reached", "action/terminate_episode")
    index = open_index(
        read_folder(root), "train", images=("observation/image",), columns=columns,
        language="observation/natural_language_instruction",
    )  # fmt: skip
    for episode, found in zip(episodes, index.columns(), strict=True):
        assert found[columns[0]].tolist() == episode[columns[0]]
        assert found[columns[1]].dtype == np.int32
        np.testing.assert_array_equal(found[columns[1]], episode[columns[1]])


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"format": "JPEG"}),
        ("RGB", {"format": "JPEG", "progressive": True}),
        ("L", {"format": "JPEG"}),
        ("RGB", {"format": "JPEG", "exif": b"Exif\x00\x00" + bytes(300), "comment": b"x" * 99}),
        ("RGBA", {"format": "PNG"}),
        ("P", {"format": "PNG"}),
        ("RGB", {"format": "WEBP"}),
        ("RGB", {"format": "BMP"}),
    ],
)
def test_image_sizes_are_those_of_pil(mode, options):
    for size in ((17, 5), (300, 200), (64, 64)):
        out = io.BytesIO()
        Image.new(mode, size).save(out, **options)
        assert image_size(out.getvalue()) == size[::-1]


def test_what_is_no_image_has_no_size():
    jpeg = reference.encode_image(np.zeros((8, 8, 3), np.uint8))
    for data in (
        b"",
        b"text",
        b"\xff\xd8",
        b"\xff\xd8\xff\xff\xff",
        b"\x89PNG\r\n\x1a\n",
        jpeg[:30],
    ):
        assert image_size(data) == (0, 0)


def test_array_writer_grows_past_its_header(tmp_path):
    with ArrayWriter(tmp_path / "a.npy", np.int16, (2,)) as writer:
        for i in range(1200):
            writer.append(np.full((100, 2), i))
    array = open_array(tmp_path / "a.npy")
    assert array.shape == (120_000, 2) and (array[:, 0] == np.repeat(np.arange(1200), 100)).all()


# --- Folders that are not as they should be -----------------------------------------------------


def test_missing_shards_are_all_named(tmp_path):
    root = bridge_folder(tmp_path / "set", shards=4)
    shard(root, 1).unlink()
    shard(root, 1).unlink()
    with pytest.raises(FolderError) as error:
        read_folder(root)
    assert "train.tfrecord-00001-of-00004" in str(error.value)
    assert "train.tfrecord-00002-of-00004" in str(error.value)


def test_truncated_shards_are_all_named(tmp_path):
    root = bridge_folder(tmp_path / "set", shards=3)
    for number in (0, 2):
        path = shard(root, number)
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ShardError) as error:
        opened(root)
    assert str(error.value).count("truncated record at byte") == 2
    assert "00000-of-00003" in str(error.value) and "00002-of-00003" in str(error.value)
    assert not list((root / ".st4vla_index").glob("train*"))


def test_a_shard_cut_between_records_is_found_by_its_count(tmp_path):
    root = bridge_folder(tmp_path / "set")
    path = shard(root)
    path.write_bytes(b"".join(map(reference.frame, reference.tfrecord_records(path)[:-1])))
    with pytest.raises(ShardError, match="3 records, dataset_info.json says 4"):
        opened(root)


def test_a_truncated_array_record_is_named(tmp_path):
    root = bridge_folder(tmp_path / "set", file_format="array_record")
    path = shard(root)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ShardError, match=f"{path.name}.*not a whole array_record"):
        opened(root)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_flipped_byte_leaves_out_its_record_only(tmp_path, file_format):
    root = bridge_folder(tmp_path / "set", file_format=file_format)
    path = shard(root)
    data = bytearray(path.read_bytes())
    needle = reference.bridge(np.random.default_rng(0), 4)["observation/image_0"][0]
    data[data.index(needle) + 100] ^= 1
    path.write_bytes(data)
    index = opened(root)
    assert [str(bad) for bad in index.bad] == [f"{path.name} record 0: fails its checksum"]
    assert index.episodes["record"].tolist() == [1, 2, 3]


def test_records_whose_columns_disagree_are_bad(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [reference.bridge(rng, 4) for _ in range(4)]
    episodes[0]["action"] = episodes[0]["action"][:3]
    del episodes[2]["observation/image_0"]
    records = [*episodes[:3], b"no example at all"]
    root = reference.write_folder(tmp_path / "set", reference.BRIDGE, {"train": records})
    index = opened(root)
    assert [bad.record for bad in index.bad] == [0, 2, 3]
    reasons = "\n".join(map(str, index.bad))
    assert "different lengths" in reasons and "no feature 'steps/observation/image_0'" in reasons
    assert "not a tf.train.Example" in reasons


def test_unknown_columns_and_splits_are_named_with_the_nearest(tmp_path):
    root = bridge_folder(tmp_path / "set")
    with pytest.raises(FolderError) as error:
        opened(root, images=("observation/image_00",), columns=("acton", "observation/image_1"))
    for text in ("image_00'", "did you mean 'action'", "of kind image, not tensor or text"):
        assert text in str(error.value)
    with pytest.raises(FolderError, match="no split 'trian', did you mean 'train'"):
        opened(root, "trian")
    ragged = {**reference.BRIDGE, "action": reference.tensor_feature(-1)}
    ragged["observation/state"] = reference.tensor_feature(7, dtype="bfloat16")
    other = reference.write_folder(tmp_path / "ragged", ragged, {"train": [b""]})
    with pytest.raises(FolderError) as error:
        opened(other)
    assert "no fixed shape: (-1,)" in str(error.value) and "bfloat16" in str(error.value)
    with pytest.raises(FolderError, match="not a tfds data set"):
        read_folder(tmp_path / "set/nowhere")


def test_a_folder_without_dataset_info_is_read_by_its_names(tmp_path):
    root = bridge_folder(tmp_path / "set" / "1.0.0", shards=2, info=False)
    assert opened(root.parent).episodes["steps"].tolist() == [4, 5, 6, 3]
    bridge_folder(tmp_path / "set" / "2.0.0")
    with pytest.raises(FolderError, match="several versions.*1.0.0, 2.0.0"):
        read_folder(tmp_path / "set")


# --- One index, complete or absent --------------------------------------------------------------


def test_an_index_is_built_once_and_again_when_a_shard_changed(tmp_path):
    root = bridge_folder(tmp_path / "set")
    first = opened(root)
    stamp = (first.folder / "index.json").stat().st_mtime_ns
    assert opened(root).folder == first.folder
    assert (first.folder / "index.json").stat().st_mtime_ns == stamp
    os.utime(shard(root), ns=(1, 1))
    assert opened(root).folder != first.folder


def test_an_index_copied_in_part_is_built_again(tmp_path):
    root = bridge_folder(tmp_path / "set")
    folder = opened(root).folder
    for name in ("image.1.npy", "index.json"):
        with (folder / name).open("r+b") as file:
            file.truncate(100)
        assert opened(root).images(CAMERAS[1]).shape == (18,)
    (folder / "language.npy").unlink()
    assert len(opened(root).language) == 18


def test_without_write_permission_the_user_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert tmp_path / "cache" in cache_root(tmp_path, None).parents


CHILD = """
import logging, os, sys, time
from pathlib import Path
logging.basicConfig(level=logging.INFO)
import st4vla_jax.data.index as index
from tests.data.test_index import opened
root, work, seconds, limit = Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:])
scan = index.scan_episode
def slow(*args):
    (work / f"scanning-{os.getpid()}").touch()
    time.sleep(seconds)
    return scan(*args)
index.scan_episode = slow
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print(len(opened(root).episodes))
"""


def child(root: Path, work: Path, seconds: float = 0.0, limit: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(work), str(seconds), str(limit)],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_two_processes_that_build_at_once_build_one_index(tmp_path):
    root = bridge_folder(tmp_path / "set")
    both = [child(root, tmp_path, seconds=0.3) for _ in range(2)]
    results = [process.communicate(timeout=100) for process in both]
    assert [out.strip() for out, _ in results] == ["4", "4"], results
    # Only one of them scanned; the other waited and used what it made.
    assert len(list(tmp_path.glob("scanning-*"))) == 1
    assert len([p for p in (root / ".st4vla_index").iterdir() if p.is_dir()]) == 1


def test_a_killed_build_is_never_taken_for_an_index(tmp_path):
    root = bridge_folder(tmp_path / "set")
    process = child(root, tmp_path, seconds=30)
    home = root / ".st4vla_index"
    wait_for(lambda: list(tmp_path.glob("scanning-*")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [p.name for p in home.iterdir() if p.is_dir()]
    assert len(left) == 1 and left[0].startswith(".train-") and left[0].endswith(".tmp")
    assert len(opened(root).episodes) == 4
    assert [p.name for p in home.iterdir() if p.is_dir()] == [left[0][1:-4]]


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path):
    root = bridge_folder(tmp_path / "set", steps=(40, 40))
    process = child(root, tmp_path, limit=1024)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "cannot be written (File too large); make room, or set index_dir" in stderr
    assert not [p for p in (root / ".st4vla_index").iterdir() if p.is_dir()]
    assert len(opened(root).language) == 80


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(work: Path):
        (work / "a").write_text("x")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        build_once(tmp_path / "index", build)
    assert [p.name for p in tmp_path.iterdir()] == [".index.lock"]


def test_progress_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    opened(bridge_folder(tmp_path / "set", shards=2))
    assert "indexed 2 of 2 shards" in caplog.text
