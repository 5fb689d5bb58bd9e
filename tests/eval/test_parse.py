"""Answers as models write them."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st4vla_jax.eval.parse import Box, Point, parse_answer

BOX = Box(8.0, 176.0, 106.0, 294.0)


@pytest.mark.parametrize(
    "text",
    [
        "<box>[[8,176,106,294]]</box>",
        "<box> [8, 176, 106, 294]] </box>",
        "<box>[[ 8 ,176 , 106,294 ]</box>",
        "<box>(8,176),(106,294)</box>",
        "<box>8,176,106,294</box>",
        '{"response": "ok", "subtask": "pick it <box>[[8,176,106,294]]</box>"}',
        '```json\n[\n\t{"bbox_2d": [8, 176, 106, 294]}\n]\n```',
        '{"bbox_2d": [[8, 176], [106, 294]]}',
        "{'bbox_2d': [8.0, 176., 106, 294]}",
        "The 2 cups are at [8, 176, 106, 294].",
        "[[8, 176, 106, 294]]",
        "(8,176,106,294)",
        "[x1,y1,x2,y2] = [8,176,106,294]",
        '[{"bbox_2d": [8, 176, 106, 294]}, {"bbox_2d": [3, 4',  # cut off by max_new_tokens
    ],
)
def test_one_box(text):
    answer = parse_answer(text)
    assert answer.boxes == (BOX,)
    assert answer.points == ()
    assert answer.reason == ""


@pytest.mark.parametrize(
    "text",
    [
        "[(320, 280), (-1.5, .25)]",
        "[[320,280],[-1.5,.25]]",
        '[{"point_2d": [320, 280]}, {"point_2d": ["x"], "point_2d": [-1.5, 0.25]}]',
        '{"trajectory": [320, 280, -1.5, 2.5e-1]}',
        "<point>[320, 280], [-1.5, 0.25]</point>",
    ],
)
def test_two_points(text):
    answer = parse_answer(text)
    assert answer.points == (Point(320.0, 280.0), Point(-1.5, 0.25))
    assert answer.boxes == ()


def test_labels():
    text = (
        '[{"bbox_2d": [1,2,3,4], "label": "red cup"}, {"label": \'5, "6\', "point_2d": [7, 8]},'
        ' {"bbox_2d": [5,6,7,8]}]'
    )
    answer = parse_answer(text)
    assert answer.boxes == (Box(1, 2, 3, 4, "red cup"), Box(5, 6, 7, 8))
    assert answer.points == (Point(7, 8, '5, "6'),)
    nested = '{"pick": {"bbox_2d": [1,2,3,4]}, "place": {"bbox_2d": [5,6,7,8]}}'
    assert [box.label for box in parse_answer(nested).boxes] == ["pick", "place"]
    listed = parse_answer('{"objects": [{"bbox_2d": [1,2,3,4]}]}')
    assert listed.boxes == (Box(1, 2, 3, 4),)
    ref = parse_answer("<ref>the cup</ref><box>[[1,2,3,4]]</box> and <box>[[5,6,7,8]]</box>")
    assert [box.label for box in ref.boxes] == ["the cup", ""]


def test_boxes_and_points_together():
    answer = parse_answer('{"bbox_2d": [[1,2,3,4],[5,6,7,8]], "points": [[9, 10]]}')
    assert answer.boxes == (Box(1, 2, 3, 4), Box(5, 6, 7, 8))
    assert answer.points == (Point(9, 10),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("I see 3 cups at 5, 6.", "no complete bracketed list"),
        ("[304, 275, 34", "no complete bracketed list"),
        ("[1, 2, 3] and (4)", "lists of 3, 1 numbers"),
        ('{"bbox_2d": [1, 2, 3]}', "lists of 3 numbers"),
        ("<box>(1, 2)</box>", "one corner"),
        ("[1e999, 2]", "no complete"),
        ("[[]]", "no complete"),
    ],
)
def test_reasons(text, reason):
    answer = parse_answer(text)
    assert reason in answer.reason
    assert answer.boxes == answer.points == ()


@given(st.text(alphabet="[](){}<>/\",:'+-.eE019 \nboxlabelref_2d", max_size=80))
def test_never_raises(text):
    answer = parse_answer(text)
    assert bool(answer.reason) == (not answer.boxes and not answer.points)


@given(st.lists(st.tuples(*[st.integers(0, 4000)] * 4), min_size=1, max_size=5))
def test_what_is_written_is_read(boxes):
    text = ", ".join(f'{{"bbox_2d": {list(box)}, "label": "x"}}' for box in boxes)
    assert parse_answer(f"[{text}]").boxes == tuple(Box(*box, "x") for box in boxes)


def test_time_is_linear():
    """A million characters of every start that could make a regex backtrack: seconds, not hours."""
    pieces = [
        '"label": "',
        '"label"   ',
        "'a",
        "[1,",
        "<ref>",
        "<aaa",
        "1e+",
        '"\\"',
        "{",
        "-.",
        " ",
    ]
    start = time.perf_counter()
    for piece in pieces:
        parse_answer(piece * (100_000 // len(piece)))
    parse_answer("".join(random.Random(0).choices(pieces, k=30_000)))
    assert time.perf_counter() - start < 20
