"""Grounding records, converted to array_record, to JSONL, and back."""

import itertools
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data.encoder import SampleEncoder
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.grounding_folder import GroundingFolder
from st4vla_jax.data.image import decode_image
from st4vla_jax.data.settings import DataSettings, SetSettings, open_source
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.source_files import SourceError
from st4vla_jax.data.tokenizer import byte_level_tokenizer
from st4vla_jax.data.writer import RECORDS
from tests.reference import shards as reference
from tests.reference.converted import convert, manifest, records


def grounding_file(root):
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for number in range(5):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"images/{number}.jpg")
    Image.fromarray(pixels[..., 0]).save(root / "images/gray.png")
    Image.fromarray(pixels).save(root / "images/other.bmp")
    Image.fromarray(pixels).convert("P").save(root / "images/palette.png")
    Image.fromarray(pixels).convert("RGBA").save(root / "images/alpha.png")

    def record(images, value, **more):
        human = {"from": "human", "value": "<image>" * len(images) + "find it"}
        answer = {"from": "gpt", "value": value, **more}
        return {"images": images, "conversations": [human, answer], "id": next(ids)}

    ids, lines = itertools.count(), []
    for number in range(5):
        x = 3 * number + 0.5
        region = {"kind": "box", "coordinates": [[x, 4], [x + 9, 20]], "image": 0, "label": "it"}
        images = [f"images/{number}.jpg"]
        lines.append(record(images, "<region>", regions=[region]))
    lines.append(record([f"images/{n}" for n in ("gray.png", "0.jpg")], "nothing"))
    lines.append(record(["images/other.bmp"], "at [0.25, 0.5]"))
    lines += [record(["images/palette.png"], "a"), record(["images/alpha.png"], "b")]
    lines.append(record([], "no image"))
    path = root / "set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_sources_equal(a, b):
    assert len(a) == len(b)
    for index in range(len(a)):
        x, y = a[index], b[index]
        for one, other in zip(x.images, y.images, strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(x.turns, y.turns, strict=True):
            assert (one.role, one.text) == (other.role, other.text)
            for r, s in zip(one.regions, other.regions, strict=True):
                assert (r.kind, r.image, r.label) == (s.kind, s.image, s.label)
                np.testing.assert_array_equal(r.coordinates, s.coordinates)


@pytest.mark.parity
def test_grounding_and_back(tmp_path):
    import tensorflow_datasets as tfds

    path = grounding_file(tmp_path / "in")
    options = ["--coordinates", "fraction"]
    out = convert(path, tmp_path / "out", "--shard_records", 3, *options)
    train = manifest(out)["splits"]["train"]
    assert [shard["records"] for shard in train["shards"]] == [3, 3, 3, 1]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    read = list(tfds.builder_from_directory(str(out)).as_data_source()["train"])
    for line, entry in zip(lines, read, strict=True):
        stored = json.loads(entry["record"])
        assert stored["id"] == line["id"]
        assert len(entry["images"]) == len(line["images"])
        for name, pixels in zip(line["images"], entry["images"], strict=True):
            expected = decode_image(tmp_path / "in" / name)
            assert pixels.shape == expected.shape
            np.testing.assert_array_equal(pixels, expected)
    original = (tmp_path / "in/images/2.jpg").read_bytes()
    feature = reference.parse(records(out)[2]).features.feature
    assert list(feature["images"].bytes_list.value) == [original]

    before = GroundingSource(path, name="a", coordinates="fraction")
    for source, folder in ((path, "direct"), (out, "back")):
        more = options if source == path else []
        again = convert(source, tmp_path / folder, "--to", "jsonl", *more)
        assert_sources_equal(before, GroundingSource(again / RECORDS, name="a"))


def test_a_converted_folder_is_a_source(tmp_path):
    path = grounding_file(tmp_path / "in")
    out = convert(path, tmp_path / "out", "--shard_records", 3, "--coordinates", "fraction")
    before = GroundingSource(path, name="a", coordinates="fraction")
    source = GroundingFolder(out, name="a", index_dir=tmp_path / "index")
    assert_sources_equal(before, source)
    assert source.groups == before.groups and len(source) == 10
    assert len(pickle.dumps(source)) < 1000
    assert_sources_equal(source, pickle.loads(pickle.dumps(source)))
    ours, theirs = (s.lengths(SampleEncoder(byte_level_tokenizer())) for s in (source, before))
    for name in ("tokens", "slots", "targets", "robot"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    assert GroundingFolder(moved, name="a").fingerprint() == source.fingerprint()
    parts = [GroundingFolder(out, name="a", holdout=0.3, part=p) for p in ("train", "held_out")]
    assert [len(p) for p in parts] == [7, 3]
    assert {s.record for p in parts for s in p} == {s.record for s in source}
    # By settings: a folder where a JSON file could be.
    entry = SetSettings("a", "grounding", str(out))
    assert isinstance(open_source(entry, DataSettings((entry,))), GroundingFolder)


def test_faults_of_a_converted_folder(tmp_path):
    out = convert(grounding_file(tmp_path / "in"), tmp_path / "out", "--shard_records", 3)
    first, second, *_ = (out / s["name"] for s in manifest(out)["splits"]["train"]["shards"])
    data = bytearray(second.read_bytes())
    source = GroundingFolder(out, name="a", index_dir=tmp_path / "index")
    stamp = second.stat()
    # The JPEG's bytes: riegeli keeps these chunks as they are, behind a checksum.
    data[data.find(b"\xff\xd8") + 300] ^= 4
    second.write_bytes(data)
    os.utime(second, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    source._reader._delays = (0.0,)
    with pytest.raises(BadRecordError, match=f"{second.name} record 0: .*checksum"):
        source[3]
    with pytest.raises(SourceError, match=f"{second.name} record 0: .*hash mismatch"):
        GroundingFolder(out, name="a")
    first.unlink()
    with pytest.raises(SourceError, match=f"missing:\n.*{first.name}"):
        GroundingFolder(out, name="a")
    with pytest.raises(SourceError, match="no conversion.json; not a folder of data.convert"):
        GroundingFolder(tmp_path / "in", name="a")
    tree = manifest(out) | {"format": "rlds"}
    (out / "conversion.json").write_text(json.dumps(tree))
    with pytest.raises(SourceError, match="holds rlds episodes"):
        GroundingFolder(out, name="a")


@pytest.mark.parity
def test_real_llava_records(shared, tmp_path):
    shutil.copytree(shared / "data/llava_demo", tmp_path / "in")
    path = tmp_path / "in/single_images.json"
    out = convert(path, tmp_path / "out")
    assert manifest(out)["splits"]["train"]["records"] == 3
    convert(out, tmp_path / "back", "--to", "jsonl")
    before = GroundingSource(path, name="a")
    assert_sources_equal(before, GroundingSource(tmp_path / "back" / RECORDS, name="a"))


def test_grounding_faults(tmp_path):
    path, out = grounding_file(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "in/images/3.jpg").unlink()
    with pytest.raises(SystemExit, match="images/3.jpg"):
        convert(path, out)
    convert(grounding_file(tmp_path / "b"), out)
    with pytest.raises(SystemExit, match="no such setting"):
        convert(out, tmp_path / "back", "--to", "jsonl", "--shard_records", 3)
    reference_root = reference.write_folder(tmp_path / "r", {}, {"train": []})
    with pytest.raises(SystemExit, match="not a folder of this converter"):
        convert(reference_root, tmp_path / "back", "--to", "jsonl")
    assert not (tmp_path / "back").exists()
