"""What every data source yields, and the protocol that the batch schedule relies on."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation; each ``<image>`` in ``text`` stands for the next image."""

    role: str  # "user" or "assistant"
    text: str


@dataclasses.dataclass(frozen=True)
class RobotStep:
    """The action side of a robot sample, in raw (not yet normalised) units.

    Attributes:
      actions: f32[C,A] action chunk that starts at this step.
      action_mask: bool[C,A] False where the chunk runs past the episode's end.
      state: f32[S] proprioception, or None.
      embodiment: key of the normalisation statistics.
    """

    actions: np.ndarray
    action_mask: np.ndarray
    state: np.ndarray | None
    embodiment: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sample before tokenisation.

    Attributes:
      images: u8[h,w,3] arrays in view order, original pixels.
      turns: conversation; a robot sample has one user turn, its instruction.
      robot: the action side, or None for a grounding sample.
      group: data set and answer kind, for metrics.
      record: file and record, for error messages.
    """

    images: tuple[np.ndarray, ...]
    turns: tuple[Turn, ...]
    robot: RobotStep | None = None
    group: str = ""
    record: str = ""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Capacity that each sample of a source takes, known without reading its images.

    Attributes:
      tokens: i32[n] tokens (T); slots: i32[n] vision slots (P, multiples of 64);
      targets: i32[n] supervised tokens (M); robot: i32[n] robot samples (K), 0 or 1.
    """

    tokens: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    robot: np.ndarray


@runtime_checkable
class Source(Protocol):
    """Random access by index; thread-safe; picklable in under 1 KB."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def lengths(self) -> Lengths: ...
