"""Action chunks for many environments at a time, from one compiled call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from st4vla_jax.data.packing import Capacity, RobotArrays, pack
from st4vla_jax.data.transforms import Encoded
from st4vla_jax.eval.answering import rung
from st4vla_jax.policy.policy import Policy, PolicyError
from st4vla_jax.tabletop.environment import Observation


class ChunkSampler:
    """Samples one chunk for each of up to ``batch_size`` observations.

    A chunk depends on its observation and its noise alone, not on what else is in the batch (but
    for rounding).  Batches are padded, so that few shapes are compiled.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        views: Sequence[str],
        batch_size: int,
        embodiment: str | None = None,
        cfg_scale: float = 1.5,
        ddim_steps: int = 10,
    ) -> None:
        """Checks that the policy can act.

        Args:
          policy: with statistics.
          views: names of the environment's images, in the order the policy was trained with.
          batch_size: observations at a time, at most.
          embodiment: key of the statistics; None if there is one only.
          cfg_scale: guidance scale, at least 1.
          ddim_steps: denoising steps.

        Raises:
          PolicyError: no action expert, no statistics, or an unknown embodiment.
        """
        if not policy.meta.model.has_action:
            raise PolicyError("this checkpoint is a vision-language model alone: it has no actions")
        self.embodiment, self._statistics = policy.choose_embodiment(embodiment)
        self._policy, self._views, self._batch_size = policy, tuple(views), batch_size
        self._capacity: Capacity | None = None

        def sample(params, batch, noise):
            return policy.model.sample_actions(params, batch, noise, cfg_scale, ddim_steps)

        self._sample = jax.jit(sample)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(C, A)."""
        dit = self._policy.meta.model.dit
        return dit.chunk, dit.action_dim

    def __call__(self, observations: Sequence[Observation], noise: np.ndarray) -> np.ndarray:
        """Chunks f32[n,C,A] in raw units; NaN throughout where the model's are not finite.

        Args:
          observations: n of them, at most ``batch_size``.
          noise: f32[n,C,A] start of the sampler.

        Raises:
          PolicyError: a view that the environment does not give, or a state that does not fit.
        """
        rows = [[self._encode(observation)] for observation in observations]
        rows += [[]] * (self._batch_size - len(rows))
        batch = pack(rows, self._fit(rows), pad_id=self._policy.tokenizer.pad)
        padded = np.zeros((self._batch_size, 1, *noise.shape[1:]), np.float32)
        padded[: len(noise), 0] = noise
        chunks = np.asarray(self._sample(self._policy.params, batch, padded))[: len(noise), 0]
        raw = self._statistics.action.unnormalize(chunks, self._policy.meta.action.mode)
        # Thresholds and clipping would hide what is not finite.
        broken = ~np.isfinite(chunks).all(axis=(1, 2), keepdims=True)
        return np.where(broken, np.float32(np.nan), raw)

    def _encode(self, observation: Observation) -> tuple[Encoded, RobotArrays]:
        if missing := [view for view in self._views if view not in observation.images]:
            raise PolicyError(
                f"the environment has no view {', '.join(missing)}; it has "
                f"{', '.join(observation.images)}"
            )
        images = [observation.images[view] for view in self._views]
        wanted = self._policy.meta.model.bridge.state_dim
        state = observation.state if wanted else None
        state = self._policy.normalize_state(state, self._statistics)
        return self._policy.encode_observation(images, observation.instruction, state)

    def _fit(self, rows: Sequence[Any]) -> Capacity:
        """Sizes that only grow, along `rung`: one compilation for most runs."""
        fit, old = Capacity.fit(rows), self._capacity or Capacity(0, 0)
        tokens = max(rung(fit.tokens), old.tokens)
        self._capacity = Capacity(
            tokens=tokens,
            slots=max(rung(fit.slots), old.slots),
            robot=1,
            sample_tokens=tokens,
            views=len(self._views),
        )
        return self._capacity
