"""Demonstrated episodes, and the columns that they are stored in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from st4vla_jax.data.tfds_folder import Column
from st4vla_jax.data.tfds_write import encode_episode
from st4vla_jax.data.writer import FLAGS, LANGUAGE, demonstration_flags
from st4vla_jax.tabletop.demonstrator import CommandNoise, command
from st4vla_jax.tabletop.environment import ACTION_DIM, STATE_DIM, Tabletop
from st4vla_jax.tabletop.grounding import target_box, tip_point

NAME, VERSION = "tabletop", "1.0.0"
MAX_EPISODES = 10**6  # of a data set seed

_NOISE_STREAM = 5
_RETRY = 10**12  # added to the seed of an episode whose demonstration failed


@dataclasses.dataclass(frozen=True)
class Episode:
    """A demonstration of T control steps.

    Attributes:
      task, split, seed: what `Tabletop.reset` was given; instruction: what was asked.
      images: view -> u8[T,h,w,3], before each step.
      states: f32[T,7] likewise.
      actions: f32[T,7] what the demonstrator commanded: the labels.
      executed: f32[T,7] what was executed, disturbed; replaying them gives the same episode.
      target_boxes: f32[T,4] pixels of the overhead picture, of what the present goal is about.
      tips: f32[T,2] pixels, the point between the finger tips.
      success: whether the task was done; failure: why not, or "".
    """

    task: str
    split: str
    seed: int
    instruction: str
    images: Mapping[str, np.ndarray]
    states: np.ndarray
    actions: np.ndarray
    executed: np.ndarray
    target_boxes: np.ndarray
    tips: np.ndarray
    success: bool
    failure: str


def demonstrate(
    env: Tabletop, seed: int, task: str, split: str = "train", *, noise: bool = True
) -> Episode:
    """Runs the demonstrator once; equal arguments give an equal episode.

    Args:
      env: is reset.
      seed: as for `Tabletop.reset`.
      task: likewise.
      split: likewise.
      noise: disturb what is executed, see `CommandNoise`.
    """
    disturb = CommandNoise(np.random.default_rng([seed, _NOISE_STREAM]))
    observation, done = env.reset(seed, task, split), False
    text, rows = observation.instruction, []
    while not done:
        label = command(env.world, env.progress.goal)
        executed = disturb(label, env.world) if noise else label
        goal, size = env.progress.goal, env.image_size
        box = target_box(env.world.scene, goal.target, size).ravel()
        tip = tip_point(env.world.tip, size)
        rows.append((observation.images, observation.state, label, executed, box, tip))
        observation, done, success, info = env.step(executed)
    images, *numbers = zip(*rows, strict=True)
    views = {view: np.stack([step[view] for step in images]) for view in images[0]}
    arrays = [np.stack(column) for column in numbers]
    return Episode(task, split, seed, text, views, *arrays, success, info["failure"])


def successful(env: Tabletop, seed: int, task: str, split: str) -> Episode:
    """The first demonstration that succeeds, of ``seed`` and then of seeds far away."""
    while not (episode := demonstrate(env, seed, task, split)).success:
        seed += _RETRY
    return episode


def columns(image_size: int) -> dict[str, Column]:
    """Columns of a step, by path, as `data.writer.EpisodeWriter` takes them.

    PNG, so that stored pictures are the environment's bit for bit.
    """
    image = Column("image", (image_size, image_size, 3), "uint8", "png")
    vector = Column("tensor", (ACTION_DIM,), "float32")
    return {
        LANGUAGE: Column("text"),
        **FLAGS,
        "observation/image": image,
        "observation/wrist_image": image,
        "observation/state": Column("tensor", (STATE_DIM,), "float32"),
        "observation/target_box": Column("tensor", (4,), "float32"),
        "observation/tip": Column("tensor", (2,), "float32"),
        "action": vector,
        "executed_action": vector,
    }


METADATA: Mapping[str, Column] = {
    "task": Column("text"),
    "split": Column("text"),
    "seed": Column("tensor", (), "int64"),
}


def encode(episode: Episode, image_size: int) -> tuple[bytes, int]:
    """A serialised record of tfds, and its number of steps."""
    steps: dict[str, Any] = {
        LANGUAGE: episode.instruction,
        **demonstration_flags(len(episode.actions)),
        "observation/image": episode.images["primary"],
        "observation/wrist_image": episode.images["wrist"],
        "observation/state": episode.states,
        "observation/target_box": episode.target_boxes,
        "observation/tip": episode.tips,
        "action": episode.actions,
        "executed_action": episode.executed,
    }
    metadata = {"task": episode.task, "split": episode.split, "seed": episode.seed}
    record = encode_episode(columns(image_size), steps, METADATA, metadata)
    return record, len(episode.actions)
