"""The picture of a batch: samples read back from arrays equal what was packed; what is drawn."""

import dataclasses

import numpy as np
import pytest
from PIL import ImageColor, ImageFont

from st4vla_jax.batch import Batch
from st4vla_jax.data import batch_picture
from st4vla_jax.data.batch_picture import regions_of, unpack
from st4vla_jax.data.image import prepare
from st4vla_jax.data.packing import Capacity, pack
from st4vla_jax.data.sheet import COLOURS
from st4vla_jax.data.source import Region, Turn
from st4vla_jax.data.transforms import encode
from tests.reference.policy import IMAGES, TOKENIZER, picture, robot_sample, tiny_config

CFG = tiny_config(state_dim=3)
QUESTION = "<image>Where is the cup (\xfc)?"
ANSWER = '[{"bbox_2d": [10, 12, 40, 50], "label": "cup"}]'


def conversation(images, turns, group=0):
    return encode(
        turns, images, TOKENIZER, system="hi", image_config=IMAGES,
        add_generation_prompt=False, supervise=True, group=group,
    ), None  # fmt: skip


def cup(image, group=1):
    return conversation([image], [Turn("user", QUESTION), Turn("assistant", ANSWER)], group)


def packed(rows):
    return pack(rows, Capacity.fit(rows, token_multiple=32), pad_id=TOKENIZER.pad)


@pytest.fixture(scope="module")
def scene():
    """Two rows: robot, cup; two-view robot, two-image and two-turn conversation."""
    rng = np.random.default_rng(0)
    images = [picture(rng, 84, 112), picture(rng, 56, 84), picture(rng, 168, 84)]
    two_turns = [
        Turn("user", "<image><image>first?"), Turn("assistant", "one"),
        Turn("user", "second?"), Turn("assistant", "two"),
    ]  # fmt: skip
    robots = [robot_sample(CFG, 3), robot_sample(CFG, 4, sizes=((56, 56), (84, 56)))]
    robots[1] = robots[1][0], dataclasses.replace(robots[1][1], embodiment=1, group=2)
    rows = [[robots[0], cup(images[0])], [robots[1], conversation(images[1:], two_turns)]]
    return packed(rows), images, robots


def test_samples_are_read_back(scene):
    batch, images, robots = scene
    found = unpack(batch, TOKENIZER)
    assert [(s.row, s.segment) for s in found] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [s.tokens for s in found] == [
        len(robots[0][0].tokens), np.count_nonzero(batch.vlm.segment_ids[0] == 2),
        len(robots[1][0].tokens), np.count_nonzero(batch.vlm.segment_ids[1] == 2),
    ]  # fmt: skip
    for sample, expected in ((found[1], images[:1]), (found[3], images[1:])):
        prepared = [prepare(image, IMAGES) for image in expected]
        assert [i.shape for i in sample.images] == [i.shape for i in prepared]
        assert all((a == b).all() for a, b in zip(sample.images, prepared, strict=True))
        assert sample.image_tokens == sum(i.shape[0] * i.shape[1] // 784 for i in prepared)
    assert len(found[2].images) == 2 and len(found[0].images) == 1


def test_texts_and_what_the_loss_asks_for(scene):
    found = unpack(scene[0], TOKENIZER)
    head = "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|> x "
    cells = 84 * 112 // 784
    assert found[1].texts == (
        (
            f"{head}{cells} <|vision_end|>Where is the cup (\xfc)?<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        (f"{ANSWER}<|im_end|>\n", True),
    )
    assert found[1].answer == f"{ANSWER}\n" and found[1].group == 1
    assert [text for text, asked in found[3].texts if asked] == [
        "one<|im_end|>\n", "two<|im_end|>\n"
    ]  # fmt: skip
    assert [asked for _, asked in found[0].texts] == [False] and found[0].answer == ""
    assert found[0].texts[0][0].endswith("do take it it it 3<|im_end|>\n<|im_start|>assistant\n")


def test_targets_are_shown_where_tokens_would_be(scene):
    """A target that is not the next token is an error of the pipeline: it must be seen."""
    batch = scene[0]
    targets = batch.vlm.targets.copy()
    first = np.flatnonzero(batch.vlm.target_weight[0])[0]
    targets[0, first] = TOKENIZER.encode("#")[0]
    wrong = batch.replace(vlm=dataclasses.replace(batch.vlm, targets=targets))
    assert unpack(wrong, TOKENIZER)[1].texts[1][0] == f"#{ANSWER[1:]}<|im_end|>\n"


def test_robot_side_is_read_back(scene):
    batch, _, robots = scene
    found = unpack(batch, TOKENIZER)
    assert found[1].robot is None and found[3].robot is None
    for sample, (_, arrays) in zip((found[0], found[2]), robots, strict=True):
        for name in ("dino_images", "state", "actions", "action_mask", "embodiment"):
            assert np.array_equal(getattr(sample.robot, name), getattr(arrays, name)), name
        assert sample.group == arrays.group


def test_images_come_through_the_tokens(scene):
    """An index that is off by one cell gives another image than was packed."""
    batch, images, _ = scene
    index = batch.vlm.vision_index
    wrong = batch.replace(
        vlm=dataclasses.replace(batch.vlm, vision_index=np.where(index >= 0, index + 1, -1))
    )
    shown = unpack(wrong, TOKENIZER)[1].images[0]
    assert shown.shape != images[0].shape or (shown != prepare(images[0], IMAGES)).any()


@pytest.mark.parametrize(
    "answer,expected",
    [
        (ANSWER, [("box", [[10, 12], [40, 50]], "cup")]),
        ('{"point_2d": [3, 4], "label": "a"}, {"point_2d": [5, 6]}',
         [("point", [[3, 4]], "a"), ("point", [[5, 6]], "")]),
        ('{"point_2d": [[1, 2], [3, 4], [5, 6]], "label": "arm"} and (9, 8)',
         [("trajectory", [[1, 2], [3, 4], [5, 6]], "arm"), ("point", [[9, 8]], "")]),
        ("<box>[[1, 2, 3, 4]]</box>", [("box", [[1, 2], [3, 4]], "")]),
        ('{"bbox_2d": [[1, 2], [30, 40]]}', [("box", [[1, 2], [30, 40]], "")]),
        ("(0.5, 0.25)", [("point", [[50, 10]], "")]),
        ("6", []),
        ("", []),
    ],
)  # fmt: skip
def test_regions(answer, expected):
    found = regions_of(answer, height=40, width=100)
    assert [(r.kind, r.coordinates.tolist(), r.label) for r in found] == expected


def colour_at(image, x, y):
    return image.getpixel((round(x), round(y)))


def test_regions_are_drawn_in_place():
    image = np.full((84, 112, 3), 7, np.uint8)
    region = Region("box", np.array([[10.0, 20.0], [90.0, 70.0]]))
    drawn = batch_picture._enlarged(image, [region])
    scale = drawn.width / 112
    assert drawn.size == (112 * scale, 84 * scale) and scale == 4
    red = ImageColor.getrgb(COLOURS[0])
    for x, y in ((10, 45), (90, 45), (50, 20), (50, 70)):
        assert colour_at(drawn, x * scale, y * scale) == red
    assert colour_at(drawn, 50 * scale, 45 * scale) == (7, 7, 7)
    assert batch_picture._enlarged(np.zeros((1120, 560, 3), np.uint8), []).size == (280, 560)


def has_colour(image, colour):
    return bool((np.asarray(image) == ImageColor.getrgb(colour)).all(-1).any())


def test_picture(scene):
    batch = scene[0]
    drawn = batch_picture.batch_picture(
        batch, TOKENIZER, groups=("bridge", "cups", "other"), action_names=[("x", "y")]
    )
    assert drawn.width == batch_picture.WIDTH and drawn.mode == "RGB"
    assert has_colour(drawn, batch_picture._TARGET)
    assert all(has_colour(drawn, c) for c in COLOURS[: CFG.dit.action_dim])
    fewer = batch_picture.batch_picture(batch, TOKENIZER, limit=1)
    assert fewer.height < drawn.height
    # Only the cup's answer is green: of the robots alone nothing is.
    robots = Batch(batch.vlm.replace(target_weight=0 * batch.vlm.target_weight), batch.action)
    assert not has_colour(
        batch_picture.batch_picture(robots, TOKENIZER, limit=2), batch_picture._TARGET
    )


def test_masked_steps_are_hollow_and_grey(scene):
    batch = scene[0]
    nothing = batch.action.replace(action_mask=np.zeros_like(batch.action.action_mask))
    drawn = batch_picture.batch_picture(batch.replace(action=nothing), TOKENIZER, limit=1)
    # COLOURS[0] and [1] draw the box of the cup, too.
    assert not any(has_colour(drawn, c) for c in COLOURS[2 : CFG.dit.action_dim])


def test_lines_fit():
    font = ImageFont.load_default(13)
    text = "word " * 200 + "x" * 500 + " \u4e2d\xfc\tend"
    sample = unpack(packed([[cup(np.zeros((56, 56, 3), np.uint8))]]), TOKENIZER)[0]
    sample = dataclasses.replace(sample, texts=((text, False), ("yes\nno\n", True)))
    lines = batch_picture._lines(sample, 600)
    assert all(font.getlength(line) <= 600 for line, _ in lines)
    assert "".join(line for line, _ in lines[:-2]).replace(" ", "") == (
        text.replace(" ", "").replace("\t", "").replace("\u4e2d\xfc", "\\u4e2d\\xfc")
    )
    assert lines[-2:] == [("yes", batch_picture._TARGET), ("no", batch_picture._TARGET)]
    long = dataclasses.replace(sample, texts=(("a\n" * 500, False),))
    assert batch_picture._lines(long, 600)[-1][0] == "... and 420 lines more"


def test_batches_without_actions_images_or_samples():
    words = conversation([], [Turn("user", "hello"), Turn("assistant", "yes")])
    batch = packed([[words]])
    (sample,) = unpack(batch, TOKENIZER)
    assert sample.images == () and sample.robot is None and sample.answer == "yes\n"
    assert batch_picture.batch_picture(batch, TOKENIZER).height > 60
    empty = batch.replace(vlm=batch.vlm.replace(segment_ids=0 * batch.vlm.segment_ids))
    assert unpack(empty, TOKENIZER) == []
    assert batch_picture.batch_picture(empty, TOKENIZER).height == 32
