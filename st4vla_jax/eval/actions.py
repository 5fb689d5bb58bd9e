"""Held-out scores: sampled action chunks beside their baselines, and the next-token loss.

Everything is in normalised units and over the entries that the masks count.  A batch is scored on
the devices into sums (`ActionSums`, `TextSums`); sums add up over batches, and since a batch is
global, over processes too.

The energy score of S sampled chunks x_i and the true chunk y (Gneiting and Raftery 2007) is
``mean |x_i - y| - sum_ij |x_i - x_j| / (2 S (S - 1))``, here in its unbiased form; lower is better,
and a policy that always says the same scores its distance.  |.| is the Euclidean norm over a
chunk's counted entries for ``energy`` and the absolute value of one entry for ``crps``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from st4vla_jax.batch import ActionInputs, Batch, VlmInputs
from st4vla_jax.eval.statistics import Z_95
from st4vla_jax.losses import group_sums, masked_squared_error
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.sharding import constrain

Array = jax.Array


class HeldOutError(ValueError):
    """Held-out batches or options that cannot be scored; lists every problem."""


@struct.dataclass
class ActionSums:
    """Sums over robot samples; averages are over entries, or over chunks for ``energy``.

    Attributes:
      count: f[C,A] entries that count.
      error: f[C,A] squared error of the mean of the sampled chunks.
      mean_error, zero_error: f[C,A] squared error of the training chunks' mean and of zero.
      crps: f[C,A] energy score of each entry by itself.
      chunks: f[] chunks with at least one counted entry.
      energy: f[] energy score of whole chunks; mean_energy, zero_energy: f[] of the baselines.
      gain, gain_squares: f[] sums of each chunk's error under ``mean_error`` less that under
        ``error``, both averaged over its entries, and of its square.
    """

    count: Array
    error: Array
    mean_error: Array
    zero_error: Array
    crps: Array
    chunks: Array
    energy: Array
    mean_energy: Array
    zero_energy: Array
    gain: Array
    gain_squares: Array

    def __add__(self, other: ActionSums) -> ActionSums:
        """Sums of both, in f64 numpy."""
        return jax.tree.map(_add, self, other)

    def metrics(self, dim_names: Sequence[str]) -> dict[str, float]:
        """Flat metrics; an average over nothing is left out.

        Args:
          dim_names: of the A action dimensions.

        Returns:
          eval/action_mse, its baselines _mean_baseline and _zero_baseline, eval/energy with the
          same two, eval/crps; eval/action_mse and eval/crps also by step (/h0 ...) and dimension.
          eval/action_gain with _low and _high: by how much a chunk's error is below the mean
          baseline's, and its 95 % interval over chunks (too narrow where chunks are of the same
          episodes).
        """
        out = {
            "eval/action_mse": _ratio(self.error.sum(), self.count.sum()),
            "eval/action_mse_mean_baseline": _ratio(self.mean_error.sum(), self.count.sum()),
            "eval/action_mse_zero_baseline": _ratio(self.zero_error.sum(), self.count.sum()),
            "eval/energy": _ratio(self.energy, self.chunks),
            "eval/energy_mean_baseline": _ratio(self.mean_energy, self.chunks),
            "eval/energy_zero_baseline": _ratio(self.zero_energy, self.chunks),
            "eval/crps": _ratio(self.crps.sum(), self.count.sum()),
        }
        if self.chunks > 1:
            mean = self.gain / self.chunks
            variance = (self.gain_squares / self.chunks - mean**2) / (self.chunks - 1)
            half = Z_95 * np.sqrt(max(variance, 0.0))
            out |= {"eval/action_gain": mean, "eval/action_gain_low": mean - half,
                    "eval/action_gain_high": mean + half}  # fmt: skip
        names = [f"h{t}" for t in range(len(self.count))], dim_names
        for axis, entries in zip((1, 0), names, strict=True):
            counts = self.count.sum(axis)
            for what, sums in (("action_mse", self.error), ("crps", self.crps)):
                for name, total, count in zip(entries, sums.sum(axis), counts, strict=True):
                    out[f"eval/{what}/{name}"] = _ratio(total, count)
        return {name: float(value) for name, value in out.items() if value is not None}


@struct.dataclass
class TextSums:
    """Sums by target group: ``nll`` f[G] of weight x negative log-likelihood, ``weight`` f[G]."""

    nll: Array
    weight: Array

    def __add__(self, other: TextSums) -> TextSums:
        """Sums of both, in f64 numpy."""
        return jax.tree.map(_add, self, other)

    def metrics(self, group_names: Sequence[str]) -> dict[str, float]:
        """eval/text_loss and eval/text_loss/{group}, in nat; groups without targets are left out.

        Args:
          group_names: of the G target groups; "" has no metric of its own.
        """
        out = {"eval/text_loss": _ratio(self.nll.sum(), self.weight.sum())}
        for name, nll, weight in zip(group_names, self.nll, self.weight, strict=True):
            if name:
                out[f"eval/text_loss/{name}"] = _ratio(nll, weight)
        return {name: float(value) for name, value in out.items() if value is not None}


def action_sums(chunks: Array, action: ActionInputs, horizon_mean: Array) -> ActionSums:
    """Scores S sampled chunks of every robot sample, in f32.

    Args:
      chunks: f32[S,B,K,C,A] sampled, S at least 2.
      action: the true chunks and their masks.
      horizon_mean: f32[C,A] mean of the training chunks at each step (`mean_chunk`).
    """
    samples = len(chunks)
    counted = action.action_mask & action.valid[..., None, None]
    actions = jnp.where(counted, action.actions, 0)

    def distances(x):
        """Sums over the sampled chunks of |x_i - x|: by entry [B,K,C,A] and by chunk [B,K]."""
        difference = jnp.where(counted, chunks - x, 0)
        return jnp.sum(jnp.abs(difference), axis=0), jnp.sum(_norm(difference), axis=0)

    # One chunk against all at a time: all pairs at once would take S times the memory.
    spread = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(distances, chunks))
    pairs = 2 * samples * (samples - 1)
    crps, energy = (
        far / samples - between / pairs
        for far, between in zip(distances(actions), spread, strict=True)
    )
    error = masked_squared_error(jnp.mean(chunks, axis=0), actions, counted)
    from_mean = jnp.where(counted, actions - horizon_mean, 0)
    entries = jnp.maximum(jnp.sum(counted, axis=(-2, -1)), 1)
    gain = jnp.sum(jnp.square(from_mean) - error, axis=(-2, -1)) / entries
    by_entry = functools.partial(jnp.sum, axis=(0, 1), dtype=jnp.float32)
    return ActionSums(
        count=by_entry(counted),
        error=by_entry(error),
        mean_error=by_entry(jnp.square(from_mean)),
        zero_error=by_entry(jnp.square(actions)),
        crps=by_entry(crps),
        chunks=jnp.sum(jnp.any(counted, axis=(-2, -1)), dtype=jnp.float32),
        energy=jnp.sum(energy),
        mean_energy=jnp.sum(_norm(from_mean)),
        zero_energy=jnp.sum(_norm(actions)),
        gain=jnp.sum(gain),
        gain_squares=jnp.sum(jnp.square(gain)),
    )


def text_scores(nll: Array, vlm: VlmInputs, num_groups: int) -> TextSums:
    """Sums f32[G] of the next-token loss by target group; ``nll`` f32[B,M]."""
    return TextSums(*group_sums(nll, vlm.target_weight, vlm.target_group, num_groups))


def mean_chunk(batches: Iterable[Batch]) -> np.ndarray:
    """Mean f32[C,A] of the valid chunks of host batches, by entry; 0 where nothing counts.

    Raises:
      HeldOutError: no batch, or batches without robot samples.
    """
    total = count = None
    for batch in batches:
        if batch.action is None:
            raise HeldOutError("the mean chunk needs batches with robot samples")
        counted = batch.action.action_mask & batch.action.valid[..., None, None]
        kept = np.where(counted, batch.action.actions, 0).astype(np.float64)
        total = _add(0 if total is None else total, kept.sum((0, 1)))
        count = _add(0 if count is None else count, counted.sum((0, 1)))
    if total is None:
        raise HeldOutError("the mean chunk needs at least one batch")
    return (total / np.maximum(count, 1)).astype(np.float32)


class HeldOut:
    """Scores parameters on fixed held-out batches with fixed noise; compiles once.

    Call it under the mesh of `jax.set_mesh` that the parameters are laid out on.  Its results are
    sums over the global batches, the same on every mesh and process.
    """

    def __init__(
        self,
        model: ST4VLA,
        batches: Sequence[Batch],
        horizon_mean: np.ndarray | None,
        dim_names: Sequence[str],
        seed: int,
        samples: int = 32,
        group_names: Sequence[str] = ("",),
    ) -> None:
        """Checks the batches.

        Args:
          model: the policy.
          batches: of numpy, this process's rows, all of one shape; with several processes as many
            on each.
          horizon_mean: f32[C,A] mean of the TRAINING chunks; None without robot samples.
          dim_names: of the action dimensions; empty without robot samples.
          seed: of the noise that the chunks are sampled from.
          samples: S chunks for each robot sample.
          group_names: of the target groups, by number.

        Raises:
          HeldOutError: everything that is wrong, at once.
        """
        self._model, self._batches = model, list(batches)
        self._horizon_mean, self._dim_names = horizon_mean, tuple(dim_names)
        self._seed, self._samples, self._group_names = seed, samples, tuple(group_names)
        if problems := list(self._problems()):
            raise HeldOutError("held-out evaluation:\n  " + "\n  ".join(problems))
        self._step = jax.jit(self._sums)

    def __call__(
        self, params: Any, to_device: Callable[[Batch], Batch] | None = None
    ) -> dict[str, float]:
        """Metrics by name: those of `ActionSums` and `TextSums`, as far as the batches have them.

        Args:
          params: the plain parameter dict.
          to_device: makes a global batch of this process's rows; None hands them to jit as is.
        """
        sums = []
        for number, batch in enumerate(self._batches):
            placed = batch if to_device is None else to_device(batch)
            sums.append(self._step(params, placed, np.int32(number)))
        actions, texts = zip(*jax.device_get(sums), strict=True)
        out = {}
        if actions[0] is not None:
            out |= functools.reduce(operator.add, actions).metrics(self._dim_names)
        if texts[0] is not None:
            out |= functools.reduce(operator.add, texts).metrics(self._group_names)
        return out

    def _sums(self, params, batch: Batch, number) -> tuple[ActionSums | None, TextSums | None]:
        model, rules = self._model, self._model.rt.rules
        hidden, condition = model.encode(params, batch)
        actions = texts = None
        if batch.action is not None:
            shape = (self._samples, *batch.action.actions.shape)
            key = jax.random.fold_in(jax.random.key(self._seed), number)
            noise = jax.random.normal(key, shape, jnp.float32)
            noise = constrain(noise, rules, None, "batch", None, None, None)
            chunks = model.denoise(params, condition, noise)
            actions = action_sums(chunks, batch.action, self._horizon_mean)
        if batch.vlm.targets.shape[1]:
            nll = model.text_nll(params, batch.vlm, hidden)
            texts = text_scores(nll, batch.vlm, len(self._group_names))
        # Whole on every device, so that each process can read them.
        return jax.tree.map(lambda x: constrain(x, rules, *(None,) * x.ndim), (actions, texts))

    def _problems(self):
        if not self._batches:
            yield "no batches"
            return
        if self._samples < 2:
            yield f"samples {self._samples}: the energy score needs at least 2"
        shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), b) for b in self._batches]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                yield f"batch {number} has other shapes than batch 0: it would compile again"
        highest = max((int(b.vlm.target_group.max(initial=0)) for b in self._batches), default=0)
        if highest >= len(self._group_names):
            yield f"target group {highest}, but there are {len(self._group_names)} group names"
        if self._batches[0].action is None:
            return
        size = self._batches[0].action.actions.shape[-2:]
        if np.shape(self._horizon_mean) != size:
            yield f"horizon_mean of shape {np.shape(self._horizon_mean)}, chunks are {size}"
        if len(self._dim_names) != size[1]:
            yield f"{len(self._dim_names)} dim_names for {size[1]} action dimensions"


def _norm(x):
    """Euclidean norm over a chunk: [...,C,A] -> [...]."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1)))


def _add(a, b):
    return np.asarray(a, np.float64) + np.asarray(b, np.float64)


def _ratio(total, count):
    return total / count if count > 0 else None
