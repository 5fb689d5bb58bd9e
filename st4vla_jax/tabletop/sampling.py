"""Draws scenes: which bodies, where, and what is asked; the held-out splits are decided here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from st4vla_jax.tabletop.demonstrator import PUSH_CLEARANCE, near_spot
from st4vla_jax.tabletop.language import instruction
from st4vla_jax.tabletop.scene import (
    COLOURS,
    CONTAINERS,
    FLAT,
    SHAPES,
    UNSEEN_REGION,
    WITHHELD,
    WITHHELD_LIDS,
    Body,
    Scene,
    Slider,
)
from st4vla_jax.tabletop.tasks import NEAR, SLIDER_TASKS, TASKS, Goal
from st4vla_jax.tabletop.world import HANDLE, HIGH, LOW, Tip

# "train" and "val" differ in their seeds only; of the others each changes one thing.
SPLITS = (
    "train",
    "val",
    "unseen_object",
    "similar_distractors",
    "new_background",
    "unseen_position",
    "unseen_orientation",
    "attribute",
    "spatial",
    "paraphrase",
)
BACKGROUNDS = ("wood", "plain", "felt", "grain")
NEW_BACKGROUNDS = ("checks", "stripes", "dark")

_ATTEMPTS = 2000
_TURNED = (math.radians(35), math.radians(55))  # "unseen_orientation"
_STRAIGHT = math.radians(20)
_OBJECT_AREA = ((-0.15, -0.15), (0.15, 0.12))
_WIDE_AREA = ((-0.125, -0.125), (0.125, 0.10))  # of containers and mats
_GAP = 0.024
_PUSH = (0.10, 0.20)  # m


@dataclasses.dataclass(frozen=True)
class Assignment:
    """An episode's start: what is there, what is asked, where the gripper is."""

    scene: Scene
    goals: tuple[Goal, ...]
    instruction: str
    tip: Tip


def splits_of(task: str) -> tuple[str, ...]:
    """Splits that mean something for a task: there is one slider, so it has no rivals."""
    without = ("similar_distractors", "spatial") if task in SLIDER_TASKS else ()
    return tuple(split for split in SPLITS if split not in without)


def check_task(task: str, split: str) -> None:
    """Raises ValueError naming what is unknown or does not go together."""
    problems = []
    if task not in TASKS:
        problems.append(f"task {task!r}: there are {', '.join(TASKS)}")
    if split not in SPLITS:
        problems.append(f"split {split!r}: there are {', '.join(SPLITS)}")
    elif not problems and split not in splits_of(task):
        problems.append(f"split {split!r} has no meaning for {task}; {', '.join(splits_of(task))}")
    if problems:
        raise ValueError("; ".join(problems))


def sample(rng: np.random.Generator, task: str, split: str) -> Assignment:
    """Draws an episode's start; for the arguments see `check_task`."""
    for _ in range(_ATTEMPTS):
        if (found := _Draw(rng, task, split).attempt()) is not None:
            return found
    raise RuntimeError(f"no scene for {task} and {split} in {_ATTEMPTS} attempts")


class _Draw:
    """One attempt at a scene; `attempt` is None where something does not fit."""

    def __init__(self, rng: np.random.Generator, task: str, split: str) -> None:
        self.rng, self.task, self.split = rng, task, split
        self.colours = list(rng.permutation(list(COLOURS)))
        self.bodies: list[Body] = []
        self.slider: Slider | None = None
        self.main: int | None = None  # the first object that is to be moved: splits change it

    def attempt(self) -> Assignment | None:
        goals = self._roles()
        self._distractors()
        # Wide things first: they are the hardest to find room for.
        order = sorted(range(len(self.bodies)), key=lambda i: self.bodies[i].kind == "object")
        placed: list[Body] = []
        for index in order:
            if not self._put(index, placed):
                return None
            placed.append(self.bodies[index])
        scene = Scene(
            self.bodies, self.slider, str(self.rng.choice(self._backgrounds())),
            int(self.rng.integers(2**31)),
        )  # fmt: skip
        if not all(self._feasible(goal) for goal in goals):
            return None
        text = instruction(
            scene,
            goals,
            self.rng,
            style=self.split if self.split in ("attribute", "spatial") else "name",
            paraphrase=self.split == "paraphrase",
        )
        return None if text is None else Assignment(scene, goals, text, self._tip())

    def _backgrounds(self) -> Sequence[str]:
        return NEW_BACKGROUNDS if self.split == "new_background" else BACKGROUNDS

    # --- Which bodies ---------------------------------------------------------------------------

    def _roles(self) -> tuple[Goal, ...]:
        """Adds the bodies that the task is about; its goals."""
        if self.task == "two_step":
            return self._two_steps()
        if self.task in SLIDER_TASKS:
            self._add_slider()
            return (Goal(self.task, HANDLE),)
        return (self._step(self.task),)

    def _two_steps(self) -> tuple[Goal, ...]:
        first = ("place", "stack", "slide")[self.rng.integers(3)]
        if first == "slide":
            self._add_slider()
            kind = SLIDER_TASKS[self.rng.integers(2)]
            return (Goal(kind, HANDLE), self._step("place"))
        return (self._step(first), self._step("place"))

    def _step(self, kind: str) -> Goal:
        main = self.main is None
        target = self._add_object(main=main)
        self.main = target if main else self.main
        if kind in ("reach", "pick"):
            return Goal(kind, target)
        if kind == "place":
            return Goal(kind, target, self._add_container())
        if kind == "push_to":
            self.bodies.append(Body("mat", self._colour(), "mat", 0.042, 0.0))
            return Goal(kind, target, len(self.bodies) - 1)
        return Goal(kind, target, self._add_object(shapes=FLAT if kind == "stack" else ()))

    def _colour(self) -> str:
        return str(self.colours.pop())

    def _add_object(self, *, main: bool = False, shapes: Sequence[str] = ()) -> int:
        withheld = main and self.split == "unseen_object"
        turned = main and self.split == "unseen_orientation"
        colour = self._colour()
        allowed = [
            shape
            for shape in shapes or SHAPES
            if ((colour, shape) in WITHHELD) == withheld and not (turned and shape == "cylinder")
        ]
        size = self.rng.uniform(0.028, 0.035)
        if main and self.split == "attribute":
            size = (size, 0.024, 0.041)[self.rng.integers(3)]
        return self._append(colour, allowed[self.rng.integers(len(allowed))], size)

    def _append(self, colour: str, shape: str, size: float) -> int:
        height = self.rng.uniform(0.03, 0.045)
        self.bodies.append(Body("object", colour, shape, float(size), float(height)))
        return len(self.bodies) - 1

    def _add_container(self) -> int:
        shape = tuple(CONTAINERS)[self.rng.integers(len(CONTAINERS))]
        size = float(self.rng.uniform(0.046, 0.052))
        self.bodies.append(Body("container", self._colour(), shape, size, 0.012))
        return len(self.bodies) - 1

    def _add_slider(self) -> None:
        rng, lids = self.rng, set(WITHHELD_LIDS)
        wanted = [c for c in self.colours if (c in lids) == (self.split == "unseen_object")]
        self.colours.remove(wanted[0])
        yaw = rng.uniform(-0.15, 0.15)
        if self.split == "unseen_orientation":
            yaw = rng.uniform(*_TURNED) * (1, -1)[rng.integers(2)]
        low = self.split == "unseen_position"
        y = rng.uniform(-0.12, -0.09) if low else rng.uniform(0.06, 0.09)
        x, opening = rng.uniform(-0.05, 0.05), rng.uniform(0.35, 0.65)
        self.slider = Slider(str(wanted[0]), float(x), float(y), float(yaw), float(opening))

    def _distractors(self) -> None:
        rng = self.rng
        if self.split == "similar_distractors":
            self._similar()
        most = max(1, min(3, 5 - len(self.bodies) - (self.slider is not None)))
        for _ in range(rng.integers(1, most + 1)):
            if len(self.colours) > 1 and len(self.bodies) < 6:
                self._add_object()
        has_wide = any(body.kind != "object" for body in self.bodies)
        if not has_wide and self.slider is None and rng.random() < 0.25:
            self._add_container()

    def _similar(self) -> None:
        """One of the target's colour, one of its shape."""
        target = self.bodies[0]
        for colour, shapes in ((target.colour, SHAPES), (self._colour(), (target.shape,))):
            choices = [
                shape
                for shape in shapes
                if (colour, shape) not in WITHHELD | {(target.colour, target.shape)}
            ]
            if choices:
                shape = choices[self.rng.integers(len(choices))]
                self._append(str(colour), shape, self.rng.uniform(0.028, 0.035))

    # --- Where ----------------------------------------------------------------------------------

    def _put(self, index: int, placed: Sequence[Body]) -> bool:
        """Finds a free place for a body, a few times over."""
        rng, body = self.rng, self.bodies[index]
        region = self.split == "unseen_position" and index == self.main
        area = _OBJECT_AREA if body.kind == "object" else _WIDE_AREA
        (x0, y0), (x1, y1) = UNSEEN_REGION if region else area
        for _ in range(30):
            body.x, body.y = rng.uniform(x0, x1), rng.uniform(y0, y1)
            inside = _in_region(body.x, body.y)
            if body.kind == "object" and inside != region:
                continue
            if self._is_free(body, placed):
                turned = self.split == "unseen_orientation" and index == self.main
                low, high = _TURNED if turned else (0.0, _STRAIGHT)
                body.yaw = float(rng.uniform(low, high) * (1, -1)[rng.integers(2)])
                return True
        return False

    def _is_free(self, body: Body, placed: Sequence[Body]) -> bool:
        for other in placed:
            if other.distance(body.x, body.y) < other.radius + body.radius + _GAP:
                return False
        if self.slider is None:
            return True
        half = self.slider.travel  # the lid reaches half its length beyond the handle's way
        dx, dy = body.x - self.slider.x, body.y - self.slider.y
        cos, sin = math.cos(self.slider.yaw), math.sin(self.slider.yaw)
        along, across = abs(dx * cos + dy * sin), abs(dy * cos - dx * sin)
        room = body.radius + 0.015
        return along > half + room or across > self.slider.width / 2 + room

    def _feasible(self, goal: Goal) -> bool:
        if goal.kind == "move_near":
            body, other = self.bodies[goal.target], self.bodies[goal.reference]
            apart = other.distance(body.x, body.y) - body.radius - other.radius
            return apart > NEAR + 0.03 and near_spot(self.bodies, body, other) is not None
        return goal.kind != "push_to" or self._can_push(goal)

    def _can_push(self, goal: Goal) -> bool:
        """Whether the way from behind the object to the mat is free and inside the table."""
        body, mat = self.bodies[goal.target], self.bodies[goal.reference]
        length = body.distance(mat.x, mat.y)
        if not _PUSH[0] <= length <= _PUSH[1]:
            return False
        ux, uy = (mat.x - body.x) / length, (mat.y - body.y) / length
        back = body.radius + PUSH_CLEARANCE + 0.02
        x, y = body.x - ux * back, body.y - uy * back
        if not (LOW[0] <= x <= HIGH[0] and LOW[1] <= y <= HIGH[1]):
            return False
        others = [b for b in self.bodies if b is not body and b.kind != "mat"]
        return all(
            _segment_distance(other, (x, y), (mat.x, mat.y)) > other.radius + body.radius + 0.03
            for other in others
        )

    def _tip(self) -> Tip:
        rng = self.rng
        x, y = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.12)
        z, yaw = rng.uniform(0.09, 0.15), rng.uniform(-0.3, 0.3)
        return Tip(float(x), float(y), float(z), float(yaw), bool(rng.random() < 0.85))


def _in_region(x: float, y: float) -> bool:
    (x0, y0), (x1, y1) = UNSEEN_REGION
    return x0 <= x <= x1 and y0 <= y <= y1


def _segment_distance(body: Body, a: tuple[float, float], b: tuple[float, float]) -> float:
    dx, dy = b[0] - a[0], b[1] - a[1]
    share = ((body.x - a[0]) * dx + (body.y - a[1]) * dy) / (dx * dx + dy * dy)
    share = min(max(share, 0.0), 1.0)
    return body.distance(a[0] + share * dx, a[1] + share * dy)
