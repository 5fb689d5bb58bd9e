"""What every data source yields, and the protocol that the batch schedule relies on."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Region:
    """A box, point or trajectory, in ORIGINAL pixels of one image of its sample.

    Attributes:
      kind: what the coordinates are.
      coordinates: f32[n,2] (x, y): two corners of a box, one point, or n way-points in time order.
      image: index among the sample's images.
      label: name of the object, or "".
    """

    kind: Literal["box", "point", "trajectory"]
    coordinates: np.ndarray
    image: int = 0
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
      role: "user" or "assistant".
      text: each ``<image>`` stands for the sample's next image; each ``<region>`` for the next of
        ``regions``, rendered in pixels of the resized image when the sample is encoded
        (data/answers.py), so that crops and resizes move it along; ``<coordinates>`` likewise,
        its bare numbers for a text of another format.
      regions: in the order of their placeholders.
    """

    role: str
    text: str
    regions: tuple[Region, ...] = ()


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
      turns: conversation; a robot sample has one user turn, its bare instruction (prompt and image
        placeholders are added when it is encoded).
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

    Upper bounds where augmentation changes a text (coordinates of a crop have fewer digits); what a
    sample takes in the end is never more.

    Attributes:
      tokens: i32[n] tokens (T); slots: i32[n] vision slots (P, multiples of 64);
      targets: i32[n] supervised tokens (M); robot: i32[n] robot samples (K), 0 or 1.
    """

    tokens: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    robot: np.ndarray


class BadRecordError(ValueError):
    """A record that cannot be used (does not decode, NaN actions, ...); names file and record.

    Its scheduled slot becomes padding, counted and named, up to ``max_bad_records``.  Transient
    I/O problems are OSErrors instead: they are retried, then raised, and never change a batch.
    """


@runtime_checkable
class Source(Protocol):
    """Random access by index; thread-safe; picklable in under 1 KB (paths only)."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def lengths(self, encoder: Any) -> Lengths:
        """Lengths under a `data.encoder.SampleEncoder` (tokenizer, prompt, image sizes)."""
        ...

    def fingerprint(self) -> str:
        """sha256 of what decides the samples: files (sizes, hashes), filters, order, settings."""
        ...
