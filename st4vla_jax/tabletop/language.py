"""Instructions and referring expressions: by name, by attribute, by place; and paraphrases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from st4vla_jax.data.answers import answer_opening
from st4vla_jax.tabletop.scene import Body, Scene
from st4vla_jax.tabletop.tasks import Goal
from st4vla_jax.tabletop.world import HANDLE

STYLES = ("name", "attribute", "spatial")
# The spatial prompt of the robot's samples, and of questions whose answer is the target's box: the
# VLM looks for the target in a robot's prompt only if it was asked with these words.
#
# It ends as its answer begins, since a policy reads the prompt only: there the VLM looks up where a
# box is.  In a tiny VLM that answers 998 of 1000 such questions, x of the target's middle is linear
# in the hidden state of that token (R2 0.93, y 0.61), and not in that of the token before an answer
# (0.30, 0.09).
PROMPT = "{instruction}. Locate the key object.\n" + answer_opening("box")

# {a} what is moved, {b} where to; {in} is "on" for a plate.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "reach": ("reach {a}", "move the gripper to {a}"),
    "push_to": ("push {a} to {b}", "push {a} onto {b}"),
    "pick": ("pick up {a}", "lift {a}"),
    "place": ("put {a} {in} {b}", "place {a} {in} {b}"),
    "stack": ("stack {a} on {b}", "put {a} on top of {b}"),
    "move_near": ("move {a} near {b}", "put {a} next to {b}"),
    "open_slider": ("open {a}", "slide {a} open"),
    "close_slider": ("close {a}", "slide {a} shut"),
}
# Of the split "paraphrase": no word order of TEMPLATES.
PARAPHRASES: Mapping[str, tuple[str, ...]] = {
    "reach": ("go over to {a} and stay there", "bring your hand to {a}"),
    "push_to": ("shove {a} until it is on {b}", "{a} belongs on {b}, slide it there"),
    "pick": ("grab {a} and raise it", "take {a} off the table"),
    "place": ("{a} goes {in} {b}", "drop {a} {in} {b}"),
    "stack": ("make a tower with {a} above {b}", "set {a} down onto {b}"),
    "move_near": ("bring {a} close to {b}", "{a} should be beside {b}"),
    "open_slider": ("pull {a} so that the slot shows", "uncover what {a} hides"),
    "close_slider": ("cover the slot with {a}", "push {a} back over the slot"),
}
_JOINTS = {"train": "{}, then {}", "paraphrase": "first {}; after that {}"}

_CLEAR = 0.03  # m, by which a comparison must hold
_SIZE_RATIO = 1.15

RELATIONS = ("to the left of", "to the right of", "in front of", "behind")


def relation(a: Body, b: Body) -> str | None:
    """How ``a`` lies to ``b`` as seen in the overhead picture; None where it is not clear."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < _CLEAR or 0.7 < abs(dx) / max(abs(dy), 1e-9) < 1 / 0.7:
        return None
    if abs(dx) > abs(dy):
        return RELATIONS[0] if dx < 0 else RELATIONS[1]
    return RELATIONS[2] if dy < 0 else RELATIONS[3]


def _attributes(scene: Scene, index: int) -> list[str]:
    body = scene.bodies[index]
    others = [other for i, other in enumerate(scene.bodies) if i != index]
    found = []
    if all(other.colour != body.colour for other in others):
        found += [f"the {body.colour} thing"]
    if body.kind != "object":
        return found
    if found:
        found += [f"the {body.colour} object"]
    sizes = [other.size for other in others if other.kind == "object"]
    if sizes and body.size >= _SIZE_RATIO * max(sizes):
        found += ["the largest object", "the big object"]
    if sizes and body.size * _SIZE_RATIO <= min(sizes):
        found += ["the smallest object", "the small object"]
    return found


def _places(scene: Scene, index: int) -> list[str]:
    body = scene.bodies[index]
    rivals = [scene.bodies[i] for i in scene.objects if i != index]
    if not rivals or body.kind != "object":
        return []
    found = []
    for word, value in (
        ("leftmost", lambda o: o.x),
        ("rightmost", lambda o: -o.x),
        ("frontmost", lambda o: o.y),
        ("rearmost", lambda o: -o.y),
    ):
        if value(body) + _CLEAR <= min(map(value, rivals)):
            found.append(f"the {word} object")
    for other in scene.bodies:
        if other is body or _repeated(scene, other):
            continue
        where = relation(body, other)
        compared = [rival for rival in rivals if rival is not other]
        if where and not any(_may_be(rival, other, where) for rival in compared):
            found.append(f"the object {where} the {other.name}")
        near = [rival.distance(other.x, other.y) for rival in compared]
        if near and body.distance(other.x, other.y) + _CLEAR <= min(near):
            found.append(f"the object nearest to the {other.name}")
    return found


def _repeated(scene: Scene, body: Body) -> bool:
    return sum(other.name == body.name for other in scene.bodies) > 1


def _may_be(a: Body, b: Body, where: str) -> bool:
    """Whether somebody might say that ``a`` lies so to ``b``."""
    dx, dy = a.x - b.x, a.y - b.y
    return {
        RELATIONS[0]: -dx, RELATIONS[1]: dx, RELATIONS[2]: -dy, RELATIONS[3]: dy,
    }[where] > 0.01  # fmt: skip


def expressions(scene: Scene, index: int, style: str) -> list[str]:
    """Noun phrases that mean one body and no other, perhaps none.

    Args:
      scene: where it lies.
      index: of the body, or HANDLE for the slider.
      style: one of STYLES.
    """
    if index == HANDLE:
        slider = scene.slider
        return {"name": ["the slider"], "attribute": [f"the {slider.colour} slider"]}.get(style, [])
    if style == "attribute":
        return _attributes(scene, index)
    if style == "spatial":
        return _places(scene, index)
    return [] if _repeated(scene, scene.bodies[index]) else [f"the {scene.bodies[index].name}"]


def instruction(
    scene: Scene, goals: Sequence[Goal], rng: np.random.Generator, *, style: str, paraphrase: bool
) -> str | None:
    """What to say for some goals; None if the style has no clear words for a target.

    Args:
      scene: at the start.
      goals: one or two.
      rng: chooses among equals.
      style: how targets are referred to, one of STYLES; where they go is told by name.
      paraphrase: use PARAPHRASES.
    """
    clauses = []
    moved = [scene.bodies[goal.target].name for goal in goals if goal.target != HANDLE]
    for goal in goals:
        # Of two steps with a slider and an object, the slider has no place of its own to name.
        own = "name" if style == "spatial" and goal.target == HANDLE else style
        choices = expressions(scene, goal.target, own)
        if own == "spatial":  # what will be moved is no landmark
            choices = [text for text in choices if not any(name in text for name in moved)]
        if not choices:
            return None
        words = {"a": choices[rng.integers(len(choices))]}
        if goal.reference is not None:
            there = scene.bodies[goal.reference]
            words |= {"b": f"the {there.name}", "in": "on" if there.shape == "plate" else "in"}
        templates = (PARAPHRASES if paraphrase else TEMPLATES)[goal.kind]
        clauses.append(templates[rng.integers(len(templates))].format(**words))
    if len(clauses) == 1:
        return clauses[0]
    return _JOINTS["paraphrase" if paraphrase else "train"].format(*clauses)
