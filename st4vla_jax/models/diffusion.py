"""Diffusion over action chunks: schedule, training draws, DDIM and guidance, as pure functions.

Everything is float32 over tables that are built in float64 (upstream gaussian_diffusion).  The
network predicts the noise; ``steps`` is always the length of the training schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from st4vla_jax.config import DitConfig

STEPS = DitConfig.diffusion_steps

EpsFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x [...,C,A], t i32[...]) -> [...,C,A]


def make_betas(steps: int = STEPS) -> np.ndarray:
    """Squared-cosine schedule f64[steps] ("squaredcos_cap_v2", Nichol and Dhariwal 2021)."""
    kept = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999)


def make_alphas_cumprod(steps: int = STEPS) -> np.ndarray:
    """Share of the signal's variance left after each step, f64[steps]."""
    return np.cumprod(1 - make_betas(steps))


def q_sample(x0: jax.Array, noise: jax.Array, t: jax.Array, steps: int = STEPS) -> jax.Array:
    """Noisy actions sqrt(abar_t) x0 + sqrt(1 - abar_t) noise.

    Args:
      x0: f32[...,C,A]; leading axes broadcast against those of ``noise``.
      noise: f32[...,C,A] standard normal.
      t: i32[...] step of each chunk.
      steps: length of the schedule.
    """
    kept = make_alphas_cumprod(steps)
    signal = jnp.asarray(np.sqrt(kept), jnp.float32)[t][..., None, None]
    spread = jnp.asarray(np.sqrt(1 - kept), jnp.float32)[t][..., None, None]
    return signal * x0 + spread * noise


def ddim_indices(num_steps: int, steps: int = STEPS) -> tuple[int, ...]:
    """Steps of the training schedule that DDIM with ``num_steps`` visits, ascending.

    Upstream's rule: the smallest integer stride that gives exactly that many; one step is the
    middle of the schedule.

    Raises:
      ValueError: no stride gives ``num_steps``; the message lists the counts that there are.
    """
    if num_steps == 1:
        return (steps // 2,)
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == num_steps:
            return tuple(range(0, steps, stride))
    counts = sorted({1} | {len(range(0, steps, stride)) for stride in range(1, steps)})
    raise ValueError(
        f"DDIM cannot take {num_steps} of {steps} diffusion steps with a whole stride; "
        f"choose one of {', '.join(map(str, counts))}"
    )


def ddim_sample(eps_fn: EpsFn, noise: jax.Array, num_steps: int, steps: int = STEPS) -> jax.Array:
    """Deterministic DDIM (eta 0, x0 unclipped) from ``noise`` f32[...,C,A] to actions.

    ``eps_fn`` gets the original step index: upstream's first of ten steps reads pure noise as
    step 90.

    Raises:
      ValueError: see `ddim_indices`.
    """
    indices = np.asarray(ddim_indices(num_steps, steps), np.int32)
    kept = make_alphas_cumprod(steps)[indices]
    kept_next = np.concatenate([[1.0], kept[:-1]])
    # x0 = a x - b eps;  next x = c x0 + d eps
    table = [np.sqrt(1 / kept), np.sqrt(1 / kept - 1), np.sqrt(kept_next), np.sqrt(1 - kept_next)]
    coefficients = jnp.asarray(np.stack(table, axis=-1)[::-1], jnp.float32)

    def step(x, scanned):
        t, (a, b, c, d) = scanned
        eps = eps_fn(x, jnp.full(x.shape[:-2], t, jnp.int32)).astype(jnp.float32)
        return c * (a * x - b * eps) + d * eps, None

    start = noise.astype(jnp.float32)
    return jax.lax.scan(step, start, (jnp.asarray(indices[::-1]), coefficients))[0]


def guided(
    denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    condition: jax.Array,
    uncondition: jax.Array,
    scale: float,
) -> EpsFn:
    """Classifier-free guidance: eps_u + scale (eps_c - eps_u), both in one call.

    The pair lies on an axis of its own after the batch, so that a sharded batch stays in place.

    Args:
      denoise: (x [...,C,A], t i32[...], condition [...,Q,D]) -> [...,C,A].
      condition: [...,Q,D].
      uncondition: [Q,D]; not evaluated when ``scale`` is 1.
      scale: at least 1; 1 is no guidance.

    Raises:
      ValueError: ``scale`` is below 1 or not finite.
    """
    if not 1 <= scale < math.inf:
        raise ValueError(f"guidance scale {scale} must be finite and at least 1, which is off")
    if scale == 1:
        return lambda x, t: denoise(x, t, condition)
    nothing = jnp.broadcast_to(uncondition, condition.shape).astype(condition.dtype)
    pair = jnp.stack([condition, nothing], axis=-3)

    def eps_fn(x, t):
        eps = denoise(jnp.stack([x, x], axis=-3), jnp.stack([t, t], axis=-1), pair)
        with_condition, without = eps[..., 0, :, :], eps[..., 1, :, :]
        return without + scale * (with_condition - without)

    return eps_fn


@struct.dataclass
class Draws:
    """Randomness of the action loss: R draws for each robot sample.

    Attributes:
      noise: f32[B,K,R,C,A].
      timesteps: i32[B,K,R].
      drop: bool[B,K,R], True where the condition is dropped.
    """

    noise: jax.Array
    timesteps: jax.Array
    drop: jax.Array


def sample_keys(step_key: jax.Array, batch: int, samples: int) -> jax.Array:
    """One key for each robot sample of the whole global batch: [B,K].

    A sample's key depends on its place in the global batch only, not on mesh, process count or
    accumulation (DESIGN.md D5).  One ``step_key`` serves one purpose: split it first where noise
    and dropout are both drawn.
    """
    index = jnp.arange(batch * samples).reshape(batch, samples)
    return jax.vmap(jax.vmap(lambda i: jax.random.fold_in(step_key, i)))(index)


def training_draws(
    keys: jax.Array, repeats: int, chunk: int, action_dim: int, steps: int, drop_rate: float
) -> Draws:
    """Draws noise, timesteps and condition dropout for each key of `sample_keys`."""

    def one(key):
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        return Draws(
            noise=jax.random.normal(noise_key, (repeats, chunk, action_dim), jnp.float32),
            timesteps=jax.random.randint(time_key, (repeats,), 0, steps, jnp.int32),
            drop=jax.random.bernoulli(drop_key, drop_rate, (repeats,)),
        )

    return jax.vmap(jax.vmap(one))(keys)
