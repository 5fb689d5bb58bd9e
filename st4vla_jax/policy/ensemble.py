"""Which action to execute next, from the chunks that a policy has predicted so far.

All work on one episode's chunks f32[C,A] in raw units, as upstream's clients do (spec upstream.md
5.5): un-normalised, binary dimensions already 0 or 1.  Averages of a binary dimension lie between;
whoever executes them decides at 0.5.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np

_EPSILON = 1e-7  # in the cosine's denominator, as upstream


class Executor(Protocol):
    """Turns chunks into actions, one control step at a time; one instance an episode.

    Before each `next`, a chunk predicted from the current observation is added if `hungry`.
    """

    @property
    def hungry(self) -> bool: ...

    def add(self, chunk: np.ndarray) -> None: ...

    def next(self) -> np.ndarray: ...


class RecedingHorizon:
    """Executes the first ``execute`` actions of a chunk, then asks for the next one."""

    def __init__(self, execute: int) -> None:
        """Raises ValueError unless ``execute`` is at least 1."""
        if execute < 1:
            raise ValueError(f"execute {execute} must be at least 1")
        self._execute, self._left = execute, deque()

    @property
    def hungry(self) -> bool:
        return not self._left

    def add(self, chunk: np.ndarray) -> None:
        """Replaces what is left.

        Raises:
          ValueError: the chunk has fewer steps than are to be executed.
        """
        if len(chunk) < self._execute:
            raise ValueError(
                f"execute {self._execute}, but the policy's chunks have {len(chunk)} steps"
            )
        self._left = deque(chunk[: self._execute])

    def next(self) -> np.ndarray:
        return self._left.popleft()


class Ensemble:
    """Averages what the last chunks say about the current step; asks for a chunk every step."""

    hungry = True

    def __init__(self, horizon: int) -> None:
        """Args: ``horizon`` is the most chunks that are averaged; raises ValueError below 1."""
        if horizon < 1:
            raise ValueError(f"horizon {horizon} must be at least 1")
        self._chunks: deque[np.ndarray] = deque(maxlen=horizon)

    def add(self, chunk: np.ndarray) -> None:
        self._chunks.append(chunk)

    def next(self) -> np.ndarray:
        """f32[A]: the weighted average; a chunk that ended before the current step has no say."""
        newest = len(self._chunks) - 1
        said = [
            chunk[newest - i] for i, chunk in enumerate(self._chunks) if newest - i < len(chunk)
        ]
        predictions = np.stack(said).astype(np.float64)
        weights = self.weights(predictions)
        return (weights @ predictions / weights.sum()).astype(np.float32)

    def weights(self, predictions: np.ndarray) -> np.ndarray:
        """Weights f64[n] of predictions f64[n,A], the oldest first; need not sum to 1."""
        raise NotImplementedError


class TemporalEnsemble(Ensemble):
    """Weights exp(-decay i), i = 0 for the OLDEST prediction (ACT, Zhao et al. 2023).

    Args:
      horizon: chunks that are averaged; ACT takes all that reach the current step.
      decay: 0.01 in ACT; larger trusts new predictions less, 0 is the plain mean.
    """

    def __init__(self, horizon: int, decay: float = 0.01) -> None:
        super().__init__(horizon)
        self._decay = decay

    def weights(self, predictions: np.ndarray) -> np.ndarray:
        return np.exp(-self._decay * np.arange(len(predictions)))


class AdaptiveEnsemble(Ensemble):
    """Weights exp(alpha cos(p_i, p_newest)) over the whole action vector (upstream, CogACT).

    Predictions that agree with the newest one count more, so that two modes are not averaged.

    Args:
      horizon: 7 for WidowX, 2 for the Google robot, 3 for LIBERO.
      alpha: 0.1 upstream; 0 is the plain mean.
    """

    def __init__(self, horizon: int = 7, alpha: float = 0.1) -> None:
        super().__init__(horizon)
        self._alpha = alpha

    def weights(self, predictions: np.ndarray) -> np.ndarray:
        newest, norms = predictions[-1], np.linalg.norm(predictions, axis=-1)
        cosines = predictions @ newest / (norms * norms[-1] + _EPSILON)
        return np.exp(self._alpha * cosines)
