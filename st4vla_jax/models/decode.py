"""Text generation: one prefill, then one token a step in a while loop that ends early."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from st4vla_jax.batch import VlmInputs
from st4vla_jax.models.kv_cache import KVCache, init_cache
from st4vla_jax.models.layers import Params, gather_rows
from st4vla_jax.models.qwen_vl import QwenVL

Array = jax.Array


@struct.dataclass
class GenerateOutput:
    """Generated text.

    Attributes:
      tokens: i32[B,max_new_tokens]; row b's answer is its first ``lengths[b]`` tokens, 0 after.
      lengths: i32[B] tokens of each answer, its stop token included if there was one.
    """

    tokens: Array
    lengths: Array


@struct.dataclass
class _State:
    """The loop's carry: ``step`` tokens of each row are chosen, the last one not yet fed."""

    step: Array
    tokens: Array
    lengths: Array
    alive: Array
    position: Array
    cache: KVCache


def generate(
    model: QwenVL,
    params: Params,
    vlm: VlmInputs,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
) -> GenerateOutput:
    """Continues each row's prompt; jit it with the model and the keyword options static.

    Args:
      model: the VLM.
      params: its parameters, params["vlm"].
      vlm: prompts, one segment a row, left-aligned, padded on the right with segment id 0; a row
        of padding only yields length 0.  Prompts of one padded shape share one compilation.
      max_new_tokens: most tokens of an answer.
      stop_ids: tokens that end an answer.
      temperature: 0 takes the likeliest token; otherwise divides the logits before sampling.
      top_p: samples from the fewest likeliest tokens whose probabilities reach it.
      key: PRNG key, needed for sampling; a row's draws depend on its index, not on other rows.

    Raises:
      ValueError: lists every option out of range.
    """
    _check_options(model, max_new_tokens, stop_ids, temperature, top_p, key)
    batch, length = vlm.tokens.shape
    variables = {"params": params}
    valid = vlm.segment_ids > 0
    last = jnp.max(jnp.where(valid, jnp.arange(length), 0), axis=1, keepdims=True)
    segment = gather_rows(vlm.segment_ids, last)

    def choose(hidden, step):
        logits = model.apply(variables, hidden, method="logits")
        return sample(logits, _row_keys(key, step, batch), temperature, top_p)

    def record(state, token):
        token = jnp.where(state.alive, token, 0)
        return state.replace(
            step=state.step + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
            lengths=state.lengths + state.alive,
            alive=state.alive & ~jnp.isin(token, jnp.array(stop_ids, jnp.int32)),
        )

    def body(state):
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        positions = jnp.broadcast_to(state.position[:, None, None], (batch, 1, 3))
        out = model.apply(
            variables, token, positions, segment, state.cache, method="next_token"
        )  # fmt: skip
        state = state.replace(cache=out.cache, position=state.position + 1)
        return record(state, choose(out.hidden[:, 0], state.step))

    # The last token is never fed, so it needs no slot.
    cache = init_cache(model.cfg.text, model.rt, batch, length + max_new_tokens - 1)
    prefill = model.apply(variables, vlm, cache=cache)
    state = _State(
        step=jnp.int32(0),
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        alive=jnp.any(valid, axis=1),
        position=1 + jnp.max(jnp.where(valid[..., None], vlm.positions, -1), axis=(1, 2)),
        cache=prefill.cache,
    )
    state = record(state, choose(gather_rows(prefill.hidden, last)[:, 0], 0))
    state = jax.lax.while_loop(
        lambda s: (s.step < max_new_tokens) & jnp.any(s.alive), body, state
    )  # fmt: skip
    return GenerateOutput(state.tokens, state.lengths)


def sample(logits: Array, keys: Array | None, temperature: float, top_p: float) -> Array:
    """One token i32[B] from each row of logits f32[B,V]; options as in `generate`.

    ``keys`` holds one PRNG key for each row; it is not used at temperature 0.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # A token stays if those before it have not reached top_p: nothing is before the first.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _row_keys(key: Array | None, step: Array | int, batch: int) -> Array | None:
    if key is None:
        return None
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(batch))


def _check_options(model, max_new_tokens, stop_ids, temperature, top_p, key):
    vocab = model.cfg.text.vocab_size
    checks = {
        f"max_new_tokens {max_new_tokens} must be at least 1": max_new_tokens < 1,
        f"temperature {temperature} must be finite and not negative": (
            not math.isfinite(temperature) or temperature < 0
        ),
        f"top_p {top_p} must be in (0, 1]": not 0 < top_p <= 1,
        f"temperature {temperature} samples and needs a key": temperature > 0 and key is None,
        f"stop_ids {stop_ids} are not all in the vocabulary of {vocab}": (
            any(not 0 <= i < vocab for i in stop_ids)
        ),
    }
    problems = [text for text, bad in checks.items() if bad]
    if problems:
        raise ValueError("generate:\n  " + "\n  ".join(problems))
