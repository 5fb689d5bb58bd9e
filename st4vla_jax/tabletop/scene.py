"""What lies on the table: bodies, the sliding lid, colours, shapes, and where they may be.

World frame: metres; x to the right and y away from the viewer in the overhead picture, z up from
the table's top.  The table is ``2 * TABLE`` wide and fills the picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

TABLE = 0.2  # half the table's side

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (242, 208, 36),
    "purple": (132, 58, 184),
    "orange": (242, 124, 28),
    "cyan": (52, 196, 210),
    "pink": (244, 128, 188),
}

# Outlines around (0, 0), corners in order; the largest distance from the centre is about 1.
Outline = tuple[tuple[float, float], ...]


def regular(corners: int, phase: float = 0.0, radii: tuple[float, ...] = (1.0,)) -> Outline:
    """A regular polygon, or a star where there are several ``radii`` in turn."""
    angles = (math.tau * i / corners + phase for i in range(corners))
    return tuple(
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    )


def _cross(arm: float) -> Outline:
    corner = ((1.0, -arm), (1.0, arm), (arm, arm))  # of one arm, then turned by quarters
    return tuple(
        (x * math.cos(q) - y * math.sin(q), x * math.sin(q) + y * math.cos(q))
        for q in (0.0, math.pi / 2, math.pi, 3 * math.pi / 2)
        for x, y in corner
    )


SHAPES: Mapping[str, Outline] = {
    "cube": regular(4, math.pi / 4),
    "cylinder": regular(20, 0.0, (0.88,)),
    "prism": regular(3, math.pi / 2, (1.08,)),
    "star": regular(10, math.pi / 2, (1.12, 0.5)),
    "bar": ((0.42, -1.08), (0.42, 1.08), (-0.42, 1.08), (-0.42, -1.08)),
    "cross": _cross(0.34),
}
CONTAINERS: Mapping[str, Outline] = {
    "plate": regular(28),
    "bowl": regular(28),
    "tray": regular(4, math.pi / 4, (1.2,)),
}
MAT: Outline = regular(4, math.pi / 4, (1.2,))

OBLONG = "bar"  # the one shape that only an aligned gripper grasps; long side along y at yaw 0
FLAT = ("cube", "cylinder", "bar", "cross")  # shapes that others are stacked on

# Colour and shape pairs that no training scene holds: the split "unseen_object".
WITHHELD: frozenset[tuple[str, str]] = frozenset(
    (colour, tuple(SHAPES)[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)
)
WITHHELD_LIDS = ("cyan", "pink")

# Lower right of the table, (x, y) corners: no object of a training scene lies there.
UNSEEN_REGION = ((0.03, -0.16), (0.16, -0.04))


@dataclasses.dataclass
class Body:
    """Something on the table.

    Attributes:
      kind: "object" (can be grasped and pushed), "container" or "mat" (flat, cannot be touched).
      colour, shape: keys of COLOURS and SHAPES or CONTAINERS; "mat" for a mat.
      size: m, its outline's scale; height: m.
      x, y, z: m, centre of the outline, and the underside's height.
      yaw: rad, counterclockwise.
    """

    kind: str
    colour: str
    shape: str
    size: float
    height: float
    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    yaw: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def top(self) -> float:
        return self.z + self.height

    @property
    def radius(self) -> float:
        """m, of the circle that stands for it in contacts."""
        return (0.8 if self.kind == "object" else 0.9) * self.size

    @property
    def outline(self) -> Outline:
        """Its corners in the world, (x, y)."""
        unit = {**SHAPES, **CONTAINERS, "mat": MAT}[self.shape]
        cos, sin = self.size * math.cos(self.yaw), self.size * math.sin(self.yaw)
        return tuple((self.x + u * cos - v * sin, self.y + u * sin + v * cos) for u, v in unit)

    def distance(self, x: float, y: float) -> float:
        """m, from its centre, in the plane."""
        return math.hypot(x - self.x, y - self.y)


@dataclasses.dataclass
class Slider:
    """A lid that slides along a slot; closed it covers the slot, open it lies beside it.

    Attributes:
      colour: key of COLOURS.
      x, y: m, middle of the track; yaw: rad, direction in which it opens.
      opening: 0 closed .. 1 open.
    """

    colour: str
    x: float
    y: float
    yaw: float
    opening: float

    travel = 0.11  # m that the lid moves, and its length
    width = 0.05
    height = 0.03  # of the handle
    radius = 0.02  # of the handle, in contacts
    name = "slider"

    @property
    def handle(self) -> tuple[float, float]:
        """(x, y) of the handle, the lid's middle."""
        return self.along(self.opening - 0.5)

    def along(self, share: float, across: float = 0.0) -> tuple[float, float]:
        """(x, y) at a share of the travel from the track's middle, and metres to its left."""
        cos, sin, d = math.cos(self.yaw), math.sin(self.yaw), share * self.travel
        return self.x + d * cos - across * sin, self.y + d * sin + across * cos

    def project(self, x: float, y: float) -> float:
        """Opening, in 0..1, whose handle is nearest to (x, y)."""
        d = (x - self.x) * math.cos(self.yaw) + (y - self.y) * math.sin(self.yaw)
        return min(max(d / self.travel + 0.5, 0.0), 1.0)

    def rectangle(self, middle: float, length: float, width: float) -> Outline:
        """Corners of a rectangle around a share of the travel; length and width in metres."""
        half = length / 2 / self.travel
        return tuple(
            self.along(middle + a * half, b * width / 2)
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        )

    def distance(self, x: float, y: float) -> float:
        """m, from the handle, in the plane."""
        handle = self.handle
        return math.hypot(x - handle[0], y - handle[1])


@dataclasses.dataclass
class Scene:
    """A table with bodies and perhaps a slider.

    Attributes:
      bodies: in no order; others refer to them by index.
      slider: or None.
      background: name of a background in render.py; texture: seed of its pattern.
    """

    bodies: list[Body]
    slider: Slider | None
    background: str
    texture: int

    @property
    def objects(self) -> list[int]:
        """Indices of what can be grasped."""
        return [i for i, body in enumerate(self.bodies) if body.kind == "object"]
