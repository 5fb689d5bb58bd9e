"""Normalisation statistics and the action spec: one normaliser for training and serving.

File format: upstream's dataset_statistics.json (spec upstream.md 2.6).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MOMENTS = ("mean", "std", "max", "min", "q01", "q99")
GRIPPER_THRESHOLD = 0.5

_LARGEST = float(np.finfo(np.float32).max)  # normalised values are f32
# The two moments that a mode maps to -1 and 1.
_BOUNDS = {"q99": ("q01", "q99"), "min_max": ("min", "max")}
MODES = (*_BOUNDS, "mean_std")


class StatisticsError(ValueError):
    """Statistics that are missing or unusable; lists every problem by its key."""


@dataclasses.dataclass(frozen=True)
class FieldStatistics:
    """Statistics of one vector: an action, or proprioception.

    Attributes:
      mean, std, max, min, q01, q99: f64[D].
      mask: bool[D] True = continuous; False = binary (gripper), never scaled.
    """

    mean: np.ndarray
    std: np.ndarray
    max: np.ndarray
    min: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    mask: np.ndarray

    def _scaling(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """Offset f64[D] and scale f64[D] of y = (x - offset) / scale."""
        if mode not in MODES:
            raise StatisticsError(f"normalisation mode {mode!r}: there are {', '.join(MODES)}")
        if mode == "mean_std":
            return self.mean, self.std
        low, high = (getattr(self, name) for name in _BOUNDS[mode])
        return (low + high) / 2, (high - low) / 2

    def _check(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        if values.shape[-1:] != self.mask.shape:
            raise StatisticsError(
                f"values of shape {values.shape} for statistics of {len(self.mask)} dimensions"
            )
        return values

    def normalize(self, values: np.ndarray, mode: str) -> np.ndarray:
        """Raw units to the model's; modes as upstream (spec upstream.md 4.3).

        q99 clamps to [-1, 1]; min_max and mean_std do not.  A dimension that never varied passes
        unchanged, or is 0 under min_max.  Binary dimensions become 1 above 0.5, else 0.

        Args:
          values: [..., D].
          mode: one of MODES.

        Returns:
          f32[..., D].
        """
        values = self._check(values)
        offset, scale = self._scaling(mode)
        varies = scale > 0
        constant = np.zeros_like(values) if mode == "min_max" else values
        scaled = np.where(varies, (values - offset) / np.where(varies, scale, 1), constant)
        scaled = np.clip(scaled, -1, 1) if mode == "q99" else scaled
        binary = values > GRIPPER_THRESHOLD
        return np.where(self.mask, scaled, binary).astype(np.float32)

    def unnormalize(self, values: np.ndarray, mode: str) -> np.ndarray:
        """Inverse of `normalize` wherever that did not clamp; a constant dimension comes back.

        Binary dimensions become 0 below 0.5, else 1.

        differs: upstream always uses q01 and q99, clips to [-1, 1] in every mode and takes index 6
        for the gripper (spec upstream.md 6, defect 17); here the mode decides, mean_std is not
        clipped, and the mask says which dimensions are binary.

        Args:
          values: [..., D], the model's output.
          mode: the mode that the model was trained with.

        Returns:
          f32[..., D] in raw units.
        """
        values = self._check(values)
        offset, scale = self._scaling(mode)
        bounded = values if mode == "mean_std" else np.clip(values, -1, 1)
        binary = values >= GRIPPER_THRESHOLD
        return np.where(self.mask, bounded * scale + offset, binary).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class EmbodimentStatistics:
    """Statistics of one embodiment; ``state`` is None where the data had no proprioception."""

    action: FieldStatistics
    state: FieldStatistics | None
    num_transitions: int
    num_trajectories: int


class Statistics(Mapping[str, EmbodimentStatistics]):
    """Statistics by embodiment; an unknown key names those there are."""

    def __init__(self, entries: Mapping[str, EmbodimentStatistics]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, embodiment: str) -> EmbodimentStatistics:
        if embodiment not in self._entries:
            raise StatisticsError(
                f"no statistics for embodiment {embodiment!r}; there are "
                f"{', '.join(sorted(self._entries)) or 'none'}"
            )
        return self._entries[embodiment]

    def __contains__(self, embodiment: object) -> bool:
        return embodiment in self._entries  # Mapping's own would expect a KeyError

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @classmethod
    def from_dict(cls, tree: Any, name: str = "statistics") -> Statistics:
        """Reads upstream's schema.

        Args:
          tree: parsed JSON.
          name: what error messages call it.

        Raises:
          StatisticsError: every missing, misshapen, non-finite or contradictory list, by key.
        """
        if not isinstance(tree, dict) or not tree:
            raise StatisticsError(f"{name}: expected an object of embodiments, got {_kind(tree)}")
        problems: list[str] = []
        entries = {key: _embodiment(value, key, problems) for key, value in tree.items()}
        if problems:
            raise StatisticsError(f"{name}:\n  " + "\n  ".join(problems))
        return cls(entries)

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`: upstream's schema, JSON types only."""
        return {
            key: {
                "action": _lists(entry.action, (*MOMENTS, "mask")),
                **({"state": _lists(entry.state, MOMENTS)} if entry.state else {}),
                "num_transitions": entry.num_transitions,
                "num_trajectories": entry.num_trajectories,
            }
            for key, entry in self._entries.items()
        }

    @classmethod
    def load(cls, path: Path | str) -> Statistics:
        """Reads dataset_statistics.json; errors as `from_dict`, or not JSON."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as e:
            raise StatisticsError(f"{path}: not JSON ({e})") from e
        return cls.from_dict(tree, str(path))

    def save(self, path: Path | str) -> None:
        """Writes dataset_statistics.json."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        Path(path).write_text(text, encoding="utf-8")


def _lists(field: FieldStatistics, names: tuple[str, ...]) -> dict[str, list]:
    return {name: getattr(field, name).tolist() for name in names}


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]


def _embodiment(tree: Any, key: str, problems: list[str]) -> EmbodimentStatistics | None:
    if not isinstance(tree, dict):
        problems.append(f"{key}: expected an object, got {_kind(tree)}")
        return None
    action = _field(tree.get("action"), f"{key}.action", True, problems)
    # An embodiment without proprioception may have no state, or an empty one.
    state = tree.get("state")
    state = _field(state, f"{key}.state", False, problems) if state else None
    counts = []
    for name in ("num_transitions", "num_trajectories"):
        count = tree.get(name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            problems.append(f"{key}.{name}: expected a count, got {_kind(count)}")
        counts.append(count)
    return EmbodimentStatistics(action, state, *counts)


def _field(tree: Any, key: str, masked: bool, problems: list[str]) -> FieldStatistics | None:
    """Reads one field; problems are appended, and the result is unusable if there were any."""
    if not isinstance(tree, dict):
        problems.append(f"{key}: expected an object, got {_kind(tree)}")
        return None
    before = len(problems)
    lists: dict[str, np.ndarray] = {}
    for name in MOMENTS:
        if (array := _numbers(tree.get(name), f"{key}.{name}", problems)) is not None:
            lists[name] = array
    mask = tree.get("mask") if masked else [True] * len(lists.get("mean", ()))
    if isinstance(mask, list) and mask and all(isinstance(entry, bool) for entry in mask):
        lists["mask"] = np.array(mask)
    elif len(problems) == before:
        problems.append(f"{key}.mask: expected a list of true and false, got {_kind(mask)}")
    if len(problems) > before:
        return None
    sizes = {name: len(values) for name, values in lists.items()}
    if len(set(sizes.values())) > 1:
        problems.append(f"{key}: lists of different lengths: {sizes}")
        return None
    for low, high, what in (("q01", "q99", "over q99"), ("min", "max", "over max")):
        if bad := np.flatnonzero(lists[low] > lists[high]).tolist():
            problems.append(f"{key}.{low}: {what} in dimensions {bad}")
    if bad := np.flatnonzero(lists["std"] < 0).tolist():
        problems.append(f"{key}.std: negative in dimensions {bad}")
    return FieldStatistics(**lists)


def _numbers(value: Any, key: str, problems: list[str]) -> np.ndarray | None:
    """A flat list of finite numbers, or None and a problem."""
    numeric = isinstance(value, list) and all(
        isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value
    )
    if not numeric or not value:
        problems.append(f"{key}: expected a flat list of numbers, got {_kind(value)}")
        return None
    # Compared in Python: it also holds for NaN and for integers too large for a float.
    if bad := [i for i, entry in enumerate(value) if not abs(entry) <= _LARGEST]:
        problems.append(f"{key}: not finite in dimensions {bad}")
        return None
    return np.array(value, np.float64)


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """What the numbers of one action mean; travels with checkpoints and exports.

    The default is Bridge's: end-effector deltas and an absolute gripper, 1 = open.

    Attributes:
      names, units: one for each dimension.
      control_hz: actions a second.
      gripper: binary dimensions, those that the statistics' mask excludes.
      mode: normalisation, one of MODES.
    """

    names: tuple[str, ...] = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    units: tuple[str, ...] = ("m", "m", "m", "rad", "rad", "rad", "1 = open, 0 = closed")
    control_hz: float = 5.0
    gripper: tuple[int, ...] = (6,)
    mode: str = "q99"

    def __post_init__(self) -> None:
        size = len(self.names)
        checks = {
            f"{size} names but {len(self.units)} units": size != len(self.units) or not size,
            f"control_hz {self.control_hz} is not positive": not self.control_hz > 0,
            f"gripper {self.gripper} is outside 0..{size - 1}": (
                any(not 0 <= i < size for i in self.gripper)
            ),
            f"mode {self.mode!r} is not one of {', '.join(MODES)}": self.mode not in MODES,
        }
        if problems := [text for text, bad in checks.items() if bad]:
            raise StatisticsError("action spec: " + "; ".join(problems))

    def check(self, statistics: FieldStatistics, embodiment: str) -> None:
        """Raises StatisticsError if the statistics have other dimensions or another gripper."""
        binary = tuple(np.flatnonzero(~statistics.mask).tolist())
        size = len(statistics.mask)
        if (size, binary) != (len(self.names), tuple(sorted(self.gripper))):
            raise StatisticsError(
                f"action spec with {len(self.names)} dimensions and gripper {self.gripper}, but "
                f"the statistics of {embodiment!r} have {size} and mask out {binary}"
            )
