"""The scripted demonstrator: what to do next, from the state alone, so that it recovers by itself.

Its commands are disturbed when they are executed: the data then show how to get back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from st4vla_jax.tabletop.scene import OBLONG, Body
from st4vla_jax.tabletop.tasks import Goal
from st4vla_jax.tabletop.world import (
    FLOOR,
    GRASP_YAW,
    HANDLE,
    HIGH,
    LOW,
    MAX_MOVE,
    MAX_TURN,
    Tip,
    World,
    half_turn,
)

PUSH_CLEARANCE = 0.028  # m behind an object where the closed gripper comes down

_HOVER = 0.12  # m, height to travel at: over a stack of two, with an object in the gripper
_SAFE = 0.07  # m, over every single object
_CLOSE = 0.012  # m, near enough to grasp, let go or push
_NEAR_GAP = 0.016  # m, between two objects that are put near each other
_DIRECTIONS = 24  # that are tried for it


class CommandNoise:
    """Disturbs commands as they are executed: jitter, bursts of one to three steps, lost grips."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left = 0
        self._burst = np.zeros(4)

    def __call__(self, action: np.ndarray, world: World) -> np.ndarray:
        """f32[7] command to f32[7] what is executed; both within the limits."""
        rng = self._rng
        limits = np.array([MAX_MOVE, MAX_MOVE, MAX_MOVE, MAX_TURN])
        if self._left == 0 and rng.random() < 0.08:
            self._left = int(rng.integers(1, 4))
            self._burst = rng.normal(size=4) * 0.4 * limits
        offset = rng.normal(size=4) * 0.05 * limits
        if self._left:
            self._left -= 1
            # Near the table half as much: a lost demonstration teaches nothing.
            offset = offset + self._burst * (1.0 if world.tip.z > _SAFE else 0.5)
        moved = np.clip(action[[0, 1, 2, 5]] + offset, -limits, limits)
        grip = action[6]
        slipped = rng.random() < 0.01  # drawn always: the stream does not depend on the world
        if slipped and world.held not in (None, HANDLE):
            held = world.scene.bodies[world.held]
            grip = 1.0 if world.support(held)[1] is None else grip
        return np.array([*moved[:3], 0.0, 0.0, moved[3], grip], np.float32)


def command(world: World, goal: Goal) -> np.ndarray:
    """What the demonstrator commands.

    Args:
      world: as it is now.
      goal: to be reached next.

    Returns:
      f32[7]: delta x, y, z (m), roll, pitch (always 0), yaw (rad), gripper 1 = open.
    """
    x, y, z, turn, is_open = _SKILLS[goal.kind](world, goal)
    return np.array([x, y, z, 0.0, 0.0, turn, is_open], np.float32)


_Move = tuple[float, float, float, float, float]  # dx, dy, dz, turn, open


def _clip(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def _straight(dx: float, dy: float) -> tuple[float, float]:
    """A step of at most MAX_MOVE in x and in y along a straight line."""
    scale = min(1.0, MAX_MOVE / max(abs(dx), abs(dy), 1e-9))
    return dx * scale, dy * scale


def _descend(
    tip: Tip, dx: float, dy: float, low: float, height: float, is_open: float, turn: float = 0.0
) -> _Move:
    """Towards a place: up first if it is far, across, then down a cone onto it.

    Args:
      tip: now.
      dx: m, to the place.
      dy: likewise.
      low: m, the tips' height at the end.
      height: m, what is to be lifted over the table first: the tips', or of what they hold.
      is_open: command of the gripper.
      turn: rad, still to go; large turns are finished before the descent.
    """
    distance = math.hypot(dx, dy)
    turned = _clip(turn, MAX_TURN)
    if distance > 0.04 and height < _SAFE:
        return 0.0, 0.0, _clip(_HOVER - tip.z, MAX_MOVE), turned, is_open
    step = _straight(dx, dy)
    left = max(distance - math.hypot(*step) - _CLOSE, 0.0)
    z = min(_HOVER, low + 2.5 * left)
    if abs(turn - turned) > 0.2:
        z = max(z, _SAFE)
    return *step, _clip(z - tip.z, MAX_MOVE), turned, is_open


def _reach(world: World, goal: Goal) -> _Move:
    body, tip = world.scene.bodies[goal.target], world.tip
    is_open = float(tip.open)
    return _descend(tip, body.x - tip.x, body.y - tip.y, body.top + 0.01, tip.z, is_open)


def _grasp(world: World, index: int) -> _Move:
    """Takes hold of a body or of the handle."""
    tip = world.tip
    if not tip.open:  # holds something else, or nothing
        return 0.0, 0.0, 0.0, 0.0, 1.0
    turn = 0.0
    if index == HANDLE:
        (x, y), low = world.scene.slider.handle, world.scene.slider.height / 2
    else:
        body = world.scene.bodies[index]
        x, y, low = body.x, body.y, body.z + max(0.4 * body.height, 0.01)
        if body.shape == OBLONG:
            turn = _nearest_turn(body.yaw, tip.yaw)
    dx, dy = x - tip.x, y - tip.y
    if (
        math.hypot(dx, dy) <= _CLOSE
        and tip.z <= low + 0.008
        and abs(turn) < GRASP_YAW / 2
        and world.can_grasp(index)
    ):
        return 0.0, 0.0, 0.0, 0.0, 0.0
    return _descend(tip, dx, dy, low, tip.z, 1.0, turn)


def _nearest_turn(yaw: float, now: float) -> float:
    """Angle (rad) to a yaw that the wrist can have and that grips an oblong body."""
    return half_turn(yaw) - now if abs(half_turn(yaw - now)) > GRASP_YAW / 3 else 0.0


def _pick(world: World, goal: Goal) -> _Move:
    if world.held == goal.target:
        return 0.0, 0.0, MAX_MOVE, 0.0, 0.0
    return _grasp(world, goal.target)


def _bring(world: World, goal: Goal, x: float, y: float, rest: float) -> _Move:
    """Carries the target to (x, y) and lets go of it over the height ``rest``."""
    if world.held != goal.target:
        return _grasp(world, goal.target)
    tip, body = world.tip, world.scene.bodies[goal.target]
    dx, dy = x - body.x, y - body.y
    if math.hypot(dx, dy) <= _CLOSE and body.z <= rest + 0.012:
        return 0.0, 0.0, 0.0, 0.0, 1.0
    return _descend(tip, dx, dy, rest + 0.004 + tip.z - body.z, body.z, 0.0)


def _place(world: World, goal: Goal) -> _Move:
    container = world.scene.bodies[goal.reference]
    return _bring(world, goal, container.x, container.y, FLOOR)


def _stack(world: World, goal: Goal) -> _Move:
    under = world.scene.bodies[goal.reference]
    return _bring(world, goal, under.x, under.y, under.top)


def _move_near(world: World, goal: Goal) -> _Move:
    bodies = world.scene.bodies
    body, other = bodies[goal.target], bodies[goal.reference]
    x, y = near_spot(bodies, body, other) or (body.x, body.y)
    return _bring(world, goal, x, y, 0.0)


def near_spot(bodies: Sequence[Body], body: Body, other: Body) -> tuple[float, float] | None:
    """The free place near ``other`` that is nearest to ``body``, (x, y)."""
    apart = body.radius + other.radius + _NEAR_GAP
    rest = [b for b in bodies if b is not body and b is not other and b.kind != "mat"]
    # Directions of the table, not of the body: those that are free stay free while it is carried.
    spots = [
        (other.x + apart * math.cos(angle), other.y + apart * math.sin(angle))
        for angle in (math.tau * i / _DIRECTIONS for i in range(_DIRECTIONS))
    ]
    free = [
        (x, y)
        for x, y in spots
        if LOW[0] + _CLOSE < x < HIGH[0] - _CLOSE
        and LOW[1] + _CLOSE < y < HIGH[1] - _CLOSE
        and all(b.distance(x, y) > b.radius + body.radius + 0.008 for b in rest)
    ]
    return min(free, key=lambda spot: body.distance(*spot), default=None)


def _push_to(world: World, goal: Goal) -> _Move:
    bodies, tip = world.scene.bodies, world.tip
    body, mat = bodies[goal.target], bodies[goal.reference]
    left = max(body.distance(mat.x, mat.y), 1e-6)
    ux, uy = (mat.x - body.x) / left, (mat.y - body.y) / left
    rx, ry = tip.x - body.x, tip.y - body.y
    along, across = rx * ux + ry * uy, ry * ux - rx * uy
    low = 0.4 * body.height
    behind = -(body.radius + 0.06) < along < -(body.radius - 0.006)
    if not tip.open and tip.z < body.top - 0.004 and behind and abs(across) < _CLOSE:
        step = min(MAX_MOVE * 0.9, left - along - body.radius)
        dx, dy = step * ux + across * uy, step * uy - across * ux
        return *_straight(dx, dy), _clip(low - tip.z, MAX_MOVE), 0.0, 0.0
    back = body.radius + PUSH_CLEARANCE
    bx, by = body.x - back * ux, body.y - back * uy
    inside = LOW[0] <= bx <= HIGH[0] and LOW[1] <= by <= HIGH[1]
    if world.held == goal.target or not inside:
        return _bring(world, goal, mat.x, mat.y, 0.0)  # no room behind it: carried, as a way out
    if tip.open:
        return 0.0, 0.0, _clip(_HOVER - tip.z, MAX_MOVE), 0.0, 0.0
    dx, dy = bx - tip.x, by - tip.y
    if math.hypot(dx, dy) > _CLOSE and tip.z < _SAFE:  # beside the object: never across at its side
        return 0.0, 0.0, _clip(_HOVER - tip.z, MAX_MOVE), 0.0, 0.0
    return _descend(tip, dx, dy, low, tip.z, 0.0)


def _slide(world: World, goal: Goal) -> _Move:
    if world.held != HANDLE:
        return _grasp(world, HANDLE)
    slider = world.scene.slider
    length = MAX_MOVE if goal.kind == "open_slider" else -MAX_MOVE
    return length * math.cos(slider.yaw), length * math.sin(slider.yaw), 0.0, 0.0, 0.0


_SKILLS: Mapping[str, Callable[[World, Goal], _Move]] = {
    "reach": _reach,
    "push_to": _push_to,
    "pick": _pick,
    "place": _place,
    "stack": _stack,
    "move_near": _move_near,
    "open_slider": _slide,
    "close_slider": _slide,
}
