"""What the columns of a robot data set mean, as data: cameras, language, action and state recipes.

A `RobotSpec` is JSON-able: a new robot is a config, never a source edit.  `RobotSpec.standardize`
brings an episode to one vocabulary: for Open-X f32[7] = delta xyz (m), delta roll-pitch-yaw (rad),
gripper absolute with 1 = open, 0 = closed (spec data.md section 5).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from st4vla_jax.data.normalize import ActionSpec, StatisticsError
from st4vla_jax.data.primitives import (
    LANGUAGE_ENCODINGS,
    OPERATIONS,
    decode_instruction,
    unpack_zlib,
)
from st4vla_jax.data.source import BadRecordError

ENCODINGS = ("plain", "zlib_f32")
# Octo's words; "pos_*" is an end-effector pose, all with the gripper last.
STATE_ENCODINGS = ("other", "pos_euler", "pos_quat", "joint")


class SpecError(ValueError):
    """A robot spec that contradicts itself or the data; lists every problem by its key."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive dimensions of an action or state: ``ops(column[dims] * scale + offset)``.

    Attributes:
      column: path below a step, "/"-joined; None for constants.
      dims: [start, stop) of the flattened column, None = its end; negative counts from the end.
      encoding: one of ENCODINGS.
      scale, offset: to this project's units, before ``ops``.
      ops: names of primitives, applied in order: binarize, rel2abs, invert, clip (to 0..1),
        relabel (difference to the next step; drops the episode's last step), quaternion_to_euler.
      constant: values of these dimensions if there is no column.
    """

    column: str | None = None
    dims: tuple[int | None, int | None] = (None, None)
    encoding: str = "plain"
    scale: float = 1.0
    offset: float = 0.0
    ops: tuple[str, ...] = ()
    constant: tuple[float, ...] = ()

    def problems(self, key: str) -> list[str]:
        """What is wrong with it, each named by ``key``."""
        found = [
            f"{key}.ops: unknown {name!r}{nearest(name, OPERATIONS)}"
            for name in self.ops
            if name not in OPERATIONS
        ]
        if (self.column is None) == (not self.constant):
            found.append(f"{key}: needs either a column or a constant")
        if self.encoding not in ENCODINGS:
            found.append(f"{key}.encoding: {self.encoding!r} is not one of {', '.join(ENCODINGS)}")
        if len(self.dims) != 2 or not all(isinstance(i, int | None) for i in self.dims):
            found.append(f"{key}.dims: expected [start, stop] of integers or null, got {self.dims}")
        if not all(isinstance(x, int | float) for x in (self.scale, self.offset, *self.constant)):
            found.append(f"{key}: scale, offset and constant must be numbers")
        return found

    def values(self, columns: Mapping[str, np.ndarray], steps: slice) -> np.ndarray:
        """f32[T',d] of the steps kept; one row less where it relabels."""
        if self.column is None:
            rows = len(next(iter(columns.values()))[steps])
            return np.tile(np.array(self.constant, np.float32), (rows, 1))
        column = columns[self.column][steps]
        try:
            if self.encoding == "zlib_f32":
                column = unpack_zlib(column)
            flat = np.asarray(column).astype(np.float32).reshape(len(column), -1)
        except ValueError as e:
            raise BadRecordError(f"column {self.column}: {e}") from e
        values = flat[:, slice(*self.dims)]
        if (self.scale, self.offset) != (1, 0):
            values = values * np.float32(self.scale) + np.float32(self.offset)
        for name in self.ops:
            values = OPERATIONS[name](values)
        if not (finite := np.isfinite(values).all(axis=1)).all():
            bad = (np.flatnonzero(~finite)[:10] + (steps.start or 0)).tolist()
            raise BadRecordError(f"column {self.column}: not finite at steps {bad}")
        return values


@dataclasses.dataclass(frozen=True)
class StandardEpisode:
    """An episode after standardisation, in raw (not normalised) units.

    Attributes:
      actions: f32[T',A]; state: f32[T',S] proprioception, or None.
      steps: i64[T'] the original step number of each row.
    """

    actions: np.ndarray
    state: np.ndarray | None
    steps: np.ndarray


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """One robot data set.

    Attributes:
      name: of the data set.
      embodiment: key of the normalisation statistics; data sets that share it share them.
      images: view ("primary", "secondary", "wrist", ...) -> column path, in view order.
      language: column path of the instruction; language_encoding: one of LANGUAGE_ENCODINGS.
      action, state: recipes; no state = no proprioception.
      state_encoding: what ``state`` holds, one of STATE_ENCODINGS; for readers only.
      names, units: of each action dimension.
      control_hz: actions a second.
      gripper: binary action dimensions, 1 = open, which the statistics' mask excludes.
      absolute: dimensions whose resting value is the last one and not 0 (padding of chunks).
      mode: normalisation, one of normalize.MODES.
      skip_first: steps dropped at the start of each episode.
      swap: two views that change places in half of the steps (droid's exterior cameras); ().
    """

    name: str
    embodiment: str
    images: Mapping[str, str]
    language: str
    action: tuple[Part, ...]
    state: tuple[Part, ...] = ()
    state_encoding: str = "other"
    language_encoding: str = "text"
    names: tuple[str, ...] = ActionSpec.names
    units: tuple[str, ...] = ActionSpec.units
    control_hz: float = ActionSpec.control_hz
    gripper: tuple[int, ...] = ActionSpec.gripper
    absolute: tuple[int, ...] = ActionSpec.gripper
    mode: str = ActionSpec.mode
    skip_first: int = 0
    swap: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            problem
            for field, parts in (("action", self.action), ("state", self.state))
            for i, part in enumerate(parts)
            for problem in part.problems(f"{field}[{i}]")
        ]
        texts = {"name": self.name, "embodiment": self.embodiment, "language": self.language}
        problems += [
            f"{key}: expected text, got {value!r}"
            for key, value in texts.items()
            if not isinstance(value, str) or not value
        ]
        for key, known in (
            ("language_encoding", LANGUAGE_ENCODINGS),
            ("state_encoding", STATE_ENCODINGS),
        ):
            if (value := getattr(self, key)) not in known:
                problems.append(f"{key}: {value!r} is not one of {', '.join(known)}")
        if not any(part.column for part in self.action):
            problems.append("action: no part reads a column")
        if not all(0 <= i < len(self.names) for i in self.absolute):
            problems.append(f"absolute: {self.absolute} is outside 0..{len(self.names) - 1}")
        if not isinstance(self.skip_first, int) or self.skip_first < 0:
            problems.append(f"skip_first: expected a count, got {self.skip_first!r}")
        if self.swap and (len(set(self.swap)) != 2 or not set(self.swap) <= set(self.images)):
            problems.append(f"swap: {self.swap} must be two of the views {', '.join(self.images)}")
        try:
            _ = self.action_spec
        except (StatisticsError, TypeError) as e:
            problems.append(str(e))
        if problems:
            raise SpecError(f"robot spec {self.name!r}:\n  " + "\n  ".join(problems))

    @property
    def action_spec(self) -> ActionSpec:
        """What travels with checkpoints."""
        return ActionSpec(self.names, self.units, self.control_hz, self.gripper, self.mode)

    @property
    def columns(self) -> tuple[str, ...]:
        """Paths of the low-dimensional columns that `standardize` reads."""
        paths = (part.column for part in (*self.action, *self.state) if part.column is not None)
        return tuple(dict.fromkeys(paths))

    @property
    def skip_last(self) -> int:
        """Steps dropped at the end of each episode: one if a part relabels."""
        return int(any("relabel" in part.ops for part in (*self.action, *self.state)))

    def partner(self, view: str) -> str:
        """The view that ``view`` changes places with: itself, but for `swap`."""
        return dict(zip(self.swap, self.swap[::-1], strict=True)).get(view, view)

    def instruction(self, value: Any) -> str:
        """Text of one step's language column; see `decode_instruction`."""
        return decode_instruction(value, self.language_encoding)

    def standardize(self, columns: Mapping[str, np.ndarray]) -> StandardEpisode:
        """One episode's columns to actions and state.

        Args:
          columns: path -> [T,...] for each of `columns`; zlib-packed ones object[T] of bytes.

        Raises:
          SpecError: a column is missing, or the recipe gives another number of dimensions.
          BadRecordError: the episode is too short, or a value is not finite or not readable.
        """
        if missing := [path for path in self.columns if path not in columns]:
            raise SpecError(
                f"robot spec {self.name!r} reads columns {', '.join(missing)}; there are "
                f"{', '.join(columns) or 'none'}"
            )
        columns = {path: columns[path] for path in self.columns}
        lengths = {path: len(column) for path, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise BadRecordError(f"columns of different lengths: {lengths}")
        length = lengths[self.columns[0]]
        steps = np.arange(self.skip_first, length - self.skip_last)
        if not len(steps):
            need = self.skip_first + self.skip_last + 1
            raise BadRecordError(f"episode of {length} steps; {self.name} needs at least {need}")
        actions = self._vector(self.action, columns, len(steps))
        if actions.shape[1] != len(self.names):
            raise SpecError(
                f"robot spec {self.name!r}: the action recipe gives {actions.shape[1]} dimensions "
                f"for {len(self.names)} names"
            )
        state = self._vector(self.state, columns, len(steps)) if self.state else None
        return StandardEpisode(actions, state, steps)

    def _vector(
        self, parts: Sequence[Part], columns: Mapping[str, np.ndarray], rows: int
    ) -> np.ndarray:
        kept = slice(self.skip_first, None)
        return np.concatenate([part.values(columns, kept)[:rows] for part in parts], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; inverse of `from_dict`."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, tree: Any) -> RobotSpec:
        """Reads a spec from parsed JSON; fields with defaults may be left out.

        Raises:
          SpecError: unknown or missing keys, or values of the wrong kind; lists all.
        """
        problems: list[str] = []
        tree = dict(_fields(cls, tree, "robot spec", problems))
        for key in ("action", "state"):
            parts = tree.get(key, ())
            if not isinstance(parts, list | tuple):
                problems.append(f"{key}: expected a list of parts, got {parts!r}")
                parts = ()
            parts = [_fields(Part, p, f"{key}[{i}]", problems) for i, p in enumerate(parts)]
            if not problems:
                tree[key] = tuple(Part(**part) for part in parts)
        if not isinstance(images := tree.get("images", {}), dict) or not images:
            problems.append(f"images: expected an object of view: column, got {images!r}")
        if problems:
            raise SpecError(f"robot spec {tree.get('name', '')!r}:\n  " + "\n  ".join(problems))
        return cls(**tree)


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _fields(cls: type, tree: Any, key: str, problems: list[str]) -> dict[str, Any]:
    """Keyword arguments of a dataclass, lists as tuples; unknown and missing keys are problems."""
    if not isinstance(tree, dict):
        problems.append(f"{key}: expected an object, got {tree!r}")
        return {}
    known = {field.name: field for field in dataclasses.fields(cls)}
    problems += [
        f"{key}: unknown key {name!r}{nearest(name, known)}" for name in tree if name not in known
    ]
    problems += [
        f"{key}: missing {name!r}"
        for name, field in known.items()
        if field.default is dataclasses.MISSING and name not in tree
    ]
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()
    }
