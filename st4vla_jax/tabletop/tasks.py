"""The ladder of tasks: what has to be true, and what may be touched on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from st4vla_jax.tabletop.world import HANDLE, IN_CONTAINER, World, stable

REACH_STEPS = 3  # control steps that the gripper must stay at the target
LIFTED = 0.07  # m, underside of a picked object
NEAR = 0.03  # m, gap between two objects that lie near each other
ON_MAT = 0.03  # m, centre to centre
_REACH_DISTANCE, _REACH_ABOVE = 0.03, 0.03  # m, in the plane and over its top
_END = 0.85  # share of the slider's travel


@dataclasses.dataclass(frozen=True)
class Goal:
    """One step of a task.

    Attributes:
      kind: key of PREDICATES.
      target: index of the body that is moved or reached, or HANDLE.
      reference: index of the body that it is brought to, or None.
    """

    kind: str
    target: int
    reference: int | None = None

    @property
    def allowed(self) -> frozenset[int]:
        """Indices that may be touched."""
        return frozenset({self.target, self.reference} - {None})


def _reach(goal: Goal, world: World) -> bool:
    body, tip = world.scene.bodies[goal.target], world.tip
    near = body.distance(tip.x, tip.y) <= _REACH_DISTANCE
    return near and tip.z <= body.top + _REACH_ABOVE


def _pick(goal: Goal, world: World) -> bool:
    return world.held == goal.target and world.scene.bodies[goal.target].z >= LIFTED


def _released(goal: Goal, world: World) -> bool:
    return world.held is None and world.tip.open


def _place(goal: Goal, world: World) -> bool:
    body, container = (world.scene.bodies[i] for i in (goal.target, goal.reference))
    inside = container.distance(body.x, body.y) <= IN_CONTAINER * container.size
    return _released(goal, world) and inside


def _stack(goal: Goal, world: World) -> bool:
    body, under = (world.scene.bodies[i] for i in (goal.target, goal.reference))
    rests = abs(body.z - under.top) < 1e-6 and stable(body, under)
    return _released(goal, world) and rests


def _move_near(goal: Goal, world: World) -> bool:
    body, other = (world.scene.bodies[i] for i in (goal.target, goal.reference))
    gap = other.distance(body.x, body.y) - body.radius - other.radius
    return _released(goal, world) and body.z == 0 and gap <= NEAR


def _push_to(goal: Goal, world: World) -> bool:
    body, mat = (world.scene.bodies[i] for i in (goal.target, goal.reference))
    return world.held is None and mat.distance(body.x, body.y) <= ON_MAT and body.z == 0


def _open(goal: Goal, world: World) -> bool:
    return world.scene.slider.opening >= _END


def _close(goal: Goal, world: World) -> bool:
    return world.scene.slider.opening <= 1 - _END


PREDICATES: Mapping[str, Callable[[Goal, World], bool]] = {
    "reach": _reach,
    "push_to": _push_to,
    "pick": _pick,
    "place": _place,
    "stack": _stack,
    "move_near": _move_near,
    "open_slider": _open,
    "close_slider": _close,
}
_OPPOSITE = {"open_slider": _close, "close_slider": _open}
_STEPS = {"reach": REACH_STEPS}

# Control steps until an episode ends without success: about three demonstrations.
MAX_STEPS: Mapping[str, int] = {
    "reach": 40,
    "push_to": 100,
    "pick": 50,
    "place": 80,
    "stack": 80,
    "move_near": 80,
    "open_slider": 50,
    "close_slider": 50,
    "two_step": 160,
}
TASKS = tuple(MAX_STEPS)
SLIDER_TASKS = ("open_slider", "close_slider")


class Progress:
    """Follows an episode's goals, which are to be reached in their order.

    Attributes:
      goals: all of them; number: how many have been reached.
      failure: why the episode can no longer succeed, or "".
    """

    def __init__(self, goals: tuple[Goal, ...]) -> None:
        self.goals, self.number, self.failure = goals, 0, ""
        self._held_for = 0

    @property
    def goal(self) -> Goal:
        """The one to be reached now; the last one when all have been."""
        return self.goals[min(self.number, len(self.goals) - 1)]

    @property
    def success(self) -> bool:
        return self.number == len(self.goals) and not self.failure

    def update(self, world: World) -> None:
        """Looks at the world after a control step."""
        allowed = frozenset().union(*(goal.allowed for goal in self.goals))
        if wrong := world.touched - allowed:
            index = min(wrong)
            name = "slider" if index == HANDLE else world.scene.bodies[index].name
            self.failure = f"touched the {name}"
            return
        goal = self.goal
        if goal.kind in _OPPOSITE and _OPPOSITE[goal.kind](goal, world):
            self.failure = "moved the slider to the wrong end"
            return
        reached = PREDICATES[goal.kind](goal, world)
        self._held_for = self._held_for + 1 if reached else 0
        if self._held_for < _STEPS.get(goal.kind, 1):
            return
        self._held_for = 0
        self.number += 1
        if self.number == len(self.goals):
            undone = [g for g in self.goals[:-1] if not PREDICATES[g.kind](g, world)]
            if undone:
                self.failure = f"the first step ({undone[0].kind}) was undone"
