"""Rates with intervals, and paired comparisons of two checkpoints on the same seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclasses.dataclass(frozen=True)
class Rate:
    """``successes`` out of ``trials``, with its Wilson interval (Wilson 1927).

    The interval holds for 0 and for all successes too, where the normal approximation has length
    0.  Without trials the rate is NaN and the interval is [0, 1].
    """

    successes: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials:
            raise ValueError(f"{self.successes} successes out of {self.trials} trials")

    @property
    def value(self) -> float:
        return self.successes / self.trials if self.trials else math.nan

    def interval(self, z: float = Z_95) -> tuple[float, float]:
        """Wilson score interval (low, high); ``z`` is the normal quantile, 95 % by default."""
        n, p = self.trials, self.value
        if not n:
            return 0.0, 1.0
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low = 0.0 if self.successes == 0 else max(0.0, centre - half)
        high = 1.0 if self.successes == n else min(1.0, centre + half)
        return low, high

    def __str__(self) -> str:
        """As every rate is written: p [Wilson 95 %] n, e.g. "0.26 [0.22, 0.30] n=400"."""
        low, high = self.interval()
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}] n={self.trials}"


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """Two policies on the same episodes.

    Attributes:
      first, second: rate of each.
      first_only, second_only: episodes that only one of them solved.
      p_value: exact two-sided McNemar test; 1.0 if they never differ.
    """

    first: Rate
    second: Rate
    first_only: int
    second_only: int
    p_value: float


def compare(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """Compares successes of two policies, episode by episode.

    Raises:
      ValueError: sequences of different lengths: they are not of the same episodes.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} episodes cannot be paired: run both checkpoints on "
            "the same seeds"
        )
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    first_only, second_only = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    return PairedComparison(
        Rate(int(a.sum()), len(a)),
        Rate(int(b.sum()), len(b)),
        first_only,
        second_only,
        mcnemar(first_only, second_only),
    )


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the two discordant counts.

    Under equal rates each discordant pair falls to either side like a fair coin, so this is the
    binomial test with p = 1/2: twice the smaller tail, at most 1.
    """
    n, k = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``first - second`` and its 95 % percentile interval over resampled pairs.

    For scores that are not successes (IoU, errors, Frechet distances).

    Args:
      first: one number for each of n records, n at least 1.
      second: likewise, of the same records.
      resamples: drawn with replacement.
      seed: of the draws.

    Returns:
      (mean difference, low, high).

    Raises:
      ValueError: different lengths, or no pairs.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"scores of shapes {a.shape} and {b.shape} cannot be paired")
    difference, rng = a - b, np.random.default_rng(seed)
    means = [np.mean(rng.choice(difference, len(difference))) for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
