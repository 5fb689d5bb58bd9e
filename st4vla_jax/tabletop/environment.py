"""The environment, and the protocol by which evaluation drives this one or any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from st4vla_jax.tabletop.render import VIEWS, Renderer
from st4vla_jax.tabletop.sampling import SPLITS, check_task, sample
from st4vla_jax.tabletop.tasks import MAX_STEPS, TASKS, Progress
from st4vla_jax.tabletop.world import World

CONTROL_HZ = 5.0
ACTION_DIM = STATE_DIM = 7


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a policy sees.

    Attributes:
      images: view -> u8[h,w,3].
      instruction: what to do.
      state: f32[S] proprioception.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray


class Transition(NamedTuple):
    """What a step led to.

    Attributes:
      observation: afterwards.
      done: the episode is over.
      success: the task is done.
      info: JSON-able; "failure" says in words why it cannot succeed any more, else "".
    """

    observation: Observation
    done: bool
    success: bool
    info: dict[str, Any]


class Environment(Protocol):
    """An environment that evaluation can drive; one instance runs one episode at a time."""

    tasks: tuple[str, ...]
    splits: tuple[str, ...]

    def reset(self, seed: int, task: str, split: str) -> Observation:
        """Starts an episode; equal arguments give an equal one."""
        ...

    def step(self, action: np.ndarray) -> Transition:
        """Executes one action f32[A], in raw units (not normalised)."""
        ...


class Tabletop:
    """The kinematic tabletop; an `Environment`.

    Actions are f32[7] at 5 Hz: delta x, y, z (m), roll, pitch, yaw (rad), gripper 1 = open, clipped
    to `world.MAX_MOVE` and `world.MAX_TURN`; the gripper stays vertical, so roll and pitch have no
    effect.  State is f32[7]: x, y, z (m), roll, pitch, yaw (rad) and the gripper, 1 = open.

    Args:
      image_size: pixels of a picture's side.
      views: of `render.VIEWS`; none for fast rollouts without pictures.

    Attributes:
      image_size: as given.
      world, progress: of the running episode.
      max_steps: of the running episode.
    """

    tasks, splits = TASKS, SPLITS

    def __init__(self, image_size: int = 112, views: Sequence[str] = VIEWS) -> None:
        self.image_size = image_size
        self._renderer = Renderer(image_size, views)
        self._steps: int | None = None

    def reset(self, seed: int, task: str, split: str = "train") -> Observation:
        """Starts an episode.

        Args:
          seed: not negative; the same number means another scene in each task and split.
          task: of TASKS.
          split: of `sampling.splits_of(task)`.

        Raises:
          ValueError: an unknown task or split, or the two do not go together.
        """
        check_task(task, split)
        rng = np.random.default_rng([seed, TASKS.index(task), SPLITS.index(split)])
        start = sample(rng, task, split)
        self.world = World(start.scene, start.tip)
        self.progress = Progress(start.goals)
        self.max_steps = MAX_STEPS[task]
        self._instruction, self._steps = start.instruction, 0
        self._renderer.reset(start.scene)
        return self._observe()

    def step(self, action: np.ndarray) -> Transition:
        """Executes an action; one that is not finite ends the episode as a failure.

        Raises:
          RuntimeError: there is no running episode.
          ValueError: not seven numbers.
        """
        if self._steps is None:
            raise RuntimeError("the episode is over, or was never started: call reset")
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,):
            raise ValueError(f"an action has shape ({ACTION_DIM},), got {action.shape}")
        self._steps += 1
        failure = ""
        if np.isfinite(action).all():
            dx, dy, dz, _, _, turn, grip = action.tolist()
            self.world.move(dx, dy, dz, turn, grip > 0.5)
            self.progress.update(self.world)
            failure = self.progress.failure
        else:
            failure = f"the action is not finite: {action.tolist()}"
        success = self.progress.success and not failure
        if not (success or failure) and self._steps >= self.max_steps:
            failure = f"not done after {self.max_steps} steps"
        info = {"failure": failure, "steps": self._steps, "goals_reached": self.progress.number}
        if done := bool(success or failure):
            self._steps = None
        return Transition(self._observe(), done, success, info)

    def _observe(self) -> Observation:
        tip = self.world.tip
        state = np.array([tip.x, tip.y, tip.z, 0.0, 0.0, tip.yaw, float(tip.open)], np.float32)
        return Observation(self._renderer.draw(self.world), self._instruction, state)
