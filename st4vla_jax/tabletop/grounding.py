"""Ground truth in pixels, and questions about robot scenes: boxes, points, traces, words.

Pixels are those of the overhead picture, (u, v) right and down, continuous: a box's second corner
is the right and lower edge of its last pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from st4vla_jax.data.answers import answer_text, labelled_answer
from st4vla_jax.data.importers import BOX_QUESTION, POINT_QUESTION, TRACE_QUESTION
from st4vla_jax.data.prompts import IMAGE, PromptConfig, spatial_prompt
from st4vla_jax.data.source import Region, Turn
from st4vla_jax.tabletop.demonstrator import command
from st4vla_jax.tabletop.language import PROMPT, RELATIONS, STYLES, expressions, relation
from st4vla_jax.tabletop.render import Renderer, to_pixels
from st4vla_jax.tabletop.sampling import SPLITS, Assignment, sample, splits_of
from st4vla_jax.tabletop.scene import Body, Scene
from st4vla_jax.tabletop.tasks import MAX_STEPS, TASKS, Progress
from st4vla_jax.tabletop.world import HANDLE, Tip, World

WAY_POINTS = 5  # of a trace, the first where the gripper is

_KINDS = {"box": 0.7, "point": 0.1, "trajectory": 0.1, "relation": 0.1}
_STYLE_SHARES = (0.5, 0.25, 0.25)  # of STYLES
# Share of moments near an episode's start: later on the gripper is at the target, and a model that
# finds the gripper would answer without reading the instruction.
_EARLY = 0.75
_STREAM = 7  # keeps these scenes apart from those of episodes


@dataclasses.dataclass(frozen=True)
class Example:
    """A grounding record.

    Attributes:
      image: u8[h,w,3].
      turns: one question and its answer.
      info: further keys of the record, as JSON; "things": how many lie there (a slider is none);
        "box": the target's where the answer is a point.
    """

    image: np.ndarray
    turns: tuple[Turn, Turn]
    info: dict[str, Any]


# --- Pixels -------------------------------------------------------------------------------------


def body_box(body: Body, size: int) -> np.ndarray:
    """f32[2,2] corners of a body, hidden parts included, in a picture of ``size`` pixels."""
    corners = [
        to_pixels(x, y, z, size) for x, y in body.outline for z in sorted({body.z, body.top})
    ]
    return _bounds(corners, size)


def target_box(scene: Scene, index: int, size: int) -> np.ndarray:
    """f32[2,2] corners of a body, or of the slider's lid for HANDLE."""
    if index != HANDLE:
        return body_box(scene.bodies[index], size)
    slider = scene.slider
    lid = slider.rectangle(slider.opening - 0.5, slider.travel, 0.86 * slider.width)
    handle = slider.rectangle(slider.opening - 0.5, 0.016, 0.6 * slider.width)
    corners = [to_pixels(x, y, 0.004, size) for x, y in lid]
    return _bounds(corners + [to_pixels(x, y, slider.height, size) for x, y in handle], size)


def target_point(scene: Scene, index: int, size: int) -> np.ndarray:
    """f32[2] the middle of a body's top, or of the slider's handle."""
    if index == HANDLE:
        return _inside(to_pixels(*scene.slider.handle, scene.slider.height, size), size)
    body = scene.bodies[index]
    return _inside(to_pixels(body.x, body.y, body.top, size), size)


def tip_point(tip: Tip, size: int) -> np.ndarray:
    """f32[2] the point between the finger tips."""
    return _inside(to_pixels(tip.x, tip.y, tip.z, size), size)


def _bounds(corners: Sequence[tuple[float, float]], size: int) -> np.ndarray:
    points = np.array(corners)
    return _inside(np.stack([points.min(axis=0), points.max(axis=0)]), size)


def _inside(points: Any, size: int) -> np.ndarray:
    return np.clip(np.asarray(points, np.float32), 0, size)


# --- Records ------------------------------------------------------------------------------------


def robot_example(
    seed: int,
    index: int,
    split: str = "train",
    size: int = 112,
    kind: str | None = None,
    *,
    tasks: Sequence[str] = TASKS,
    lists: bool = True,
) -> Example:
    """A grounding record about a moment of a demonstration.

    Args:
      seed: of the data set.
      index: of the record; equal ones give an equal record, no scene is one of an episode.
      split: see `sampling.SPLITS`.
      size: pixels of the picture's side.
      kind: box, point, trajectory or relation; default: drawn.
      tasks: of the demonstrations; those for which the split means something.
      lists: False asks for no list of boxes.

    Raises:
      ValueError: an unknown split or kind, or no task for the split.
    """
    known = [task for task in tasks if split in SPLITS and split in splits_of(task)]
    if not known or kind not in (None, *_KINDS):
        raise ValueError(
            f"split {split!r} of {', '.join(SPLITS)}, with a meaning for {', '.join(tasks)}; "
            f"kind {kind!r} of {', '.join(_KINDS)}"
        )
    rng = np.random.default_rng([seed, index, SPLITS.index(split), _STREAM])
    kind = kind or str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    while True:
        task = known[rng.integers(len(known))]
        moment = _Moment(rng, sample(rng, task, split), MAX_STEPS[task], size)
        found = {
            "box": functools.partial(moment.box, lists),
            "point": moment.point,
            "trajectory": moment.trace,
            "relation": moment.words,
        }[kind]()
        if found is not None:
            question, answer, regions, more = found
            turns = (Turn("user", IMAGE + question), Turn("assistant", answer, regions))
            info = {"kind": kind, "task": task, "split": split, "things": len(moment.scene.bodies)}
            info |= more
            return Example(moment.image, turns, info)


_Found = tuple[str, str, tuple[Region, ...], dict[str, Any]]


class _Moment:
    """A moment of an undisturbed demonstration: the picture, and what comes after."""

    def __init__(self, rng: np.random.Generator, start: Assignment, steps: int, size: int) -> None:
        self.rng, self.size, self.instruction = rng, size, start.instruction
        world, progress = World(start.scene, start.tip), Progress(start.goals)
        self.scene, self.tip, self.goal = start.scene, start.tip, progress.goal
        renderer = Renderer(size, ("primary",))
        renderer.reset(start.scene)
        for _ in range(int(rng.integers(0, 3 if rng.random() < _EARLY else 12))):
            if progress.number or progress.failure:
                break
            self._step(world, progress)
        self.image = renderer.draw(world)["primary"]
        # The scene moves on while the trace is followed, so the truth is read first.
        self.boxes = {i: target_box(self.scene, i, size) for i in self._named()}
        self.points = {i: target_point(self.scene, i, size) for i in self._named()}
        self.styles = {
            i: {style: expressions(self.scene, i, style) for style in STYLES} for i in self.boxes
        }
        self.relations = {
            (a, b): relation(self.scene.bodies[a], self.scene.bodies[b])
            for a in range(len(self.scene.bodies))
            for b in range(len(self.scene.bodies))
            if a != b
        }
        self.is_open = world.tip.open
        self.target = progress.goal.target
        self.reference = progress.goal.reference
        self.path = [tip_point(world.tip, size)]
        reached = progress.number
        while progress.number == reached and not progress.failure and len(self.path) < steps:
            self._step(world, progress)
            self.path.append(tip_point(world.tip, size))

    @staticmethod
    def _step(world: World, progress: Progress) -> None:
        dx, dy, dz, _, _, turn, is_open = command(world, progress.goal).tolist()
        world.move(dx, dy, dz, turn, is_open > 0.5)
        progress.update(world)

    def _named(self) -> list[int]:
        return [*range(len(self.scene.bodies)), *([HANDLE] if self.scene.slider else [])]

    def _phrase(self) -> tuple[int, str] | None:
        """A body and words for it, in a drawn style."""
        style = str(self.rng.choice(STYLES, p=_STYLE_SHARES))
        choices = [(i, text) for i, styles in self.styles.items() for text in styles[style]]
        return choices[self.rng.integers(len(choices))] if choices else None

    def box(self, lists: bool) -> _Found | None:
        """The box of something named, of what a robot's prompt is about, or (lists) of all."""
        draw = self.rng.random()
        if draw < 0.45:
            question = spatial_prompt(self.instruction, PromptConfig(PROMPT))
            return question, answer_text(1), (Region("box", self.boxes[self.target]),), {}
        if draw < 0.7 and lists:
            return self._list()
        if (found := self._phrase()) is None:
            return None
        index, text = found
        return BOX_QUESTION.format(text), answer_text(1), (Region("box", self.boxes[index]),), {}

    def _list(self) -> _Found:
        order = self.rng.permutation(self.scene.objects)
        names = [self.scene.bodies[i].name for i in order]
        regions = tuple(
            Region("box", self.boxes[i], label=name) for i, name in zip(order, names, strict=True)
        )
        return BOX_QUESTION.format("every object"), labelled_answer(names), regions, {}

    def point(self) -> _Found | None:
        """The point of something named, or of the place that something is brought to."""
        if self.reference is not None and self.rng.random() < 0.3:
            index = self.reference
            question = f"Your task is to {self.instruction}. Point to where it belongs."
        elif (found := self._phrase()) is None:
            return None
        else:
            index, question = found[0], f"Point to {found[1]}."
        region = Region("point", self.points[index][None])
        box = {"box": self.boxes[index].ravel().round(2).tolist()}
        return POINT_QUESTION.format(question), answer_text(1), (region,), box

    def trace(self) -> _Found | None:
        """Where the gripper goes until the next goal is reached."""
        if len(self.path) < 3:
            return None
        shares = np.linspace(0, len(self.path) - 1, WAY_POINTS).round().astype(int)
        way = np.stack(self.path)[shares]
        question = TRACE_QUESTION.format(f"to {self.instruction}")
        return question, answer_text(1), (Region("trajectory", way),), {}

    def words(self) -> _Found | None:
        """A question whose answer is words."""
        draw = self.rng.random()
        if draw < 0.15:
            return "Is the gripper open or closed?", "open" if self.is_open else "closed", (), {}
        clear = [pair for pair, where in self.relations.items() if where and self._unique(*pair)]
        if not clear:
            return None
        a, b = clear[self.rng.integers(len(clear))]
        where, names = self.relations[a, b], [self.scene.bodies[i].name for i in (a, b)]
        if draw < 0.6:
            return f"Where is the {names[0]}, seen from the {names[1]}?", where, (), {}
        asked = where if self.rng.random() < 0.5 else str(self.rng.choice(RELATIONS))
        answer = "yes" if asked == where else "no"
        return f"Is the {names[0]} {asked} the {names[1]}?", answer, (), {}

    def _unique(self, *indices: int) -> bool:
        return all(self.styles[i]["name"] for i in indices)
