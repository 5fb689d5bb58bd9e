import json
import re

import numpy as np
import pytest

from configs.tabletop import get_config
from st4vla_jax.data.llava import check_turns
from st4vla_jax.tabletop import grounding
from st4vla_jax.tabletop.generic import THINGS, generic_example
from st4vla_jax.tabletop.grounding import (
    WAY_POINTS,
    body_box,
    robot_example,
    target_box,
    target_point,
    tip_point,
)
from st4vla_jax.tabletop.language import PROMPT
from st4vla_jax.tabletop.render import Renderer, to_pixels
from st4vla_jax.tabletop.sampling import sample
from st4vla_jax.tabletop.scene import COLOURS, SHAPES, Scene
from st4vla_jax.tabletop.tasks import TASKS
from st4vla_jax.tabletop.world import HANDLE, Tip, World

SIZE = 112


def picture(scene, tip):
    renderer = Renderer(SIZE, ("primary",))
    renderer.reset(scene)
    return renderer.draw(World(scene, tip))["primary"].astype(int)


def mask_box(full, empty):
    """Corners of the pixels that differ, by looking at each."""
    rows, columns = np.nonzero(np.abs(full - empty).max(axis=-1) > 24)
    low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
    return np.array([low, high], float)


def away(x, y):
    """A gripper in the corner that is farthest from a place."""
    return Tip(0.17 if x < 0 else -0.17, 0.14 if y < 0 else -0.17, 0.01, 0.0, True)


@pytest.mark.parametrize("task", ["place", "push_to", "stack", "open_slider"])
def test_boxes_bound_the_pixels_that_a_body_covers(task):
    checked = 0
    for seed in range(8):
        scene = sample(np.random.default_rng(seed), task, "unseen_orientation").scene
        for body in scene.bodies:
            body.z = 0.03 * (seed % 3) if body.kind == "object" else 0.0
            tip = away(body.x, body.y)
            alone = Scene([body], None, scene.background, scene.texture)
            none = Scene([], None, scene.background, scene.texture)
            found = mask_box(picture(alone, tip), picture(none, tip))
            assert np.abs(body_box(body, SIZE) - found).max() <= 1.0, body
            checked += 1
    assert checked >= 8


def test_the_slider_s_box_is_its_lid():
    for seed in range(6):
        scene = sample(np.random.default_rng(seed), "open_slider", "train").scene
        scene.bodies.clear()
        tip = Tip(0.0, -0.17, 0.01, 0.0, True)
        image = picture(scene, tip)
        colour = np.array(COLOURS[scene.slider.colour])
        rows, columns = np.nonzero(np.abs(image - colour).max(axis=-1) < 24)
        (x0, y0), (x1, y1) = target_box(scene, HANDLE, SIZE)
        assert x0 <= columns.min() <= x0 + 4
        assert x1 - 5 <= columns.max() <= x1
        assert y0 <= rows.min()
        assert rows.max() <= y1
        x, y = target_point(scene, HANDLE, SIZE)
        assert (image[int(y), int(x)] > 200).all()  # the handle is white


def test_points_lie_on_what_they_name():
    for seed in range(20):
        scene = sample(np.random.default_rng(seed), "pick", "train").scene
        for index, body in enumerate(scene.bodies):
            if body.kind == "object":
                image = picture(scene, away(body.x, body.y))
                x, y = target_point(scene, index, SIZE)
                off = np.abs(image[int(y), int(x)] - COLOURS[body.colour]).max()
                assert off < 60, (seed, body)


def test_projection_against_hand_made_numbers():
    assert to_pixels(0.0, 0.0, 0.0, 100) == pytest.approx((50, 50))
    assert to_pixels(-0.2, 0.2, 0.0, 100) == pytest.approx((0, 0))
    assert to_pixels(0.1, -0.1, 0.1, 100) == pytest.approx((75, 65))


def test_traces_end_where_the_task_does():
    """The last way-point of reach and pick against the pixels of the target's colour."""
    checked = 0
    for index in range(150):
        example = robot_example(0, index, kind="trajectory")
        (way,) = example.turns[1].regions
        assert way.coordinates.shape == (WAY_POINTS, 2)
        assert (way.coordinates >= 0).all()
        assert (way.coordinates <= SIZE).all()
        if example.info["task"] == "reach":
            colour = re.search("|".join(COLOURS), example.turns[0].text)[0]
            rows, columns = np.nonzero(is_colour(example.image, colour))
            x, y = way.coordinates[-1]
            assert abs(x - columns.mean()) < 9
            assert abs(y - rows.mean()) < 12
            checked += 1
    assert checked >= 5


def test_traces_start_at_the_gripper():
    """The plumb line and the fingers are where the tips' projection says."""
    for x, y, z in ((0.0, 0.0, 0.1), (-0.1, 0.05, 0.03), (0.12, -0.14, 0.15)):
        tip = Tip(x, y, z, 0.0, False)
        image = picture(Scene([], None, "plain", 0), tip)
        dark = np.argwhere(image.max(axis=-1) < 60)
        fingers = dark[dark[:, 0] < tip_point(tip, SIZE)[1]]
        assert abs(fingers[:, 1].mean() - tip_point(tip, SIZE)[0]) < 1.5
        assert fingers[:, 0].max() >= tip_point(tip, SIZE)[1] - 2


def colour_share(example, colour):
    """Share of the answer's box whose pixels have a colour, shades included."""
    (x0, y0), (x1, y1) = example.turns[1].regions[0].coordinates
    pixels = example.image[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
    return is_colour(pixels, colour).mean()


@pytest.mark.parametrize("make", [robot_example, generic_example])
def test_the_box_of_an_answer_holds_the_colour_of_the_question(make):
    shares = []
    for index in range(150):
        example = make(1, index, kind="box")
        named = re.findall(rf"the ({'|'.join(COLOURS)}) (?!slider)\w+", example.turns[0].text)
        if (
            len(named) == 1
            and len(example.turns[1].regions) == 1
            and "object " not in (example.turns[0].text)
        ):
            shares.append(colour_share(example, named[0]))
    assert len(shares) >= 30
    assert np.mean(np.array(shares) > 0.2) >= 0.97  # the gripper hides some


def lists(make, **settings):
    """Records that ask for everything."""
    found = [make(2, index, size=28, **settings) for index in range(120)]
    return [e for e in found if re.search("every (object|thing)", e.turns[0].text)]


@pytest.mark.parametrize("make", [robot_example, generic_example])
def test_lists_name_every_thing_before_its_box(make):
    firsts = []
    for example in lists(make):
        text, regions = example.turns[1].text, example.turns[1].regions
        assert {region.kind for region in regions} == {"box"}
        assert len({region.label for region in regions}) == len(regions) >= 1
        answer = json.loads(
            text.removeprefix("```json").removesuffix("```").replace("<coordinates>", "[0]")
        )
        assert [one["label"] for one in answer] == [region.label for region in regions]
        assert all(list(one) == ["label", "bbox_2d"] for one in answer)
        lefts = [region.coordinates[0, 0] for region in regions]
        firsts.append(len(lefts) > 1 and int(np.argmin(lefts) == 0))
    assert len(firsts) >= 15 and 0.15 < np.mean(firsts) < 0.7  # in no order that tells the place
    assert not lists(make, lists=False)


def test_moments_do_not_tell_the_target_by_where_the_gripper_is(monkeypatch):
    """The gripper goes to the target; in most pictures it must not be there yet."""
    moments = []

    class Noted(grounding._Moment):
        def __init__(self, *args):
            super().__init__(*args)
            moments.append(self)

    monkeypatch.setattr(grounding, "_Moment", Noted)
    distances = []
    for index in range(120):
        robot_example(0, index, kind="box", tasks=("reach", "pick"))
        box = moments[-1].boxes[moments[-1].target]
        distances.append(np.linalg.norm(moments[-1].path[0] - box.mean(axis=0)))
    assert np.mean(np.array(distances) > 10) > 0.55


@pytest.mark.parametrize("make", [robot_example, generic_example])
def test_records_are_usable_and_follow_from_their_number(make):
    kinds = set()
    for index in range(40):
        one, other = make(3, index), make(3, index)
        np.testing.assert_array_equal(one.image, other.image)
        assert repr(one.turns) == repr(other.turns)
        check_turns(one.turns, [one.image.shape[:2]])
        kinds.add(one.info["kind"])
        for region in one.turns[1].regions:
            if region.kind == "box":
                assert (region.coordinates[1] > region.coordinates[0]).all()
    assert len(kinds) >= 3
    assert not np.array_equal(make(3, 0).image, make(4, 0).image)


def test_moments_are_of_the_tasks_asked_for():
    found = {robot_example(0, index, tasks=("reach", "stack")).info["task"] for index in range(20)}
    assert found == {"reach", "stack"}
    with pytest.raises(ValueError, match="with a meaning for open_slider"):
        robot_example(0, 0, "spatial", tasks=("open_slider",))


def test_the_robot_s_prompt_asks_for_the_target_s_box():
    """With the very words of a policy's samples, or a policy's prompt asks the VLM nothing."""
    texts = [robot_example(0, i, kind="box", tasks=("reach",)).turns[0].text for i in range(60)]
    asked = [text for text in texts if ". Locate the key object." in text]
    assert all(text.endswith('.\n```json\n[\n\t{"bbox_2d": [') for text in asked)
    assert len(asked) >= 10
    assert all(text.startswith(("<image>reach the", "<image>move the gripper")) for text in asked)
    assert get_config().data.prompts == (PROMPT,)


def test_generic_scenes_share_no_shape_with_robot_scenes():
    assert not set(THINGS) & set(SHAPES)
    for index in range(30):
        text = generic_example(0, index).turns[0].text
        assert not any(f" {shape}" in text for shape in SHAPES)


def is_colour(image, colour):
    """bool[h,w] pixels of a colour or a shade of it."""
    pixels = image.astype(float)
    bright = pixels.max(axis=-1, keepdims=True)
    want = np.array(COLOURS[colour]) / max(COLOURS[colour])
    return (np.abs(pixels / np.maximum(bright, 1) - want).max(axis=-1) < 0.15) & (
        bright[..., 0] > 90
    )


@pytest.mark.parametrize("make", [robot_example, generic_example])
def test_relations_are_told_as_the_picture_shows_them(make):
    """Answers against the middles of the pixels of the two colours that the question names."""
    axes = {
        "left": (1, -1), "right": (1, 1), "to the left of": (1, -1), "to the right of": (1, 1),
        "in front of": (0, 1), "behind": (0, -1),
    }  # fmt: skip
    good = []
    for index in range(200):
        example = make(0, index, kind="text" if make is generic_example else "relation")
        text, answer = example.turns[0].text, example.turns[1].text
        colours = re.findall("|".join(COLOURS), text)
        if len(colours) != 2:
            continue
        asked = re.search("Is the .* (to the left of|to the right of|in front of|behind) the", text)
        axis, sign = axes[asked[1] if asked else answer]
        first, second = (np.argwhere(is_colour(example.image, c)).mean(axis=0) for c in colours)
        if make is generic_example:
            first, second = second, first
        apart = sign * (first[axis] - second[axis])
        across = abs(first[1 - axis] - second[1 - axis]) if make is robot_example else 0
        good.append((apart > 0.7 * across) == (answer != "no"))
    assert len(good) >= 40
    assert np.mean(good) >= 0.95  # heights and the gripper shift middles a little


def test_unknown_splits_and_kinds_are_named():
    with pytest.raises(ValueError, match="split 'moon' of train"):
        robot_example(0, 0, "moon")
    with pytest.raises(ValueError, match="kind 'mask': there are box, point, text"):
        generic_example(0, 0, kind="mask")


def test_every_task_has_records():
    tasks = {robot_example(0, index, kind="box", size=28).info["task"] for index in range(80)}
    assert tasks == set(TASKS)
