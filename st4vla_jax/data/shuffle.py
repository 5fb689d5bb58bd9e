"""Orders in which a data set is drawn: closed forms, so that any position is reached at once.

Two are needed.  `permuted` is a pseudo-random permutation of 0..n-1.  `Lattice` is the opposite of
random: a permutation any stretch of which is spread evenly over 0..n-1, with exact bounds.
"""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 6
_GOLDEN = (math.sqrt(5) - 1) / 2
_CANDIDATES = 32  # multipliers tried on each side of n / golden ratio


def mixed(*values: int | np.ndarray) -> np.ndarray:
    """u64 hash of integers, elementwise (splitmix64's finaliser over a running state)."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(v) for v in values)), np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permuted(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Pseudo-random permutations of 0..size-1, one for each key.

    A Feistel network over the next power of four, walked until it is below the size again.

    Args:
      index: i64[n], each in [0, size).
      size: i64[n] at least 1.
      key: u64[n]; equal (size, key) means the same permutation.

    Returns:
      i64[n].
    """
    half = np.zeros(len(index), np.uint64)
    while (small := (np.int64(1) << (2 * half.astype(np.int64))) < size).any():
        half += small
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    pending = np.arange(len(index))
    while len(pending):
        h, m, k = half[pending], mask[pending], key[pending]
        left, right = result[pending] >> h, result[pending] & m
        for number in range(_ROUNDS):
            left, right = right, left ^ (mixed(k, number, right) & m)
        result[pending] = (left << h) | right
        pending = pending[result[pending] >= size[pending].astype(np.uint64)]
    return result.astype(np.int64)


class Lattice:
    """Position j goes to ``j * multiplier mod size``: each of 0..size-1 once in any ``size`` steps.

    The multiplier is near size / golden ratio, so a stretch of n positions meets an interval that
    holds the share x of 0..size-1 about n * x times, whatever the stretch and the interval;
    `most` says how often exactly at worst.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.multiplier = _multiplier(size)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """i64[n] values of i64[n] positions, which may pass ``size``."""
        # Both factors are below size, so the product fits into 64 bits up to 3e9 samples.
        return positions % self.size * self.multiplier % self.size

    def most(self, length: int, widths: np.ndarray) -> np.ndarray:
        """Largest number of hits of any interval of each width in any stretch of positions.

        All stretches are one set of points, rotated; so the fullest arc of that set decides.

        Args:
          length: positions of the stretch.
          widths: i64[n] values that the interval holds.

        Returns:
          i64[n].
        """
        rounds, rest = divmod(length, self.size)
        points = np.sort(self(np.arange(rest)))
        twice = np.concatenate([points, points + self.size])
        arcs = [
            (np.searchsorted(twice, points + width) - np.arange(rest)).max(initial=0)
            for width in widths
        ]
        return rounds * np.asarray(widths, np.int64) + np.array(arcs, np.int64).reshape(-1)


def _multiplier(size: int) -> int:
    """The number near size * golden whose ratio to size is hardest to approximate by fractions."""
    centre = round(size * _GOLDEN)
    near = range(max(1, centre - _CANDIDATES), min(size, centre + _CANDIDATES + 1))
    coprime = [a for a in near if math.gcd(a, size) == 1]
    return min(coprime, key=lambda a: (_largest_quotient(a, size), abs(a - centre)), default=1)


def _largest_quotient(a: int, b: int) -> int:
    """Largest partial quotient of the continued fraction of a / b."""
    largest = 1
    while a:
        largest = max(largest, b // a)
        a, b = b % a, a
    return largest
