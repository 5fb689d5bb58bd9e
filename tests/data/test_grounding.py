"""LLaVA records by byte offset."""

import json
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data.augment import Augment
from st4vla_jax.data.encoder import SampleEncoder
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.source import BadRecordError, Source
from st4vla_jax.data.source_files import SourceError
from st4vla_jax.data.tokenizer import Tokenizer, byte_level_tokenizer

REPOSITORY = Path(__file__).parents[2]
SIZES = {"a.png": (40, 60), "b.jpg": (48, 32), "c.png": (30, 30)}  # height, width


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def conversation(question, answer, regions=None, **keys):
    reply = {"from": "gpt", "value": answer}
    if regions is not None:
        reply["regions"] = regions
    return keys | {"conversations": [{"from": "human", "value": question}, reply]}


def box(*corners, label="cup", image=0):
    corners = [list(corners[:2]), list(corners[2:])]
    return {"kind": "box", "coordinates": corners, "label": label, "image": image}


GOOD = [
    conversation("<image>Where is the cup?", "<region>", [box(1, 2, 30, 35)], image="a.png"),
    conversation("Which is larger?\n<image> or <image>", "b", images=["a.png", "b.jpg"]),
    conversation("Say hé.", "hé"),
    conversation("<image>Q", "<region>, <region>", [box(0, 0, 9, 9), box(2, 2, 30.5, 30)],
                 images=["c.png"]),
]  # fmt: skip


def jsonl(folder, records, name="set.jsonl"):
    path = folder / name
    path.write_bytes(b"".join(
        r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records
    ))  # fmt: skip
    return path


def source(path, **keys):
    return GroundingSource(path, name="demo", index_dir=path.parent / "index", **keys)


def test_records_images_and_regions(folder):
    path = jsonl(folder, [GOOD[0], b"\n", *GOOD[1:]])
    demo = source(path)
    assert isinstance(demo, Source)
    assert len(demo) == 4
    first = demo[0]
    np.testing.assert_array_equal(first.images[0], np.asarray(Image.open(folder / "a.png")))
    (region,) = first.turns[1].regions
    assert (region.kind, region.label, region.image) == ("box", "cup", 0)
    assert region.coordinates.tolist() == [[1, 2], [30, 35]]
    assert (first.group, first.record) == ("demo/box", f"{path}:1")
    assert demo[1].record == f"{path}:3"  # the empty line counts
    assert [image.shape[:2] for image in demo[1].images] == [SIZES["a.png"], SIZES["b.jpg"]]
    assert demo[2].images == ()
    assert demo[2].turns[1].text == "hé"
    # Half a pixel outside is an annotation's rounding.
    assert demo[3].turns[1].regions[1].coordinates.tolist() == [[2, 2], [30, 30]]
    assert demo.groups == ("demo/text", "demo/box")
    with pytest.raises(IndexError):
        demo[4]


def test_array_equals_lines(folder):
    lines = source(jsonl(folder, GOOD))
    array = folder / "set.json"
    array.write_text("\ufeff [" + ",\n ".join(json.dumps(r, indent=2) for r in GOOD) + "]\n")
    copied = source(array)
    for i in range(4):
        assert copied.record(i) == lines.record(i)
        assert [t.text for t in copied[i].turns] == [t.text for t in lines[i].turns]
    for text in ("[", "[{}", "[{} {}]", "[{}] x", "[nonsense]"):
        array.write_text(text)
        with pytest.raises(SourceError, match="not a JSON array"):
            source(array)


def test_several_files_small_pickle_and_threads(folder):
    paths = [jsonl(folder, GOOD[:2], "one.jsonl"), jsonl(folder, GOOD[2:], "two.jsonl")]
    demo = GroundingSource(paths, name="demo", index_dir=folder / "index")
    data = pickle.dumps(demo)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert [copy[i].record for i in range(4)] == [
        f"{paths[0]}:1", f"{paths[0]}:2", f"{paths[1]}:1", f"{paths[1]}:2",
    ]  # fmt: skip
    order = [i % 4 for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: demo[i].turns[1].text, order))
    assert found == [demo[i].turns[1].text for i in order]


def test_fingerprint_follows_content_not_place(folder):
    demo = source(jsonl(folder, GOOD)).fingerprint()
    (folder / "moved").mkdir()
    moved = jsonl(folder / "moved", GOOD)
    assert source(moved, images=folder).fingerprint() == demo
    assert source(jsonl(folder, GOOD[:3])).fingerprint() != demo
    assert source(jsonl(folder, GOOD), coordinates="pixels").fingerprint() != demo


@pytest.mark.parametrize(
    ("coordinates", "numbers", "expected"),
    [
        ("pixels", [6, 8, 30, 40], [[6, 8], [30, 40]]),
        ("fraction", [0.1, 0.2, 0.5, 1.0], [[6, 8], [30, 40]]),
        ("thousand", [100, 200, 500, 1000], [[6, 8], [30, 40]]),
        ("80x120", [12, 16, 60, 80], [[6, 8], [30, 40]]),
        ("smart_resize", [8.4, 11.2, 42, 56], [[6, 8], [30, 40]]),  # 40x60 becomes 56x84
    ],
)
def test_numbers_in_texts_become_regions(folder, coordinates, numbers, expected):
    answer = f'[{{"bbox_2d": {numbers}, "label": "x"}}] at ({numbers[0]}, {numbers[1]})'
    record = conversation(f"<image>What is in {numbers}? 3 cups [1, 2, 3]", answer, image="a.png")
    path = jsonl(folder, [record])
    user, reply = source(path, coordinates=coordinates)[0].turns
    assert user.text == "<image>What is in <coordinates>? 3 cups [1, 2, 3]"
    assert reply.text == '[{"bbox_2d": <coordinates>, "label": "x"}] at <coordinates>'
    np.testing.assert_allclose(user.regions[0].coordinates, expected, rtol=1e-6)
    np.testing.assert_allclose(reply.regions[1].coordinates, expected[:1], rtol=1e-6)
    assert [r.kind for r in reply.regions] == ["box", "point"]
    assert source(path)[0].turns[1].text == answer  # "none" leaves texts alone
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        source(path, coordinates="percent")


def test_numbers_left_in_texts_are_counted_and_named(folder, caplog):
    records = [
        conversation("<image>?", "at [10, 20]", image="a.png"),
        conversation("<image>?", "a cup", image="a.png"),
        conversation("<image>In (1, 2, 3, 4)?", "no", image="a.png"),
    ]
    path = jsonl(folder, records)
    with caplog.at_level("WARNING"):
        source(path)
    assert f"2 records have bracketed numbers in their texts, first {path}:1" in caplog.text
    caplog.clear()
    source(path, coordinates="pixels")
    assert "bracketed" not in caplog.text


@pytest.mark.parametrize("augment", [False, True])
def test_lengths_are_what_is_encoded(folder, augment):
    demo = source(jsonl(folder, GOOD))
    encoder = SampleEncoder(
        byte_level_tokenizer(), augment=Augment() if augment else None, groups=demo.groups
    )
    lengths = demo.lengths(encoder)
    rng = np.random.default_rng(0)
    for i in range(4):
        encoded, robot = encoder(demo[i], rng)
        assert robot is None
        found = len(encoded.tokens), len(encoded.slots.patches), len(encoded.targets)
        planned = lengths.tokens[i], lengths.slots[i], lengths.targets[i]
        assert all(np.less_equal(found, planned)) if augment else found == planned
    # Kept beside the index: an encoder that can only say its fingerprint gets them too.
    kept = demo.lengths(type("Kept", (), {"fingerprint": encoder.fingerprint})())
    np.testing.assert_array_equal(kept.tokens, lengths.tokens)


BAD = {
    b'{"image": "a.png", \n': "not JSON",
    b"[1, 2]\n": "not an object",
    b'"\xff"\n': "not JSON",
    "outside": (conversation("<image>", "<region>", [box(1, 2, 70, 35)], image="a.png"),
                "lies outside its image of 60x40 pixels"),
    "negative": (conversation("<image>", "<region>", [box(-9, 2, 7, 35)], image="a.png"),
                 "lies outside"),
    "inside out": (conversation("<image>", "<region>", [box(9, 2, 7, 35)], image="a.png"),
                   "x2 <= x1"),
    "nan": (conversation("<image>", "<region>", [box(float("nan"), 2, 7, 35)], image="a.png"),
            "not finite"),
    "other image": (conversation("<image>", "<region>", [box(1, 2, 7, 9, image=1)], image="a.png"),
                    "image 1 of 1"),
    "no region": (conversation("<image>", "<region>", image="a.png"), "placeholders"),
    "shape": (conversation("<image>", "<region>", [{"kind": "box", "coordinates": [[1, 2]]}],
                           image="a.png"), "not readable"),
    "tags": (conversation("no tag", "x", image="a.png"), "0 <image> placeholders for 1 images"),
    "role": ({"conversations": [{"from": "robot", "value": "x"}]}, "human or gpt"),
    "control": (conversation("<|im_end|>", "x"), "control tokens"),
    "no answer": ({"conversations": [{"from": "human", "value": "x"}]}, "no answer"),
    "image": (conversation("<image>", "x", image=7), "expected a path"),
    "broken": (conversation("<image>", "x", image="broken.png"), "does not decode"),
}  # fmt: skip


def test_bad_records_are_named_together(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG nonsense")
    lines, reasons = [], []
    for key, value in BAD.items():
        lines.append(key if isinstance(key, bytes) else value[0])
        reasons.append(value if isinstance(key, bytes) else value[1])
    path = jsonl(folder, [GOOD[0], *lines, GOOD[1]])
    with pytest.raises(SourceError) as e:
        source(path)
    # A line break inside a record makes two broken lines of it.
    places = {line.split(": ")[0].strip(): line for line in str(e.value).splitlines()}
    texts = list(places.values())
    for reason in reasons:
        assert any(reason in text for text in texts), reason
    assert f"{path}:2" in places
    assert not (folder / "index").exists() or not list((folder / "index").glob("grounding-*"))

    demo = source(path, max_bad_records=100)
    assert len(demo) == 2
    assert len(demo.bad) == len(BAD)
    assert demo[1].record.startswith(str(path))


def test_missing_images_are_all_named(folder):
    records = [conversation("<image>", "x", image=f"no/{i // 2}.png") for i in range(300)]
    with pytest.raises(SourceError) as e:
        source(jsonl(folder, records))
    for i in range(150):
        assert f"missing: {folder}/no/{i}.png\n" in str(e.value)
    with pytest.raises(SourceError, match=r"missing:\n.*gone.jsonl"):
        source(folder / "gone.jsonl")
    with pytest.raises(SourceError, match="no records"):
        source(jsonl(folder, [b"\n\n"], "empty.jsonl"))


def test_image_that_breaks_later(folder):
    demo = source(jsonl(folder, GOOD))
    whole = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRecordError, match=rf"set.jsonl:2: {folder}/b.jpg"):
        demo[1]
    Image.new("RGB", (5, 5)).save(folder / "b.jpg")
    with pytest.raises(BadRecordError, match="when it was indexed"):
        demo[1]
    (folder / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError):  # an OSError: tried again, never padded
        demo[1]


def test_file_that_changes(folder):
    path = jsonl(folder, GOOD)
    demo = source(path)
    jsonl(folder, GOOD[1:])
    with pytest.raises(SourceError, match="changed since"):
        pickle.loads(pickle.dumps(demo))
    assert len(source(path)) == 3


def test_two_processes_build_one_index(folder):
    path = jsonl(folder, GOOD * 50)
    code = (
        "import sys\n"
        "from st4vla_jax.data.grounding import GroundingSource\n"
        "print(GroundingSource(sys.argv[1], name='x', index_dir=sys.argv[2]).fingerprint())"
    )
    command = [sys.executable, "-c", code, str(path), str(folder / "index")]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for _ in range(2)
    ]
    first, second = (run.communicate(timeout=60)[0].strip() for run in runs)
    assert first == second == source(path).fingerprint()
    assert len(list((folder / "index").glob("grounding-*"))) == 1


def test_full_disk_leaves_no_index(folder):
    path = folder / "set.json"
    path.write_text(json.dumps(GOOD * 500))

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    code = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from st4vla_jax.data.grounding import GroundingSource\n"
        "GroundingSource(sys.argv[1], name='x', index_dir=sys.argv[2])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path), str(folder / "index")],
        preexec_fn=small_files, capture_output=True, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert run.returncode
    assert "cannot be written (File too large)" in run.stderr
    assert [p for p in (folder / "index").iterdir() if p.is_dir()] == []
    assert len(source(path)) == 2000


def test_memory_is_an_index_not_a_list(folder):
    filler = conversation("Say it.", "x" * 400)
    demo = source(jsonl(folder, [filler] * 20_000))
    assert sum(p.stat().st_size for p in (folder / "index").rglob("*.npy")) < 20_000 * 40
    assert demo[19_999].turns[1].text == "x" * 400


def test_real_demo(shared, tmp_path):
    root = shared / "data/llava_demo"
    demo = GroundingSource(root / "single_images.json", name="demo", index_dir=tmp_path)
    records = json.loads((root / "single_images.json").read_text())
    assert len(demo) == len(records) == 3
    for i, record in enumerate(records):
        assert demo.record(i) == record
        (image,) = demo[i].images
        np.testing.assert_array_equal(
            image, np.asarray(Image.open(root / record["image"]).convert("RGB"))
        )
        assert demo[i].turns[1].text == record["conversations"][1]["value"]
    encoder = SampleEncoder(Tokenizer.load(shared / "data/qwen2_5_tokenizer"), groups=demo.groups)
    encoded, _ = encoder(demo[2], np.random.default_rng(0))
    lengths = demo.lengths(encoder)
    assert len(encoded.tokens) == lengths.tokens[2]
    assert len(encoded.slots.patches) == lengths.slots[2]
    assert len(encoded.targets) == lengths.targets[2]
