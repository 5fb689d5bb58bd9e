import itertools
import math

import numpy as np
import pytest

from st4vla_jax.tabletop.language import PARAPHRASES, TEMPLATES, expressions, relation
from st4vla_jax.tabletop.sampling import (
    BACKGROUNDS,
    NEW_BACKGROUNDS,
    SPLITS,
    check_task,
    sample,
    splits_of,
)
from st4vla_jax.tabletop.scene import UNSEEN_REGION, WITHHELD, WITHHELD_LIDS, Body, Scene
from st4vla_jax.tabletop.tasks import SLIDER_TASKS, TASKS
from st4vla_jax.tabletop.world import HANDLE


def draws(split, tasks=TASKS, count=8):
    for task in tasks:
        if split in splits_of(task):
            for seed in range(count):
                yield task, sample(np.random.default_rng(seed), task, split)


def in_region(body):
    (x0, y0), (x1, y1) = UNSEEN_REGION
    return x0 <= body.x <= x1 and y0 <= body.y <= y1


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_changes_its_own_thing_only(split):
    for task, start in draws(split):
        scene, bodies = start.scene, start.scene.bodies
        main = [] if task in SLIDER_TASKS else [0]
        withheld = [i for i in scene.objects if (bodies[i].colour, bodies[i].shape) in WITHHELD]
        assert withheld == (main if split == "unseen_object" else [])
        if scene.slider is not None:
            assert (scene.slider.colour in WITHHELD_LIDS) == (split == "unseen_object")
        assert (scene.background in NEW_BACKGROUNDS) == (split == "new_background")
        assert scene.background in BACKGROUNDS + NEW_BACKGROUNDS
        inside = [i for i in scene.objects if in_region(bodies[i])]
        assert inside == (main if split == "unseen_position" else [])
        turned = [i for i, b in enumerate(bodies) if abs(b.yaw) > math.radians(21)]
        assert turned == (main if split == "unseen_orientation" else [])
        words = PARAPHRASES if split == "paraphrase" else TEMPLATES
        starts = [t.split("{")[0] for goal in start.goals[:1] for t in words[goal.kind]]
        assert any(start.instruction.removeprefix("first ").startswith(s) for s in starts)


def test_colours_are_unique_but_among_similar_distractors():
    for split in SPLITS:
        for _, start in draws(split, count=4):
            colours = [b.colour for b in start.scene.bodies]
            names = [b.name for b in start.scene.bodies]
            assert len(set(names)) == len(names)
            if split == "similar_distractors":
                target, others = start.scene.bodies[0], start.scene.bodies[1:]
                assert any(o.colour == target.colour or o.shape == target.shape for o in others)
            else:
                assert len(set(colours)) == len(colours)


def test_nothing_overlaps_at_the_start():
    for _, start in draws("train", count=10):
        for a, b in itertools.combinations(start.scene.bodies, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 0.02


def test_there_is_always_something_wrong_to_touch():
    for split in SPLITS:
        for _, start in draws(split, count=4):
            allowed = frozenset().union(*(goal.allowed for goal in start.goals))
            assert set(start.scene.objects) - allowed


def meant(scene, text):
    """Indices that a referring expression can mean, by its words alone."""
    objects = [scene.bodies[i] for i in scene.objects]
    words = text.removeprefix("the ").split()
    by_name = {body.name: body for body in scene.bodies}
    ends = {
        "leftmost": (0, min),
        "rightmost": (0, max),
        "frontmost": (1, min),
        "rearmost": (1, max),
    }
    if words[0] in ends:
        axis, choose = ends[words[0]]
        return [choose(objects, key=lambda b: (b.x, b.y)[axis])]
    if words[0] in ("largest", "big", "smallest", "small"):
        choose = max if words[0] in ("largest", "big") else min
        return [choose(objects, key=lambda b: b.size)]
    if "nearest" in text:
        other = by_name[" ".join(words[-2:])]
        rivals = [b for b in objects if b is not other]
        return [min(rivals, key=lambda b: math.hypot(b.x - other.x, b.y - other.y))]
    for phrase, axis, sign in (
        ("to the left of", 0, -1), ("to the right of", 0, 1), ("in front of", 1, -1),
        ("behind", 1, 1),
    ):  # fmt: skip
        if phrase in text:
            other = by_name[" ".join(words[-2:])]
            return [
                b for b in objects
                if b is not other and sign * ((b.x, b.y)[axis] - (other.x, other.y)[axis]) > 0.01
            ]  # fmt: skip
    found = [b for b in scene.bodies if words[0] == b.colour]
    return [b for b in found if words[1] in ("thing", "object", b.shape)]


@pytest.mark.parametrize("style", ["name", "attribute", "spatial"])
def test_expressions_mean_one_body(style):
    count = 0
    for split in ("train", "similar_distractors", "attribute", "spatial"):
        for _, start in draws(split, count=4):
            for index, body in enumerate(start.scene.bodies):
                for text in expressions(start.scene, index, style):
                    assert meant(start.scene, text) == [body], text
                    count += 1
    assert count > 200


@pytest.mark.parametrize("split", ["attribute", "spatial"])
def test_targets_of_the_language_splits_are_not_named(split):
    for _, start in draws(split):
        goal = next((g for g in start.goals if g.target != HANDLE), None)
        if goal is not None:
            assert start.scene.bodies[goal.target].name not in start.instruction


@pytest.mark.parametrize(
    ("x", "y", "where"),
    [
        (-0.1, 0.02, "to the left of"), (0.1, -0.02, "to the right of"), (0.0, 0.1, "behind"),
        (0.02, -0.1, "in front of"), (0.1, 0.1, None), (0.01, 0.02, None),
    ],
)  # fmt: skip
def test_relations_as_seen_in_the_overhead_picture(x, y, where):
    a = Body("object", "red", "cube", 0.03, 0.04, x, y)
    assert relation(a, Body("object", "blue", "cube", 0.03, 0.04)) == where


def test_an_ambiguous_name_is_no_expression():
    twins = [Body("object", "red", "cube", 0.03, 0.04, x) for x in (0.0, 0.1)]
    scene = Scene(twins, None, "plain", 0)
    assert expressions(scene, 0, "name") == []
    assert expressions(scene, 0, "attribute") == []
    assert expressions(scene, 0, "spatial") == ["the leftmost object"]


def test_a_split_that_means_nothing_for_a_task_is_refused():
    with pytest.raises(ValueError, match="'spatial' has no meaning for open_slider"):
        check_task("open_slider", "spatial")
    with pytest.raises(ValueError, match=r"task 'fly': there are reach.*split 'moon'"):
        check_task("fly", "moon")
