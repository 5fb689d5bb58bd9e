"""Generic pictures for stage 0: other shapes, backgrounds and prompts, and no robot.

What a tiny model learns from them stands in for what Qwen2.5-VL knows before it sees a robot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from st4vla_jax.data.answers import answer_text, labelled_answer
from st4vla_jax.data.prompts import IMAGE
from st4vla_jax.data.source import Region, Turn
from st4vla_jax.tabletop.grounding import Example
from st4vla_jax.tabletop.render import shade
from st4vla_jax.tabletop.scene import COLOURS, Outline, regular

_COUNTS = (0.15, 0.25, 0.3, 0.3)  # share of pictures with one thing, two, ...

_KINDS = {"box": 0.35, "point": 0.07, "text": 0.08, "list": 0.5}
_BOX_PROMPTS = (
    "Where is {}? Answer with its box in JSON.",
    "Find {} and give the bbox coordinates in JSON.",
    "Detect {} in this picture. JSON, please.",
)
_POINT_PROMPTS = (
    "Put your finger on {}. Answer in JSON.",
    "Which pixel shows the middle of {}? Answer in JSON.",
)
_LIST_PROMPT = _BOX_PROMPTS[2].format("every thing")
# All that is asked, with {} for things.
PROMPTS = (*_BOX_PROMPTS, *_POINT_PROMPTS, _LIST_PROMPT)
_SUPER = 2
_STREAM = 11


def _heart() -> Outline:
    angles = [math.tau * i / 24 for i in range(24)]
    return tuple(
        (
            math.sin(a) ** 3,
            (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in angles
    )


def _moon() -> Outline:
    outer = [math.radians(40 + 280 * i / 16) for i in range(17)]
    inner = [math.radians(295 - 230 * i / 12) for i in range(13)]
    return (
        *((math.cos(a), math.sin(a)) for a in outer),
        *((0.38 + 0.72 * math.cos(a), 0.72 * math.sin(a)) for a in inner),
    )


THINGS: Mapping[str, Outline] = {
    "hexagon": regular(6),
    "pentagon": regular(5, math.pi / 2),
    "diamond": ((0.0, 1.0), (0.6, 0.0), (0.0, -1.0), (-0.6, 0.0)),
    "heart": _heart(),
    "moon": _moon(),
    "arrow": (
        (0.0, 1.0), (0.75, 0.1), (0.3, 0.1), (0.3, -1.0), (-0.3, -1.0), (-0.3, 0.1), (-0.75, 0.1),
    ),
    "oval": tuple((0.62 * x, y) for x, y in regular(24)),
    "house": ((0.0, 1.0), (0.8, 0.3), (0.8, -0.8), (-0.8, -0.8), (-0.8, 0.3)),
}  # fmt: skip


class _Thing:
    """A flat thing in a picture; lengths in shares of the picture's side."""

    def __init__(self, rng: np.random.Generator, colour: str) -> None:
        self.colour, self.shape = colour, str(rng.choice(list(THINGS)))
        self.size = float(rng.uniform(0.06, 0.14))
        self.x, self.y = rng.uniform(self.size, 1 - self.size, 2).tolist()
        turn = float(rng.uniform(-0.35, 0.35))
        cos, sin = self.size * math.cos(turn), self.size * math.sin(turn)
        self.corners = np.array(
            [
                (self.x + u * cos - v * sin, self.y - u * sin - v * cos)
                for u, v in THINGS[self.shape]
            ]
        ).clip(0, 1)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def apart(self, other: _Thing) -> bool:
        distance = math.hypot(self.x - other.x, self.y - other.y)
        return distance > 1.05 * (self.size + other.size)

    def box(self, size: int) -> np.ndarray:
        """f32[2,2] corners in pixels."""
        return (np.stack([self.corners.min(0), self.corners.max(0)]) * size).astype(np.float32)


def generic_example(
    seed: int, index: int, size: int = 112, kind: str | None = None, *, lists: bool = True
) -> Example:
    """A picture and a question about it.

    Args:
      seed: of the data set.
      index: of the record; equal ones give an equal record.
      size: pixels of the picture's side.
      kind: box, point, text or list (boxes of everything); default: drawn.
      lists: False draws a box where it would be a list.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in (None, *_KINDS):
        raise ValueError(f"kind {kind!r}: there are {', '.join(_KINDS)}")
    rng = np.random.default_rng([seed, index, _STREAM])
    drawn = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    kind = kind or ("box" if drawn == "list" and not lists else drawn)
    things = _things(rng)
    image = _draw(rng, things, size)
    thing = things[rng.integers(len(things))]
    more: dict[str, object] = {}
    regions: tuple[Region, ...] = ()
    if kind == "text":
        question, answer = _question(rng, thing, things)
    elif kind == "list":
        question, order = _LIST_PROMPT, [things[i] for i in rng.permutation(len(things))]
        answer = labelled_answer([one.name for one in order])
        regions = tuple(Region("box", one.box(size), label=one.name) for one in order)
    else:
        answer, box = answer_text(1), thing.box(size)
        prompts, regions = _BOX_PROMPTS, (Region("box", box),)
        if kind == "point":
            prompts, regions = _POINT_PROMPTS, (Region("point", box.mean(axis=0, keepdims=True)),)
            more = {"box": box.ravel().round(2).tolist()}
        question = _one(rng, prompts).format(_phrase(rng, thing, things))
    turns = (Turn("user", IMAGE + question), Turn("assistant", answer, regions))
    return Example(image, turns, {"kind": kind, "things": len(things), **more})


def _one(rng: np.random.Generator, texts: tuple[str, ...]) -> str:
    return texts[rng.integers(len(texts))]


def _things(rng: np.random.Generator) -> list[_Thing]:
    """As many as _COUNTS says, apart from each other, each of its own colour."""
    colours = rng.permutation(list(COLOURS))
    wanted = 1 + int(rng.choice(len(_COUNTS), p=_COUNTS))
    things: list[_Thing] = []
    while len(things) < wanted:
        thing = _Thing(rng, str(colours[len(things)]))
        if all(thing.apart(other) for other in things):
            things.append(thing)
    return things


def _phrase(rng: np.random.Generator, thing: _Thing, things: list[_Thing]) -> str:
    choices = [f"the {thing.name}", f"the {thing.colour} thing"]
    if sum(other.shape == thing.shape for other in things) == 1:
        choices.append(f"the {thing.shape}")
    return _one(rng, tuple(choices))


def _question(rng: np.random.Generator, thing: _Thing, things: list[_Thing]) -> tuple[str, str]:
    others = [other for other in things if abs(other.x - thing.x) > 0.1]
    if others and rng.random() < 0.5:
        other = others[rng.integers(len(others))]
        side = "left" if thing.x < other.x else "right"
        return f"Which side of the {other.name} is the {thing.name} on?", side
    if sum(other.shape == thing.shape for other in things) == 1:
        return f"What colour is the {thing.shape}?", thing.colour
    return "How many things are there?", str(len(things))


def _draw(rng: np.random.Generator, things: list[_Thing], size: int) -> np.ndarray:
    side = size * _SUPER
    image = Image.fromarray(_backdrop(rng, side))
    draw = ImageDraw.Draw(image)
    for thing in things:
        colour = tuple(
            int(c) for c in np.clip(COLOURS[thing.colour] + rng.normal(size=3) * 8, 0, 255)
        )
        corners = [tuple(corner) for corner in (thing.corners * side).tolist()]
        draw.polygon(corners, colour, shade(colour, 0.6), width=2)
    return np.array(image.reduce(_SUPER))


def _backdrop(rng: np.random.Generator, side: int) -> np.ndarray:
    """u8[side,side,3]: one colour, a gradient, or soft blotches; pale or dark, never strong."""
    grey = rng.uniform(170, 245) if rng.random() < 0.8 else rng.uniform(30, 70)
    base = grey + rng.uniform(-10, 10, 3)
    kind = rng.integers(3)
    if kind == 0:
        pixels = np.broadcast_to(base, (side, side, 3))
    elif kind == 1:
        angle, axis = rng.uniform(0, math.tau), np.linspace(-1, 1, side)
        ramp = math.cos(angle) * axis[None, :, None] + math.sin(angle) * axis[:, None, None]
        pixels = base + 14 * ramp
    else:
        coarse = Image.fromarray(rng.normal(size=(9, 9)).astype(np.float32))
        blotches = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        pixels = base + 7 * blotches[..., None]
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
