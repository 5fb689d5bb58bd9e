"""Projection-space similarity (PSS): do the two losses pull the VLM in the same directions?

For the last decoder layer's query projection, take the gradients of the action loss and of the
next-token loss on fixed probe batches with fixed noise, timesteps and dropout.  PSS is
``trace(P_text P_action) / min(rank_text, rank_action)``, P the orthogonal projector onto the
column space of the gradient in torch's layout (out, in): the mean squared cosine of the principal
angles, in [0, 1] (spec upstream.md 7.1).

The rank must be cut: numerically every gradient has full rank, and then PSS is 1 by construction.
The paper does not say how; here it is given under both rules of `RankRule`, and beside the value
that random subspaces of these ranks have on average, max(rank_text, rank_action) / out.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from st4vla_jax.batch import Batch
from st4vla_jax.models.layers import RMSNorm
from st4vla_jax.models.mrope import rotary_tables
from st4vla_jax.models.qwen_lm import DecoderBlock, Tap
from st4vla_jax.models.st4vla import ST4VLA, Denominators, UpdateDraws
from st4vla_jax.sharding import constrain

Array = jax.Array


class ProbeError(ValueError):
    """Probe batches or a model that PSS is not defined for; lists every problem."""


@dataclasses.dataclass(frozen=True)
class RankRule:
    """How many directions of a gradient count.

    Attributes:
      energy: the fewest singular values whose squares sum to this share (0.99 as SVCCA, which the
        paper cites).
      top: alternatively this many largest singular values, as far as they are above f32 rounding.
    """

    energy: float = 0.99
    top: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.energy < 1 or self.top < 1:
            raise ValueError(f"{self}: energy must be in (0, 1) and top at least 1")


@struct.dataclass
class QueryGradients:
    """Gradients of both losses with respect to the last layer's query kernel.

    Attributes:
      action, text: f32[D,N,H].  The action loss is taken before the gradient decay, so that a
        decay of 0 has a PSS too; neither PSS nor cosine depends on a factor.
    """

    action: Array
    text: Array


def alignment(gradients: QueryGradients, ranks: RankRule = RankRule()) -> dict[str, float]:
    """Metrics of two gradients, by linear algebra in f64 on the host; call it on process 0.

    Returns:
      align/pss (energy rule), align/pss_random (its average for random subspaces), align/pss_top
      (top-r rule), align/rank_action, align/rank_text, align/cosine, align/grad_action and
      align/grad_text (norms).  PSS and cosine are NaN if a gradient is zero or not finite.
    """
    action, text = (torch_layout(np.asarray(g)) for g in (gradients.action, gradients.text))
    norms = [float(np.linalg.norm(g)) for g in (action, text)]
    out = {"align/grad_action": norms[0], "align/grad_text": norms[1]}
    if not (np.isfinite(norms).all() and min(norms) > 0):
        names = ("pss", "pss_random", "pss_top", "rank_action", "rank_text", "cosine")
        return out | {f"align/{name}": float("nan") for name in names}
    bases, values = zip(*(column_space(g) for g in (action, text)), strict=True)
    by_energy = [energy_rank(s, ranks.energy) for s in values]
    top = [min(ranks.top, numerical_rank(s)) for s in values]
    return out | {
        "align/pss": projection_similarity(*_cut(bases, by_energy)),
        "align/pss_random": max(by_energy) / len(action),
        "align/pss_top": projection_similarity(*_cut(bases, top)),
        "align/rank_action": float(by_energy[0]),
        "align/rank_text": float(by_energy[1]),
        "align/cosine": float(np.sum(action * text) / (norms[0] * norms[1])),
    }


def torch_layout(kernel: np.ndarray) -> np.ndarray:
    """Kernel [D,N,H] as torch's nn.Linear stores it: f64[N*H,D], rows = outputs."""
    return kernel.reshape(len(kernel), -1).T.astype(np.float64)


def column_space(gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors f64[out,out] and descending singular values f64[out] of f64[out,in].

    From the eigenvectors of G G^T, which take 1.9 CPU-seconds at 2048 x 2048 where an SVD takes
    4.4.  Squaring in f64 loses values below 1e-8 of the largest, which f32 gradients do not have.
    """
    squares, basis = np.linalg.eigh(gradient @ gradient.T)
    return basis[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0))


def energy_rank(values: np.ndarray, energy: float) -> int:
    """Fewest of the descending singular ``values`` whose squares reach the share ``energy``."""
    shares = np.cumsum(np.square(values)) / np.sum(np.square(values))
    return min(int(np.searchsorted(shares, energy)) + 1, len(values))


def numerical_rank(values: np.ndarray) -> int:
    """Descending singular ``values`` above the rounding of f32 gradients (numpy's matrix_rank)."""
    return int(np.sum(values > values[0] * len(values) * np.finfo(np.float32).eps))


def projection_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """trace(P1 P2) / min(r1, r2) from orthonormal bases f64[out,r1] and f64[out,r2]."""
    overlap = np.sum(np.square(first.T @ second))
    return float(overlap / min(first.shape[1], second.shape[1]))


def _cut(bases, ranks):
    return (basis[:, :rank] for basis, rank in zip(bases, ranks, strict=True))


class Probe:
    """Computes `QueryGradients` on fixed batches with fixed draws; compiles once.

    Costs one forward of the VLM and, for each loss, a backward through its head and the last
    decoder layer only.  Call it under the mesh that the parameters are laid out on.
    """

    def __init__(
        self, model: ST4VLA, batches: Sequence[Batch], seed: int, repeats: int = 4
    ) -> None:
        """Checks model and batches.

        Args:
          model: the policy; its gradient decay is left out.
          batches: of numpy, this process's rows, all of one shape, each with robot and grounding
            samples (the paper: 64 of each kind in all).
          seed: of noise and timesteps; both dropouts are off.
          repeats: noise draws for each robot sample.

        Raises:
          ProbeError: everything that is wrong, at once.
        """
        if problems := list(_problems(model, batches)):
            raise ProbeError("PSS probe:\n  " + "\n  ".join(problems))
        bridge = dataclasses.replace(model.cfg.bridge, gradient_scale=1.0)
        undecayed = dataclasses.replace(model.cfg, bridge=bridge)
        self._model = dataclasses.replace(model, cfg=undecayed)
        self._batches, self._seed, self._repeats = list(batches), seed, repeats
        self._step = jax.jit(self._sums)

    def __call__(
        self, params: Any, to_device: Callable[[Batch], Batch] | None = None
    ) -> QueryGradients:
        """Gradients in numpy, the same on every process.

        Args:
          params: the plain parameter dict.
          to_device: makes a global batch of this process's rows; None hands them to jit as is.
        """
        parts = []
        for number, batch in enumerate(self._batches):
            placed = batch if to_device is None else to_device(batch)
            parts.append(self._step(params, placed, np.int32(number)))
        grads, counts = jax.tree.map(lambda *x: functools.reduce(operator.add, x), *parts)
        grads, counts = jax.device_get((grads, counts))
        return QueryGradients(grads.action / counts.action, grads.text / counts.text)

    def _sums(self, params, batch: Batch, number) -> tuple[QueryGradients, Denominators]:
        """Gradients of the loss sums, and what the sums are to be divided by."""
        model = self._model
        key = jax.random.fold_in(jax.random.key(self._seed), number)
        draws = model.draw(key, batch, self._repeats, train=False)
        losses, kernel = _last_layer(model, params, batch, draws)
        _, pull = jax.vjp(losses, kernel)
        one, zero = jnp.ones(()), jnp.zeros(())
        grads = QueryGradients(pull((one, zero))[0], pull((zero, one))[0])
        grads = jax.tree.map(lambda g: constrain(g, model.rt.rules, None, None, None), grads)
        return grads, Denominators.of(batch, self._repeats)


def _last_layer(
    model: ST4VLA, params: Any, batch: Batch, draws: UpdateDraws
) -> tuple[Callable[[Array], tuple[Array, Array]], Array]:
    """(kernel [D,N,H] -> sums of action and text loss), and the kernel.

    Everything up to the last decoder layer is computed outside of the function, so that its
    backward pass ends there (a gradient into the scanned stack would go through all layers).
    """
    text, rt, action = model.cfg.text, model.rt, batch.action
    last, lm = text.num_hidden_layers, params["vlm"]["language_model"]
    tap = model.bridge_tap(params, action, jnp.zeros(()), None)
    below = _below(tap, last, jnp.zeros((*batch.vlm.tokens.shape, text.hidden_size)), rt)
    query, x = model.vlm.apply({"params": params["vlm"]}, batch.vlm, tap=below).carry
    layer = jax.tree.map(lambda p: p[-1], lm["blocks"])
    rope = rotary_tables(
        batch.vlm.positions, text.head_dim, text.mrope_section, text.rope_theta
    )  # fmt: skip

    def losses(kernel):
        q_proj = layer["self_attn"]["q_proj"] | {"kernel": kernel}
        own = layer | {"self_attn": layer["self_attn"] | {"q_proj": q_proj}}
        block = DecoderBlock(text, rt, parent=None)
        y, _ = block.apply({"params": own}, x, rope, batch.vlm.segment_ids)
        norm = RMSNorm(text.hidden_size, "embed", text.rms_norm_eps, parent=None)
        hidden = norm.apply({"params": lm["norm"]}, y)
        condition = jnp.where(action.valid[..., None, None], tap.at(query, last, hidden), 0)
        error = model.action_error(params, action, condition, draws.diffusion)
        nll = model.text_nll(params, batch.vlm, hidden)
        repeats = draws.diffusion.timesteps.shape[-1]
        return jnp.sum(error) * repeats, jnp.sum(nll * batch.vlm.target_weight)

    return losses, layer["self_attn"]["q_proj"]["kernel"]


def _below(tap: Tap, last: int, zeros: Array, rt) -> Tap:
    """A tap whose carry is (the bridge's queries before the last layer, that layer's input)."""
    zeros = zeros.astype(rt.dtypes.compute)
    if tap.start >= last:  # the bridge reads nothing below
        return Tap(last - 1, last, jnp.arange(1), (tap.carry, zeros), lambda c, _, h: (c[0], h))
    xs = jax.tree.map(lambda x: x[: last - tap.start], tap.xs)
    return Tap(tap.start, last, xs, (tap.carry, zeros), lambda c, x, h: (tap.fn(c[0], x, h), h))


def _problems(model: ST4VLA, batches: Sequence[Batch]):
    if not model.cfg.has_action:
        yield "the model has no action expert"
        return
    end, layers = model.cfg.bridge.end_layer, model.cfg.text.num_hidden_layers
    if end <= layers:
        yield (
            f"bridge.end_layer is {end}: the action loss does not reach decoder layer {layers}, "
            f"the last one (it would with {layers + 1})"
        )
    if not batches:
        yield "no batches"
        return
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), b) for b in batches]
    for number, (batch, shape) in enumerate(zip(batches, shapes, strict=True)):
        if shape != shapes[0]:
            yield f"batch {number} has other shapes than batch 0: it would compile again"
        if batch.action is None:
            yield f"batch {number} has no robot samples"
        if not batch.vlm.targets.shape[1]:
            yield f"batch {number} has no next-token targets"
