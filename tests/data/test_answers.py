"""Regions to text and back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.answers import (
    answer_text,
    longest_rendering,
    longest_turns,
    render,
    render_turns,
    to_original,
    to_resized,
)
from st4vla_jax.data.image import ImageConfig, smart_resize
from st4vla_jax.data.prompts import PromptError
from st4vla_jax.data.source import Region, Turn
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.eval.parse import parse_answer

SMALL = ImageConfig(min_pixels=784, max_pixels=50_176)  # spec data.md section 6


def region(kind, *points, label="", image=0):
    return Region(kind, np.array(points, np.float32), image, label)


def numbers_of(text):
    answer = parse_answer(text)
    return [
        *((b.x1, b.y1, b.x2, b.y2) for b in answer.boxes),
        *((p.x, p.y) for p in answer.points),
    ]


def test_official_cell():
    """Qwen's own cookbook: [146,137,615,415] in 428x640 (height x width)."""
    new = smart_resize(428, 640, ImageConfig())
    assert new == (420, 644)
    corners = np.array([[146, 137], [615, 415]])
    assert to_resized(corners, (428, 640), new).ravel().tolist() == [147, 134, 619, 407]
    box = region("box", *corners, label="cell")
    assert render(box, new, (428, 640)) == '{"bbox_2d": [147, 134, 619, 407], "label": "cell"}'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((224, 224), (224, 224)), ((256, 256), (224, 224)), ((256, 320), (196, 224)),
        ((480, 640), (168, 252)), ((428, 640), (168, 252)), ((180, 320), (168, 280)),
    ],
)  # fmt: skip
def test_golden_sizes_and_corners(old, new):
    assert smart_resize(*old, SMALL) == new
    corners = np.array([[0, 0], [old[1], old[0]], [old[1] / 2, old[0] / 2]])
    expected = [[0, 0], [new[1] - 1, new[0] - 1], [new[1] // 2, new[0] // 2]]
    assert to_resized(corners, old, new).tolist() == expected


def test_rounds_half_to_even_and_clamps():
    points = [[0.5, 1.5], [-3, 2.5], [10, 10]]
    assert to_resized(points, (10, 10), (10, 10)).tolist() == [[0, 2], [0, 2], [9, 9]]


def test_formats():
    old = new = (100, 100)
    assert render(region("point", (3, 4)), new, old) == '{"point_2d": [3, 4]}'
    trace = region("trajectory", (1, 2), (3, 4), (5, 6), label="gripper")
    text = render(trace, new, old)
    assert json.loads(text) == {"point_2d": [[1, 2], [3, 4], [5, 6]], "label": "gripper"}
    assert numbers_of(text) == [(1, 2), (3, 4), (5, 6)]
    assert {p.label for p in parse_answer(text).points} == {"gripper"}
    quoted = render(region("box", (1, 2), (3, 4), label='die "rote" Tür'), new, old)
    assert json.loads(quoted)["label"] == 'die "rote" Tür'


@given(
    st.integers(30, 900), st.integers(30, 900), st.data(),
    st.sampled_from([SMALL, ImageConfig(), ImageConfig(size=(224, 224), min_pixels=784)]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_box_survives_crop_resize_text_and_parse(height, width, data, config):
    """Within one pixel of the resized image, hence within its size in original pixels."""
    draw = lambda low, high: data.draw(st.floats(low, high, width=32))  # noqa: E731
    crop_h, crop_w = data.draw(st.integers(20, height)), data.draw(st.integers(20, width))
    top = data.draw(st.integers(0, height - crop_h))
    left = data.draw(st.integers(0, width - crop_w))
    x1, y1 = draw(left, left + crop_w - 1), draw(top, top + crop_h - 1)
    x2, y2 = draw(x1, left + crop_w), draw(y1, top + crop_h)
    box = region("box", (x1 - left, y1 - top), (x2 - left, y2 - top), label="cup")

    old = (crop_h, crop_w)
    new = smart_resize(*(config.size or old), config)
    turns = [Turn("user", "Where?"), Turn("assistant", answer_text(1), (box,))]
    text = render_turns(turns, [(old, new)])[1].text
    ((*corners,),) = numbers_of(text)
    back = to_original(np.reshape(corners, (2, 2)), new, old) + (left, top)

    pixel = np.array([crop_w / new[1], crop_h / new[0]])  # one resized pixel, in original ones
    error = np.abs(back - [[x1, y1], [x2, y2]]) / pixel
    assert error.max() <= 1 + 1e-3
    # Away from the right and lower borders, where pixels end, it is rounding alone.
    inside = (back - (left, top)) / pixel < np.array(new[::-1]) - 1.01
    assert error[inside].max(initial=0) <= 0.5 + 1e-3


def test_turns_with_both_placeholders_and_images():
    turns = (
        Turn("user", "What is at <coordinates>?", (region("box", (10, 20), (30, 40)),)),
        Turn(
            "assistant",
            '{"pick": <region>, "place": <region>}',
            (region("point", (50, 50), image=1), region("box", (0, 0), (100, 50))),
        ),
    )
    sizes = [((50, 100), (100, 200)), ((100, 100), (50, 50))]
    user, assistant = render_turns(turns, sizes)
    assert user == Turn("user", "What is at [20, 40, 60, 80]?")
    assert assistant.text == (
        '{"pick": {"point_2d": [25, 25]}, "place": {"bbox_2d": [0, 0, 199, 99]}}'
    )
    assert assistant.regions == ()


def test_placeholder_in_a_label_is_text():
    (turn,) = render_turns(
        [Turn("assistant", "<region>", (region("point", (1, 1), label="<region>"),))],
        [((9, 9), (9, 9))],
    )
    assert turn.text == '{"point_2d": [1, 1], "label": "<region>"}'


def test_bad_turns_are_named_at_once():
    turns = [
        Turn("user", "<region>"),
        Turn("assistant", "none", (region("point", (1, 1), image=2),)),
    ]
    with pytest.raises(PromptError) as e:
        render_turns(turns, [((9, 9), (9, 9))], "set.jsonl:7")
    message = str(e.value)
    assert "set.jsonl:7" in message
    assert "turn 1 (user) has 1" in message
    assert "turn 2 (assistant) has 0" in message
    assert "image 2" in message


@given(st.integers(28, 2000), st.integers(28, 2000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_longest_rendering_bounds_characters(height, width, u, v):
    point = region("point", (u * width, v * height), label="a cup")
    rendered = render(point, (height, width), (height, width))
    assert len(rendered) <= len(longest_rendering(point, (height, width)))


@pytest.mark.parity
def test_longest_turns_bounds_tokens_of_qwen(shared):
    """Qwen's tokenizer takes one token a digit, so digits bound tokens."""
    tokenizer = Tokenizer.load(shared / "data/qwen2_5_tokenizer")
    rng = np.random.default_rng(0)
    new, old = (420, 1148), (480, 1300)
    for _ in range(100):
        corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * (old[1], old[0])
        turns = [Turn("assistant", answer_text(2), (region("box", *corners, label="x"),
                                                    region("point", corners[0])))]  # fmt: skip
        (rendered,) = render_turns(turns, [(old, new)])
        (longest,) = longest_turns(turns, [new])
        assert len(tokenizer.encode(rendered.text)) <= len(tokenizer.encode(longest.text))
