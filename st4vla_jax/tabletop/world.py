"""How the gripper moves things: grasping, carrying, dropping, pushing, sliding.  No forces.

An open gripper straddles what it comes over; a closed one rests on it or pushes it.  The gripper
stays vertical: roll and pitch commands have no effect.
"""

from __future__ import annotations

import dataclasses
import math

from st4vla_jax.tabletop.scene import FLAT, OBLONG, Body, Scene

# Limits of one action at 5 Hz, about the range of Bridge's: metres, radians.
MAX_MOVE, MAX_TURN = 0.04, 0.25
LOW, HIGH = (-0.17, -0.17, 0.005), (0.17, 0.14, 0.16)  # of the finger tips
MAX_YAW = math.pi / 2
HANDLE = -1  # stands for the slider's handle where bodies are named by index

GRASP_DISTANCE = 0.022  # m, tips to centre, in the plane
GRASP_YAW = 0.45  # rad, for an oblong body
IN_CONTAINER = 0.6  # of its size, centre to centre
FLOOR = 0.006  # m, a container's
_RIM = 0.015  # m, a container's wall
_SUBSTEPS = 4
_SLACK = 0.002  # m above a body's top that still count as beside it
_EDGE = 0.185  # m, objects stay this near to the table's middle


@dataclasses.dataclass
class Tip:
    """Where the finger tips are: m, rad; ``open``: the gripper."""

    x: float
    y: float
    z: float
    yaw: float
    open: bool


class World:
    """A scene and the gripper in it.

    Attributes:
      scene, tip: as they are now.
      held: index of the body in the gripper, HANDLE, or None.
      touched: indices that the gripper, or what it moves, has touched so far.
    """

    def __init__(self, scene: Scene, tip: Tip) -> None:
        self.scene, self.tip = scene, tip
        self.held: int | None = None
        self.touched: set[int] = set()
        self._grip = (0.0, 0.0, 0.0, 0.0)  # of the held body relative to the tips

    def move(self, dx: float, dy: float, dz: float, turn: float, is_open: bool) -> None:
        """One control step: opens the gripper, moves (clipped to the limits), or closes it last."""
        dx, dy, dz = (min(max(d, -MAX_MOVE), MAX_MOVE) / _SUBSTEPS for d in (dx, dy, dz))
        turn = min(max(turn, -MAX_TURN), MAX_TURN)
        if is_open and not self.tip.open:
            self.tip.open = True
            self._release()
        self.tip.yaw = min(max(self.tip.yaw + turn, -MAX_YAW), MAX_YAW)
        for _ in range(_SUBSTEPS):
            before = self.tip.z
            self.tip.x = min(max(self.tip.x + dx, LOW[0]), HIGH[0])
            self.tip.y = min(max(self.tip.y + dy, LOW[1]), HIGH[1])
            self.tip.z = min(max(self.tip.z + dz, LOW[2]), HIGH[2])
            if self.held == HANDLE:
                self._slide()
            elif self.held is not None:
                self._carry(self.scene.bodies[self.held])
            elif not self.tip.open:
                self._push(before)
            self._touch()
        if self.tip.open and not is_open:
            self.tip.open = False
            self._grasp()

    def support(self, moved: Body) -> tuple[float, int | None]:
        """Height that a body at its place would rest at, and the index of what it rests on."""
        height, below = 0.0, None
        for index, body in enumerate(self.scene.bodies):
            if body is moved or body.kind == "mat":
                continue
            d = body.distance(moved.x, moved.y)
            if body.kind == "container" and d < body.radius and height < FLOOR:
                height, below = FLOOR, index
            over = d < 0.75 * (body.radius + moved.radius) and body.top > height
            if body.kind == "object" and over:
                height, below = body.top, index
        return height, below

    def _slide(self) -> None:
        slider, tip = self.scene.slider, self.tip
        slider.opening = slider.project(tip.x, tip.y)
        tip.x, tip.y = slider.handle
        tip.z = slider.height / 2

    def _carry(self, body: Body) -> None:
        dx, dy, dz, dyaw = self._grip
        tip = self.tip
        body.x, body.y, body.yaw = tip.x + dx, tip.y + dy, tip.yaw + dyaw
        height, below = self.support(body)
        if tip.z + dz < height:
            tip.z = height - dz
            self._touch_index(below)
        body.z = tip.z + dz

    def _push(self, before: float) -> None:
        """The closed gripper rests on what it came down on and shoves what it came beside."""
        tip = self.tip
        for index, body in enumerate(self.scene.bodies):
            if body.kind != "object" or (d := body.distance(tip.x, tip.y)) >= body.radius:
                continue
            if before >= body.top - 1e-6:
                if tip.z < body.top:
                    tip.z = body.top
                    self.touched.add(index)
            elif tip.z < body.top and body.z < tip.z:
                ux, uy = ((body.x - tip.x) / d, (body.y - tip.y) / d) if d > 1e-6 else (1.0, 0.0)
                body.x = min(max(tip.x + ux * body.radius, -_EDGE), _EDGE)
                body.y = min(max(tip.y + uy * body.radius, -_EDGE), _EDGE)
                self.touched.add(index)
                self._collide(body)

    def _collide(self, moved: Body) -> None:
        for index, body in enumerate(self.scene.bodies):
            if body is moved or body.kind != "object" or body.z >= moved.top:
                continue
            if body.distance(moved.x, moved.y) < 0.8 * (body.radius + moved.radius):
                self.touched.add(index)

    def _touch(self) -> None:
        """Notes what the tips are inside of."""
        tip, slider = self.tip, self.scene.slider
        for index, body in enumerate(self.scene.bodies):
            top = {"object": body.top, "container": _RIM, "mat": -1.0}[body.kind]
            if tip.z < top - _SLACK and body.distance(tip.x, tip.y) < body.radius:
                self.touched.add(index)
        low = slider is not None and tip.z < slider.height - _SLACK
        if low and slider.distance(tip.x, tip.y) < slider.radius:
            self.touched.add(HANDLE)

    def _touch_index(self, index: int | None) -> None:
        if index is not None:
            self.touched.add(index)

    def can_grasp(self, index: int) -> bool:
        """Whether closing the gripper now would take hold of a body or the handle."""
        tip = self.tip
        body = self.scene.slider if index == HANDLE else self.scene.bodies[index]
        if body is None or body.distance(tip.x, tip.y) > GRASP_DISTANCE:
            return False
        if index == HANDLE:
            return tip.z < body.height - _SLACK
        if body.kind != "object" or not body.z < tip.z < body.top - _SLACK:
            return False
        return body.shape != OBLONG or abs(half_turn(body.yaw - tip.yaw)) <= GRASP_YAW

    def _grasp(self) -> None:
        tip = self.tip
        found = [i for i in (*self.scene.objects, HANDLE) if self.can_grasp(i)]
        if not found:
            return
        bodies = {i: self.scene.slider if i == HANDLE else self.scene.bodies[i] for i in found}
        self.held = min(found, key=lambda i: bodies[i].distance(tip.x, tip.y))
        if self.held != HANDLE:
            body = bodies[self.held]
            self._grip = (body.x - tip.x, body.y - tip.y, body.z - tip.z, body.yaw - tip.yaw)

    def _release(self) -> None:
        if self.held in (None, HANDLE):
            self.held = None
            return
        body = self.scene.bodies[self.held]
        self.held = None
        height, below = self.support(body)
        under = self.scene.bodies[below] if below is not None else None
        if under is not None and under.kind == "object" and not stable(body, under):
            self._touch_index(below)
            self._slip(body, under)
            height, _ = self.support(body)
        body.z = height

    @staticmethod
    def _slip(body: Body, under: Body) -> None:
        """A body put down beside another's middle falls to its side."""
        d = under.distance(body.x, body.y)
        ux, uy = ((body.x - under.x) / d, (body.y - under.y) / d) if d > 1e-6 else (1.0, 0.0)
        apart = body.radius + under.radius
        body.x = min(max(under.x + ux * apart, -_EDGE), _EDGE)
        body.y = min(max(under.y + uy * apart, -_EDGE), _EDGE)


def stable(body: Body, under: Body) -> bool:
    """Whether a body stays where it is put on another."""
    return under.shape in FLAT and under.distance(body.x, body.y) <= 0.7 * under.radius


def half_turn(angle: float) -> float:
    """An angle modulo half a turn, in [-pi/2, pi/2)."""
    return (angle + math.pi / 2) % math.pi - math.pi / 2
