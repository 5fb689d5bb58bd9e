"""Pictures of a world: from above at a slant, and from the wrist.

Overhead: the table fills the picture; heights shift things up by RISE, so that sides and the
gripper's height can be seen.  Wrist: straight down, centred on the gripper, wider from higher up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from st4vla_jax.tabletop.scene import COLOURS, TABLE, Body, Scene, Slider
from st4vla_jax.tabletop.world import Tip, World

VIEWS = ("primary", "wrist")
RISE = 0.4  # pixels up for a pixel of height

_SUPER = 2  # drawn larger, then averaged
_WRIST_REACH = 0.28  # m, half of what the wrist camera's layer shows
_WRIST_DENSITY = 5.0  # layer pixels a metre, for each pixel of the picture's side
_DARK, _LIGHT = (38, 38, 46), (250, 250, 250)
_EDGE_OF_TABLE = (96, 92, 90)

Colour = tuple[int, int, int]
Project = Callable[[float, float, float], tuple[float, float]]


def to_pixels(x: float, y: float, z: float, size: int) -> tuple[float, float]:
    """(u, v) pixels, right and down, of a point of the world in an overhead picture."""
    scale = size / (2 * TABLE)
    return (x + TABLE) * scale, (TABLE - y - RISE * z) * scale


def shade(colour: Colour, factor: float) -> Colour:
    """Darker below 1; towards white above 1."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)
    return tuple(int(255 - (255 - c) * (2 - factor)) for c in colour)


class Renderer:
    """Draws the pictures of one episode; what does not move is drawn once.

    Args:
      size: pixels of a picture's side.
      views: of VIEWS.
    """

    def __init__(self, size: int, views: Sequence[str] = VIEWS) -> None:
        if unknown := [view for view in views if view not in VIEWS]:
            raise ValueError(f"views {', '.join(unknown)}: there are {', '.join(VIEWS)}")
        if size < 28:
            raise ValueError(f"image_size {size}: at least 28 pixels")
        self._size, self._views = size, tuple(views)
        self._layers: dict[str, Image.Image] = {}
        self._key: tuple | None = None

    def reset(self, scene: Scene) -> None:
        """Begins an episode."""
        if self._views:
            size = self._size * _SUPER
            pixels = background(scene.background, scene.texture, size)
            self._table = Image.fromarray(pixels)
            self._key = None

    def draw(self, world: World) -> dict[str, np.ndarray]:
        """View -> u8[size,size,3]."""
        if not self._views:
            return {}
        slider = world.scene.slider
        key = (
            world.held,
            slider and slider.opening,
            *((b.x, b.y, b.z, b.yaw) for i, b in enumerate(world.scene.bodies) if i != world.held),
        )
        if key != self._key:
            self._layers, self._key = {}, key
        draw = {"primary": self._primary, "wrist": self._wrist}
        return {view: np.array(draw[view](world)) for view in self._views}

    def _still(self, view: str, make: Callable[[], Image.Image]) -> Image.Image:
        """The layer of what is not in the gripper."""
        if view not in self._layers:
            self._layers[view] = make()
        return self._layers[view]

    def _primary(self, world: World) -> Image.Image:
        size = self._size * _SUPER

        def project(x: float, y: float, z: float) -> tuple[float, float]:
            return to_pixels(x, y, z, size)

        def make() -> Image.Image:
            image = self._table.copy()
            draw_still(ImageDraw.Draw(image), world, project)
            return image

        image = self._still("primary", make).copy()
        draw = ImageDraw.Draw(image)
        draw_shadow(draw, world.tip, project, size)
        if world.held is not None and world.held >= 0:
            draw_body(draw, world.scene.bodies[world.held], project)
        draw_gripper(draw, world.tip, project, size)
        return image.reduce(_SUPER)

    def _wrist(self, world: World) -> Image.Image:
        density = self._size * _WRIST_DENSITY
        reach = _WRIST_REACH

        def flat(x: float, y: float, z: float) -> tuple[float, float]:
            return (x + reach) * density, (reach - y) * density

        def make() -> Image.Image:
            side = round(2 * reach * density)
            image = Image.new("RGB", (side, side), _EDGE_OF_TABLE)
            corner = round((reach - TABLE) * density)
            width = side - 2 * corner
            image.paste(
                self._table.resize((width, width), Image.Resampling.BILINEAR), (corner,) * 2
            )
            draw_still(ImageDraw.Draw(image), world, flat)
            return image

        layer, tip = self._still("wrist", make), world.tip
        half = (0.055 + 0.3 * tip.z) * density
        u, v = flat(tip.x, tip.y, 0.0)
        box = (u - half, v - half, u + half, v + half)
        image = layer.resize((self._size,) * 2, Image.Resampling.BILINEAR, box=box)
        scale = self._size / (2 * half) * density
        middle = self._size / 2

        def near(x: float, y: float, z: float) -> tuple[float, float]:
            return middle + (x - tip.x) * scale, middle - (y - tip.y) * scale

        draw = ImageDraw.Draw(image)
        if world.held is not None and world.held >= 0:
            draw_body(draw, world.scene.bodies[world.held], near)
        draw_fingers(draw, tip, self._size)
        return image


# --- Things -------------------------------------------------------------------------------------


def draw_still(draw: ImageDraw.ImageDraw, world: World, project: Project) -> None:
    """Everything but the gripper and what it holds, from the back to the front."""
    bodies = [body for i, body in enumerate(world.scene.bodies) if i != world.held]
    order = {"mat": 0, "container": 1, "object": 2}
    if world.scene.slider is not None:
        draw_slider(draw, world.scene.slider, project)
    for body in sorted(bodies, key=lambda b: (order[b.kind], b.z, -b.y)):
        draw_body(draw, body, project)


def draw_body(draw: ImageDraw.ImageDraw, body: Body, project: Project) -> None:
    """One body."""
    colour = COLOURS[body.colour]
    outline = body.outline

    def at(z: float, scale: float = 1.0) -> list[tuple[float, float]]:
        return [
            project(body.x + (x - body.x) * scale, body.y + (y - body.y) * scale, z)
            for x, y in outline
        ]

    if body.kind == "mat":
        draw.polygon(at(0.0), colour)
        draw.polygon(at(0.0, 0.86), shade(colour, 1.75))
        draw.polygon(at(0.0, 0.4), colour)
        draw.polygon(at(0.0, 0.26), shade(colour, 1.75))
        return
    steps = 2 if body.kind == "container" else 5
    for step in range(steps):
        draw.polygon(at(body.z + body.height * step / steps), shade(colour, 0.6))
    if body.kind == "object":
        draw.polygon(at(body.top), shade(colour, 0.7))
        draw.polygon(at(body.top, 0.88), colour)
        return
    inner = {"plate": 1.45, "bowl": 0.45, "tray": 1.7}[body.shape]
    draw.polygon(at(body.top), colour)
    draw.polygon(at(body.top, 0.78), shade(colour, inner))
    if body.shape == "plate":
        draw.polygon(at(body.top, 0.5), shade(colour, 1.3))


def draw_slider(draw: ImageDraw.ImageDraw, slider: Slider, project: Project) -> None:
    """Track, slot, lid and handle."""

    def flat(middle: float, length: float, width: float, z: float) -> list[tuple[float, float]]:
        return [project(x, y, z) for x, y in slider.rectangle(middle, length, width)]

    colour, travel, width = COLOURS[slider.colour], slider.travel, slider.width
    draw.polygon(flat(0.0, 2 * travel, width, 0.0), (150, 150, 156), _DARK)
    draw.polygon(flat(-0.5, 0.92 * travel, 0.72 * width, 0.0), (24, 24, 28))
    lid = slider.opening - 0.5
    draw.polygon(flat(lid, travel, 0.86 * width, 0.004), shade(colour, 0.6))
    draw.polygon(flat(lid, 0.92 * travel, 0.74 * width, 0.004), colour)
    for z in (0.004, 0.017, slider.height):
        draw.polygon(flat(lid, 0.016, 0.6 * width, z), _DARK)
    draw.polygon(flat(lid, 0.010, 0.5 * width, slider.height), _LIGHT)


# --- Gripper ------------------------------------------------------------------------------------


def _finger_places(tip: Tip) -> list[tuple[float, float]]:
    gap = 0.030 if tip.open else 0.011
    return [
        (tip.x + side * gap * math.cos(tip.yaw), tip.y + side * gap * math.sin(tip.yaw))
        for side in (-1, 1)
    ]


def draw_shadow(draw: ImageDraw.ImageDraw, tip: Tip, project: Project, size: int) -> None:
    """The place on the table below the finger tips, and the plumb line to it."""
    u, v = project(tip.x, tip.y, 0.0)
    r = size * 0.02
    draw.ellipse((u - r, v - 0.7 * r, u + r, v + 0.7 * r), None, _DARK, 2)
    draw.line([(u, v), project(tip.x, tip.y, tip.z)], _DARK, 1)


def draw_gripper(draw: ImageDraw.ImageDraw, tip: Tip, project: Project, size: int) -> None:
    """Two fingers, the palm and the wrist; light edges keep it visible on dark things."""
    lines = []
    for x, y in _finger_places(tip):
        lines.append([project(x, y, tip.z), project(x, y, tip.z + 0.035)])
    left, right = lines[0][1], lines[1][1]
    lines.append([left, right])
    lines.append([project(tip.x, tip.y, tip.z + 0.035), project(tip.x, tip.y, tip.z + 0.075)])
    for colour, width in ((_LIGHT, 0.044), (_DARK, 0.026)):
        for line in lines:
            draw.line(line, colour, max(round(size * width), 1))


def draw_fingers(draw: ImageDraw.ImageDraw, tip: Tip, size: int) -> None:
    """The fingers as the wrist camera sees them, always at the same distance."""
    cos, sin = math.cos(tip.yaw), math.sin(tip.yaw)
    gap, deep, wide = (0.30 if tip.open else 0.13) * size, 0.05 * size, 0.09 * size

    def corner(a: float, b: float) -> tuple[float, float]:
        return size / 2 + a * cos - b * sin, size / 2 - a * sin - b * cos

    for side in (-1, 1):
        near, far = side * gap, side * (gap + deep)
        corners = [corner(near, wide), corner(far, wide), corner(far, -wide), corner(near, -wide)]
        draw.polygon(corners, _DARK, _LIGHT)


# --- Tables -------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, size: int, strength: float) -> np.ndarray:
    """f32[size,size,1] soft blotches around 0."""
    coarse = rng.normal(size=(12, 12)).astype(np.float32)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)[..., None] * strength


def _wood(rng: np.random.Generator, size: int, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    rows = Image.fromarray(rng.normal(size=(40, 3)).astype(np.float32))
    grain = np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC))[..., None] * 5
    planks = np.where((v * 5) % 1 < 0.02, -40.0, 0.0)
    return np.array([222, 194, 156]) + grain + planks


def _plain(rng: np.random.Generator, size: int, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.array([214, 214, 218]) + 18 * (v - 0.5)


def _felt(rng: np.random.Generator, size: int, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.array([190, 204, 190]) + _noise(rng, size, 4)


def _grain(rng: np.random.Generator, size: int, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.array([226, 218, 200]) + rng.normal(size=(size, size, 1)).astype(np.float32) * 6


def _checks(rng: np.random.Generator, size: int, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    odd = ((u * 7).astype(int) + (v * 7).astype(int)) % 2
    return np.where(odd, 236.0, 196.0) + np.array([0, 0, -6])


def _stripes(rng: np.random.Generator, size: int, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.array([206, 196, 216]) + np.where(((u + v) * 8) % 1 < 0.4, 28.0, 0.0)


def _dark(rng: np.random.Generator, size: int, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.array([78, 80, 90]) + _noise(rng, size, 5)


_TABLES: Mapping[str, Callable[..., np.ndarray]] = {
    "wood": _wood,
    "plain": _plain,
    "felt": _felt,
    "grain": _grain,
    "checks": _checks,
    "stripes": _stripes,
    "dark": _dark,
}


def background(name: str, texture: int, size: int) -> np.ndarray:
    """u8[size,size,3] of an empty table.

    Args:
      name: of a table.
      texture: seed of its pattern and brightness.
      size: pixels of a side.
    """
    rng = np.random.default_rng(texture)
    axis = np.arange(size, dtype=np.float32) / size
    v, u = axis[:, None, None], axis[None, :, None]
    pixels = _TABLES[name](rng, size, v, u) + rng.uniform(-10, 10)
    pixels = np.broadcast_to(pixels, (size, size, 3))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)
