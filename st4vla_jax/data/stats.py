"""Normalisation statistics of standardised episodes: streaming, and mergeable without error.

An accumulator's result depends on the rows alone, never on their order or on how they were split:
``merge(A, B)`` gives the same bits as one pass over both.  Sums are kept as integers for each
exponent, so mean and standard deviation are those of exact arithmetic.  Quantiles (linear between
order statistics, as NumPy's) are exact up to EXACT_ROWS rows; above that, order statistics are
counted in buckets of floats that share their leading 21 bits and lose the rest, less than 2**-12
(0.025 %) of a normal float.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from st4vla_jax.data.normalize import EmbodimentStatistics, FieldStatistics, StatisticsError
from st4vla_jax.data.robot_spec import RobotSpec, StandardEpisode

# Bounds of `foreign_statistics`.
_OUTSIDE = 0.1  # share of values
_NARROW = 0.02  # of the spread: a wrong unit such as millimetres, not a calm first episode

EXACT_ROWS = 2**22  # 16 MiB a dimension, as much as the buckets take

_FOLD_ROWS = 2**16  # rows gathered before they are added up
_DROPPED = 11  # trailing bits of a float that share a bucket
_BUCKETS = 2 ** (32 - _DROPPED)
_SIGN = 1 << 31
_EXPONENTS = 256
_HALF = 24  # bits of a mantissa, and of half its square


class FieldAccumulator:
    """Rows of one vector (action or state), summed up."""

    def __init__(self, size: int, exact_rows: int = EXACT_ROWS) -> None:
        """Args: size: dimensions; exact_rows: rows up to which quantiles are exact."""
        self.size = size
        self.rows = 0
        self._exact_rows = exact_rows
        self._pending: list[np.ndarray] = []
        self._waiting = 0  # rows of them
        self._values: list[np.ndarray] | None = []
        self._buckets: np.ndarray | None = None  # i64[D, _BUCKETS], instead of values
        # Of signed mantissas, and of the high and low halves of their squares.
        self._sums = np.zeros((3, size, _EXPONENTS), np.int64)
        self._min = np.full(size, np.inf, np.float32)
        self._max = np.full(size, -np.inf, np.float32)

    def update(self, rows: np.ndarray) -> None:
        """Adds f32[n,D]; raises StatisticsError for other shapes and values that are not finite."""
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise StatisticsError(f"rows of shape {rows.shape} for {self.size} dimensions")
        # + 0 copies, and makes -0 the same as 0.
        rows = rows.astype(np.float32) + np.float32(0)
        if not np.isfinite(rows).all():
            raise StatisticsError("values that are not finite")
        self._pending.append(rows)
        self._waiting += len(rows)
        self.rows += len(rows)
        if self._waiting >= _FOLD_ROWS:
            self._fold()

    def merge(self, other: FieldAccumulator) -> None:
        """Adds the rows of another accumulator, which stays as it is."""
        if (self.size, self._exact_rows) != (other.size, other._exact_rows):
            raise StatisticsError(
                f"cannot merge {other.size} dimensions ({other._exact_rows} rows exact) into "
                f"{self.size} ({self._exact_rows})"
            )
        self._fold()
        other._fold()
        self.rows += other.rows
        self._sums += other._sums
        self._min = np.minimum(self._min, other._min)
        self._max = np.maximum(self._max, other._max)
        if other._values is None:
            self._count([])
            self._buckets += other._buckets
        else:
            self._keep(other._values)

    def result(self, mask: Sequence[bool] | np.ndarray) -> FieldStatistics:
        """Statistics of all rows; raises StatisticsError if there are none.

        Args:
          mask: bool[D] True = continuous.
        """
        if not self.rows:
            raise StatisticsError("statistics of no rows")
        self._fold()
        moments = np.array([self._moments(dim) for dim in range(self.size)])
        q01, q99 = (
            np.array([self._quantile(dim, percent) for dim in range(self.size)])
            for percent in (1, 99)
        )
        low, high = self._min.astype(np.float64), self._max.astype(np.float64)
        return FieldStatistics(
            moments[:, 0], moments[:, 1], high, low, q01, q99, np.array(mask, bool)
        )

    def _fold(self) -> None:
        """Adds up pending rows."""
        if not self._waiting:
            return
        rows = np.concatenate(self._pending)
        self._pending, self._waiting = [], 0
        self._min = np.minimum(self._min, rows.min(axis=0))
        self._max = np.maximum(self._max, rows.max(axis=0))
        bits = rows.view(np.uint32).astype(np.int64)
        exponent = (bits >> 23) & 0xFF
        mantissa = (bits & 0x7FFFFF) | ((exponent > 0).astype(np.int64) << 23)
        square = mantissa * mantissa
        signed = np.where(bits >> 31, -mantissa, mantissa)
        cell = (exponent + _EXPONENTS * np.arange(self.size)).ravel()
        for i, term in enumerate((signed, square >> _HALF, square & ((1 << _HALF) - 1))):
            # bincount adds in f64: below 2**53 that is exact.
            total = np.bincount(cell, term.ravel(), self.size * _EXPONENTS)
            self._sums[i] += total.astype(np.int64).reshape(self.size, _EXPONENTS)
        self._keep([rows])

    def _keep(self, values: list[np.ndarray]) -> None:
        if self._values is not None and self.rows <= self._exact_rows:
            self._values += values
        else:
            self._count(values)

    def _count(self, values: list[np.ndarray]) -> None:
        """Moves to buckets if that has not happened, and adds values to them."""
        if self._values is not None:
            values = self._values + values
            self._values = None
            self._buckets = np.zeros((self.size, _BUCKETS), np.int64)
        for rows in values:
            bits = rows.view(np.uint32)
            # In the order of the floats: negative ones backwards, before the others.
            ordered = np.where(bits >> 31, ~bits, bits | np.uint32(_SIGN)) >> _DROPPED
            for dim in range(self.size):
                self._buckets[dim] += np.bincount(ordered[:, dim], minlength=_BUCKETS)

    def _moments(self, dim: int) -> tuple[float, float]:
        """Mean and standard deviation, rounded once."""
        sums = [[int(cell) for cell in self._sums[i, dim]] for i in range(3)]
        # A float is mantissa * 2**(max(exponent, 1) - 150): shifts are in units of 2**-149.
        shifts = [max(exponent, 1) - 1 for exponent in range(_EXPONENTS)]
        total = sum(s << shift for s, shift in zip(sums[0], shifts, strict=True))
        squares = sum(
            ((high << _HALF) + low) << (2 * shift)
            for high, low, shift in zip(sums[1], sums[2], shifts, strict=True)
        )
        mean = Fraction(total, self.rows << 149)
        variance = Fraction(squares, self.rows << 298) - mean * mean
        return float(mean), math.sqrt(variance)

    def _quantile(self, dim: int, percent: int) -> float:
        whole, rest = divmod(percent * (self.rows - 1), 100)
        ranks = [whole, min(whole + 1, self.rows - 1)]
        if self._values is not None:
            column = np.concatenate([values[:, dim] for values in self._values])
            below, above = np.partition(column, ranks)[ranks].astype(np.float64)
        else:
            bucket = np.searchsorted(np.cumsum(self._buckets[dim]), ranks, side="right")
            # The bucket's float nearest to 0: exact for 0, 1 and other short numbers.
            ordered = bucket.astype(np.uint32) << _DROPPED
            last = np.uint32((1 << _DROPPED) - 1)
            bits = np.where(ordered >> 31, ordered ^ np.uint32(_SIGN), ~(ordered | last))
            bounded = np.clip(bits.view(np.float32), self._min[dim], self._max[dim])
            below, above = bounded.astype(np.float64)
        return float(below + (above - below) * (rest / 100))


class EmbodimentAccumulator:
    """Episodes of one embodiment, possibly from several data sets."""

    def __init__(self, spec: RobotSpec, exact_rows: int = EXACT_ROWS) -> None:
        """Args: spec: of (one of) the data sets; exact_rows: see `FieldAccumulator`."""
        self.spec = spec
        self.trajectories = 0
        self._exact_rows = exact_rows
        self._action = FieldAccumulator(len(spec.names), exact_rows)
        self._state: FieldAccumulator | None = None

    def update(self, episode: StandardEpisode) -> None:
        """Adds an episode; raises StatisticsError if its state comes and goes or changes size."""
        self._match(None if episode.state is None else episode.state.shape[1])
        self._action.update(episode.actions)
        if episode.state is not None:
            self._state.update(episode.state)
        self.trajectories += 1

    def merge(self, other: EmbodimentAccumulator) -> None:
        """Adds another's episodes.

        Raises:
          StatisticsError: what the two call an action differs, or their states do.
        """
        ours, theirs = ((a.spec.names, a.spec.gripper, a.spec.mode) for a in (self, other))
        if ours != theirs:
            raise StatisticsError(
                f"{other.spec.name} and {self.spec.name} share the embodiment "
                f"{self.spec.embodiment!r}, but their actions differ ({theirs} against {ours}); "
                "give one of them an embodiment of its own"
            )
        if other.trajectories:
            self._match(None if other._state is None else other._state.size)
            self._action.merge(other._action)
            if other._state is not None:
                self._state.merge(other._state)
            self.trajectories += other.trajectories

    def _match(self, size: int | None) -> None:
        """Checks the dimensions of a state (None = no state); the first episode's decide."""
        if not self.trajectories and size is not None:
            self._state = FieldAccumulator(size, self._exact_rows)
        ours = None if self._state is None else self._state.size
        if ours != size:
            raise StatisticsError(
                f"{self.spec.embodiment}: states of {ours} and of {size} dimensions; give data "
                "sets with different states embodiments of their own"
            )

    def result(self) -> EmbodimentStatistics:
        """Statistics of all episodes; raises StatisticsError if there are none."""
        size = len(self.spec.names)
        action = self._action.result(~np.isin(np.arange(size), self.spec.gripper))
        state = None
        if self._state is not None:
            state = self._state.result(np.ones(self._state.size, bool))
        return EmbodimentStatistics(action, state, self._action.rows, self.trajectories)


def accumulate(spec: RobotSpec, episodes: Iterable[StandardEpisode]) -> EmbodimentAccumulator:
    """One pass over a data set's standardised episodes."""
    accumulator = EmbodimentAccumulator(spec)
    for episode in episodes:
        accumulator.update(episode)
    return accumulator


def foreign_statistics(
    name: str, episodes: Iterable[StandardEpisode], entry: EmbodimentStatistics
) -> str | None:
    """Why statistics cannot be of these episodes, or None.

    Those of the data itself hold every value between min and max, and vary as it varies.  A new
    share of the same robot's data leaves these bounds a little; other data or other units do by
    far.

    Args:
      name: of the data set.
      episodes: some of it.
      entry: statistics of its embodiment.
    """
    actions = np.concatenate([episode.actions for episode in episodes], dtype=np.float64)
    field = entry.action
    if actions.shape[1] != len(field.mask):
        return None  # told by the encoder
    scaled = field.mask & (field.std > 0)
    outside = (actions < field.min) | (actions > field.max)
    share = outside[:, scaled].mean() if scaled.any() else 0.0
    ratio = np.median(actions.std(axis=0)[scaled] / field.std[scaled]) if scaled.any() else 1.0
    if share <= _OUTSIDE and ratio >= _NARROW:
        return None
    return (
        f"{name}: the statistics are of other data: {share:.0%} of its first {len(actions)} steps' "
        f"values lie outside of min..max, and their spread is {ratio:.3g} of the statistics'; "
        "compute them anew with python -m st4vla_jax.compute_stats"
    )
