"""Published layouts, written here as spec data.md section 6 describes them, to samples."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.importers import a0, main, refcoco, where2place
from st4vla_jax.data.safe_pickle import UnsafePickleError
from st4vla_jax.data.source_files import SourceError

HEIGHT, WIDTH = 40, 60


def image(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8) if pixels is None else pixels
    Image.fromarray(pixels).save(path)


def opened(out, images):
    return GroundingSource(out, name="x", images=images, index_dir=out.parent / "index")


@pytest.fixture
def refer(tmp_path):
    refs = [
        {"ref_id": 1, "ann_id": 11, "image_id": 7, "category_id": 1, "split": "train",
         "file_name": "COCO_train2014_7_1.jpg",
         "sentences": [{"sent_id": 0, "sent": "left cup", "tokens": ["left", "cup"]},
                       {"sent_id": 1, "sent": "the red one", "tokens": []}]},
        {"ref_id": 2, "ann_id": 12, "image_id": 7, "category_id": 1, "split": "val",
         "sentences": [{"sent_id": 2, "sent": "dog", "tokens": ["dog"]}]},
    ]  # fmt: skip
    # What REFER downloads was written by Python 2, protocol 0.
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    instances = {
        "images": [{"id": 7, "file_name": "COCO_train2014_7.jpg"}],
        "annotations": [{"id": 11, "bbox": [5.5, 4, 20, 30.25]}, {"id": 12, "bbox": [0, 0, 9, 9]}],
    }  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    image(tmp_path / "train2014/COCO_train2014_7.jpg")
    return tmp_path


def test_refcoco(refer, capsys):
    out = refer / "refcoco.jsonl"
    paths = [str(refer / "refs(unc).p"), str(refer / "instances.json")]
    main(["refcoco", *paths, "--split", "train", "--out", str(out)])
    assert "2 records" in capsys.readouterr().out
    source = opened(out, refer / "train2014")
    assert len(source) == 2
    sample = source[1]
    assert sample.turns[0].text == (
        '<image>Locate "the red one" and output its bounding box in JSON format.'
    )
    (region,) = sample.turns[1].regions
    assert region.coordinates.tolist() == [[5.5, 4], [25.5, 34.25]]
    assert (region.kind, region.label) == ("box", "the red one")
    assert sample.turns[1].text == "```json\n[\n\t<region>\n]\n```"
    with pytest.raises(SourceError, match="no split 'testB'; there are train, val"):
        list(refcoco(refer / "refs(unc).p", refer / "instances.json", "testB"))


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_refcoco(refer):
    path, ran = refer / "refs(google).p", refer / "ran"
    path.write_bytes(pickle.dumps([{"split": _Runs(ran)}]))
    out = refer / "out.jsonl"
    with pytest.raises(UnsafePickleError, match=r"refs\(google\)\.p.*system"):
        main(["refcoco", str(path), str(refer / "instances.json"), "--out", str(out)])
    assert not ran.exists()
    assert not out.exists()
    path.write_bytes(pickle.dumps([{"no": "split"}]))
    with pytest.raises(SourceError, match="not in REFER's form"):
        main(["refcoco", str(path), str(refer / "instances.json"), "--out", str(out)])
    assert [p.name for p in refer.iterdir() if "out.jsonl" in p.name] == []


def test_roborefit(tmp_path):
    entry = {"num": 0, "text": "the mug", "bbox": [3, 4, 30, 38], "scene": "desk",
             "rgb_path": "image\\0001.png", "depth_path": "d", "mask_path": "m"}  # fmt: skip
    image(tmp_path / "testA/image/0001.png")
    (tmp_path / "testA/roborefit_testA.json").write_text(json.dumps([entry]))
    out = tmp_path / "out.jsonl"
    main(["roborefit", str(tmp_path), "--split", "testA", "--out", str(out)])
    (region,) = opened(out, tmp_path)[0].turns[1].regions
    assert region.coordinates.tolist() == [[3, 4], [30, 38]]
    with pytest.raises(SourceError, match="roborefit_train.json"):
        main(["roborefit", str(tmp_path), "--out", str(out)])


def test_where2place(tmp_path):
    text = (
        "Find a free spot left of the cup. Your answer should be formatted as a list of tuples, "
        "i.e. [(x1, y1)]"
    )
    entry = {"question_id": 0, "image": "07.jpg", "text": text, "category": "point"}
    (tmp_path / "point_questions.jsonl").write_text(json.dumps(entry) + "\n")
    image(tmp_path / "images/07.jpg")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[8:30, 8:12] = mask[26:30, 8:40] = 255  # an L: its mean lies outside
    image(tmp_path / "masks/07.jpg", mask)
    out = tmp_path / "out.jsonl"
    main(["where2place", str(tmp_path), "--out", str(out)])
    source = opened(out, tmp_path)
    assert source[0].turns[0].text == (
        "<image>Find a free spot left of the cup. Output the points in JSON format."
    )
    (region,) = source[0].turns[1].regions
    x, y = region.coordinates[0].astype(int)
    assert region.kind == "point"
    assert mask[y, x] == 255
    assert source.record(0)["mask"] == "masks/07.jpg"
    image(tmp_path / "masks/07.jpg", np.zeros_like(mask))
    with pytest.raises(SourceError, match="mask is empty"):
        list(where2place(tmp_path))


def test_a0(tmp_path):
    way = [[0.5 + i / 100, 0.25] for i in range(20)]
    episode = {
        "waypoints2d": way, "cam_highs": [f"frames/{i}.png" for i in range(20)],
        "metadata": {"instructions": ["push it", "shove it"], "is_valid": True,
                     "validRange": {"start": 2, "end": 18}},
    }  # fmt: skip
    (tmp_path / "ep").mkdir()
    (tmp_path / "ep/0.json").write_text(json.dumps(episode))
    bad = episode | {"metadata": {"is_valid": False}}
    (tmp_path / "ep/1.json").write_text(json.dumps(bad))
    for i in range(20):
        image(tmp_path / f"ep/frames/{i}.png")
    out = tmp_path / "out.jsonl"
    main(["a0", str(tmp_path), "--units", "fraction", "--out", str(out)])
    source = opened(out, tmp_path)
    assert source.groups == ("x/trajectory",)
    starts = range(2, 17, 5)
    assert len(source) == len(starts)
    for i, start in enumerate(starts):
        (region,) = source[i].turns[1].regions
        expected = np.array(way[start : min(18, start + 20) : 4]) * [WIDTH, HEIGHT]
        np.testing.assert_allclose(region.coordinates, expected, rtol=1e-6)
        assert ("push it", "shove it")[i % 2] in source[i].turns[0].text
    with pytest.raises(ValueError, match="units"):
        list(a0(tmp_path, "metres"))
    (tmp_path / "ep/2.json").write_text("[]")
    with pytest.raises(SourceError, match=r"2\.json: not in A0's form"):
        list(a0(tmp_path, "pixels"))
    with pytest.raises(SourceError, match="nothing to write"):
        main(["a0", str(tmp_path / "ep/frames"), "--units", "pixels", "--out", str(out)])
