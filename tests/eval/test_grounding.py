"""Scores of answers: 50 malformed texts, protocols, the floor, and batched decoding."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from st4vla_jax.batch import Batch
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.packing import Capacity, pack
from st4vla_jax.data.source import Region, Sample, Turn
from st4vla_jax.data.transforms import encode
from st4vla_jax.eval.answering import Answerer, rung
from st4vla_jax.eval.grounding import Prior, Question, Summary, Truth, questions, score
from st4vla_jax.models.decode import generate
from tests.reference.policy import TOKENIZER, random_params, tiny_policy

HW, SEEN = (100, 200), (50, 100)  # original, and half as large as the model saw it


def box(*corners):
    return Region("box", np.array(corners, np.float32).reshape(2, 2))


def truth(kind="box", inside=None, text=""):
    way = np.array([[0, 0], [40, 0], [80, 40]], np.float32)
    regions = {
        "box": (box(20, 20, 60, 60),),
        "point": (Region("point", np.array([[30, 40]], np.float32)),),
        "trajectory": (Region("trajectory", way),),
        "text": (),
    }[kind]
    return Truth(kind, regions, (HW,), text, inside, "file:1")


RIGHT = 1.0
MALFORMED = [
    # Read all the same: a box that is exactly right.
    ("[10, 10, 30, 30]", RIGHT),
    ('{"bbox_2d": [10, 10, 30, 30]', RIGHT),
    ('```json\n[{"bbox_2d": [10, 10, 30, 30], "label": "cup"}', RIGHT),
    ('{"bbox_2d": [30, 30, 10, 10]}', RIGHT),
    ('{"bbox_2d": [30, 10, 10, 30]}', RIGHT),
    ('{"bbox_2d": [[10, 10], [30, 30]]}', RIGHT),
    ("<box>(10,10),(30,30)</box>", RIGHT),
    ("<box>10 10 30 30</box>", RIGHT),
    ("[(10, 10), (30, 30)]", RIGHT),
    ('[{"point_2d": [10, 10]}, {"point_2d": [30, 30]}]', RIGHT),
    ("bbox: (10.0, 10.0, 30.0, 30.0).", RIGHT),
    ("{'bbox_2d': [10, 10, 30, 30]}", RIGHT),
    ("{bbox_2d: [10, 10, 30, 30]}", RIGHT),
    ("The cup is at [10, 10, 30, 30], I think.", RIGHT),
    ('{"bbox_2d": [10, 10, 30, 30]} {"bbox_2d": [0, 0, 99, 49]}', RIGHT),
    ('{"bbox_2d": [0.1, 0.2, 0.3, 0.6]}', RIGHT),
    ("[1e1, 1.e1, 3.0E1, 30]", RIGHT),
    ("[[[10, 10, 30, 30]]]", RIGHT),
    ('"bbox_2d": [10,,10,,30,,30]', RIGHT),
    ("assistant\n[10, 10, 30, 30]\nassistant\n[10, 10, 30, 30]", RIGHT),
    ('{"label": "[1, 2]", "bbox_2d": [10, 10, 30, 30]}', RIGHT),
    # A box, but not the right one.
    ('{"bbox_2d": [10, 10, 30, 20]}', 0.5),
    ('{"bbox_2d": [0, 0, 99, 49]} {"bbox_2d": [10, 10, 30, 30]}', 400 / (99 * 49)),
    ('{"bbox_2d": [-500, -500, 30, 30]}', 400 / 900),
    ('{"bbox_2d": [0, 0, 1e300, 1e300]}', 400 / 5000),
    ('{"bbox_2d": [60, 20, 90, 40]}', 0.0),
    # Nothing to score, and why.
    ("", "empty"),
    ("\n\n ", "empty"),
    ("I cannot see a cup.", "no complete bracketed list"),
    ("10, 10, 30, 30", "no complete bracketed list"),
    ("[10, 10, 30", "no complete bracketed list"),
    ('{"bbox_2d": [10, 10, 30, 30}', "no complete bracketed list"),
    ("[]", "no complete bracketed list"),
    ("{}", "no complete bracketed list"),
    ("[[]]", "no complete bracketed list"),
    ("[NaN, NaN, NaN, NaN]", "no complete bracketed list"),
    ("[inf, 10, 30, 30]", "no"),
    ("[1e999, 10, 30, 30]", "no complete bracketed list"),
    ("null", "no complete bracketed list"),
    ('{"bbox_2d": null}', "no complete bracketed list"),
    ('{"bbox_2d": "10, 10, 30, 30"}', "no complete bracketed list"),
    ('{"bbox_2d": [10, 10, 30]}', "lists of 3 numbers"),
    ('{"bbox_2d": [10, 10, 30, 30, 40]}', "lists of 5 numbers"),
    ("[7]", "lists of 1 numbers"),
    ('{"bbox_2d": [[10, 10]]}', "one corner"),
    ('{"point_2d": [20, 20]}', "points where a box is asked for"),
    ("[(1, 2), (3, 4), (5, 6)]", "points where a box is asked for"),
    ('{"bbox_2d": [10, 10, 10, 30]}', "no box has an area"),
    ('{"bbox_2d": [300, 300, 400, 400]}', "no box has an area"),
    ('{"bbox_2d": [-9, -9, -1, -1]}', "no box has an area"),
    ("[[[[[[[[[[[[[[[[[[[[[[[[", "no complete bracketed list"),
    ("]" * 100, "no complete bracketed list"),
    ("<|im_end|>\x00\ufffd", "no complete bracketed list"),
    ('{"bbox_2d": [十, 10, 30, 30]}', "no"),
]


def test_there_are_fifty_malformed_answers():
    assert len({text for text, _ in MALFORMED}) == len(MALFORMED) >= 50


@pytest.mark.parametrize(("text", "want"), MALFORMED)
def test_malformed_boxes(text, want):
    got = score(truth(), text, [SEEN])
    if isinstance(want, str):
        assert want in got.reason
        assert got.values == {"iou": (0.0,)} and got.found == ()
    else:
        assert got.reason == ""
        assert got.values["iou"][0] == pytest.approx(want)


def test_several_boxes_are_matched_once_each():
    two = Truth("box", (box(0, 0, 20, 20), box(100, 50, 120, 70)), (HW,))
    right = '[{"bbox_2d": [50, 25, 60, 35]}, {"bbox_2d": [0, 0, 10, 10]}]'  # the other order
    assert score(two, right, [SEEN]).values["iou"] == (1, 1)
    twice = '[{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [0, 0, 10, 10]}]'
    assert score(two, twice, [SEEN]).values["iou"] == (1, 0)
    # More boxes than were asked for are not tried out.
    flood = ", ".join(f"[0, 0, {i}, {i}]" for i in (1, 2, 10)) + ", [50, 25, 60, 35]"
    assert sum(score(two, flood, [SEEN]).values["iou"]) < 0.1


def test_points():
    mask = np.zeros(HW, bool)
    mask[30:50, 20:40] = True
    answer = '[{"point_2d": [15, 20]}, {"point_2d": [0, 0]}]'
    for inside in (mask, np.array([[20.0, 30.0], [40.0, 50.0]])):
        got = score(truth("point", inside), answer, [SEEN])
        assert got.values["inside"] == (0.5,)
        assert got.values["distance"] == (25.0,)  # (0 + 50) / 2
        assert score(truth("point", inside), "[(0.15, 0.4)]", [SEEN]).values["inside"] == (1.0,)
        assert score(truth("point", inside), "[10, 15, 20, 25]", [SEEN]).values["inside"] == (1,)
        missing = score(truth("point", inside), "there", [SEEN])
        assert missing.values == {"inside": (0.0,)} and missing.reason
        far = score(truth("point", inside), "[(1e300, -1e300)]", [SEEN])
        assert far.values["inside"] == (0.0,) and np.isfinite(far.values["distance"][0])
    assert "inside" not in score(truth("point"), answer, [SEEN]).values


def test_trajectories():
    got = score(truth("trajectory"), '{"point_2d": [[0, 5], [20, 5], [40, 25]]}', [SEEN])
    assert got.values == {"mae": (5.0,), "frechet": (10.0,)}
    same = score(truth("trajectory"), "[(0, 0), (10, 0), (20, 0), (30, 10), (40, 20)]", [SEEN])
    assert same.values["mae"][0] == 0
    assert score(truth("trajectory"), "no", [SEEN]).values == {}


def test_words():
    right = truth("text", text="Left of it.")
    assert score(right, "  left  of IT ", [SEEN]).values == {"exact": (1.0,)}
    assert score(right, "right of it", [SEEN]).values == {"exact": (0.0,)}
    assert score(right, "", [SEEN]).reason


def test_summary():
    texts = ["[10, 10, 30, 30]", "[10, 10, 30, 19]", "nothing", ""]
    scores = [score(truth(), text, [SEEN]) for text in texts]
    scores.append(score(truth("trajectory"), "[(0, 0), (20, 0), (40, 20)]", [SEEN]))
    summary = Summary.of(scores)
    assert str(summary.iou50) == "0.25 [0.05, 0.70] n=4"
    assert (summary.answered.successes, summary.answered.trials) == (3, 5)
    assert sum(summary.reasons.values()) == 2
    metrics = summary.metrics("refcocog")
    assert metrics["eval/refcocog/iou50"] == 0.25
    assert metrics["eval/refcocog/iou"] == pytest.approx((1 + 0.45) / 4)
    assert metrics["eval/refcocog/mae"] == 0
    assert Summary.of([]).metrics("x") == {}


def test_floor_is_the_average_over_the_prior():
    """Two training boxes, of which one fits: half of the drawn answers hit."""
    corners = np.array([20, 20, 60, 60]) / 2
    records = [
        ([Turn("user", "?"), Turn("assistant", "<region>", (box(*corners),))], [(50, 100)]),
        ([Turn("user", "?"), Turn("assistant", "<region>", (box(0, 0, 5, 5),))], [(50, 100)]),
    ]
    floor = Prior.of(records).floor([truth(), truth("trajectory"), truth("text")], draws=2000)
    assert floor.iou50.trials == 2000
    assert floor.iou50.value == pytest.approx(0.5, abs=0.05)
    assert floor.metrics("x", "_floor")["eval/x/iou50_floor"] == floor.iou50.value
    again = Prior.of(records).floor([truth()], draws=2000)
    assert again.iou50 == floor.iou50


# --- From records to answers --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "masks").mkdir()
    lines = []
    for i, (h, w) in enumerate([(56, 84), (84, 56), (56, 84), (112, 168), (56, 84)]):
        picture = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        kind = "point" if i == 1 else "box"
        coordinates = [[10, 10]] if kind == "point" else [[4, 4], [20, 20]]
        region = {"kind": kind, "coordinates": coordinates, "image": 0}
        answer = {"from": "gpt", "value": "<region>", "regions": [region]}
        asked = {"from": "human", "value": f"<image>where is {'it ' * i}?"}
        record = {"image": f"{i}.png", "conversations": [asked, answer]}
        if kind == "point":
            mask = np.zeros((h, w), np.uint8)
            mask[5:15, 5:15] = 255
            Image.fromarray(mask).save(tmp_path / "masks" / "1.png")
            record["mask"] = "masks/1.png"
        lines.append(json.dumps(record))
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_questions_of_records(folder):
    source = GroundingSource(folder / "records.jsonl", name="set")
    found = list(questions(source, masks=folder))
    assert [q.truth.kind for q in found] == ["box", "point", "box", "box", "box"]
    assert found[1].truth.inside.sum() == 100
    assert found[3].truth.sizes == ((112, 168),)
    assert [t.role for t in found[0].turns] == ["user"]
    assert len(list(questions(source, masks=folder, limit=2))) == 2
    with pytest.raises(ValueError, match=r"records\.jsonl:2 has a mask"):
        list(questions(source))


def test_answers_in_batches_equal_answers_one_by_one(folder):
    """Mixed sizes, a last batch that is not full: the same tokens, few shapes, in order."""
    model = tiny_policy()
    params = random_params(model)["vlm"]
    asked = list(questions(GroundingSource(folder / "records.jsonl", name="s"), masks=folder))
    config = ImageConfig(min_pixels=56 * 56, size=(28, 28))
    answerer = Answerer(
        model.vlm, TOKENIZER, system="hi", image_config=config, batch_size=2, max_new_tokens=6
    )
    got = answerer.scores(params, asked)
    assert [one.record for one in got] == [q.truth.record for q in asked]
    assert len(answerer.shapes) == 2
    whole = ImageConfig(min_pixels=56 * 56)
    run = jax.jit(
        lambda params, vlm: generate(
            model.vlm, params, vlm, max_new_tokens=6, stop_ids=(TOKENIZER.im_end, TOKENIZER.pad)
        )
    )
    for question, one in zip(asked, got, strict=True):
        encoded = encode(
            question.turns, question.images, TOKENIZER, system="hi", image_config=whole,
            add_generation_prompt=True, supervise=False,
        )  # fmt: skip
        batch: Batch = pack([[(encoded, None)]], Capacity(256, 128), pad_id=TOKENIZER.pad)
        out = run(params, batch.vlm)
        want = TOKENIZER.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()).strip()
        assert one.answer == want
    assert len({one.answer for one in got}) > 1


def test_padded_sizes_are_few_and_near():
    sizes = [rung(n) for n in range(1, 5000)]
    assert all(size >= n and size % 64 == 0 for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 30
    assert all(size - n < max(64, n / 4) for n, size in enumerate(sizes, start=1))


def test_a_question_is_what_comes_before_the_first_answer():
    turns = (Turn("user", "<image>a?"), Turn("assistant", "b"), Turn("user", "<image>c?"))

    class Two:
        name = "two"

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Sample((np.zeros((28, 28, 3), np.uint8),) * 2, turns, record="r")

        def record(self, index):
            return {}

    (question,) = questions(Two())
    assert isinstance(question, Question)
    assert question.turns == turns[:1] and len(question.images) == 1
    assert question.truth.kind == "text" and question.truth.text == "b"
