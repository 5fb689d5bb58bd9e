"""The whole policy as pure functions of a parameter dict: packed batch in, losses or actions out.

  vision tower -> packed language model -> hidden
    |- supervised positions -> next-token loss
    |- robot positions -> scale_gradient -> Q-Former (+ DINO tokens) -> DiT -> action loss

The parameter dict is {"vlm": ..., "dino": ..., "bridge": ..., "dit": ...}; a VLM alone (stage 1)
has "vlm" only, and a batch without robot samples compiles without the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from st4vla_jax.batch import VISION_BIN, ActionInputs, Batch, VlmInputs
from st4vla_jax.config import ModelConfig, Runtime
from st4vla_jax.losses import masked_squared_error, next_token_nll
from st4vla_jax.models import diffusion
from st4vla_jax.models.bridge import Bridge, scale_gradient
from st4vla_jax.models.dinov2 import DinoV2
from st4vla_jax.models.dit import DiT
from st4vla_jax.models.layers import gather_rows
from st4vla_jax.models.qwen_lm import Tap
from st4vla_jax.models.qwen_vl import QwenVL

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Paper: action 1.0, next-token 0.1."""

    action: float = 1.0
    text: float = 0.1


@struct.dataclass
class Denominators:
    """What the loss sums of one update are divided by (DESIGN.md D5).

    Counted over the whole global batch before its first microbatch, so that accumulation does not
    change the loss.

    Attributes:
      action: f32[] entries (sample, repeat, chunk step, dimension) that count.
      text: f32[] sum of the target weights.
    """

    action: Array
    text: Array

    @classmethod
    def of(cls, batch: Batch, repeats: int) -> Denominators:
        """Counts a batch's masks; never below a positive floor, so that empty losses are 0."""
        action = jnp.zeros(())
        if batch.action is not None:
            counted = batch.action.action_mask & batch.action.valid[..., None, None]
            action = jnp.sum(counted, dtype=jnp.float32) * repeats
        text = jnp.sum(batch.vlm.target_weight, dtype=jnp.float32)
        return cls(jnp.maximum(action, 1.0), jnp.where(text > 0, text, 1.0))


@struct.dataclass
class Losses:
    """The two losses and their parts, before the sum over samples.

    Attributes:
      action: f32[] share of the action loss (already divided by its denominator); 0 without one.
      text: f32[] share of the next-token loss.
      action_error: f32[B,K] mean over repeats of each sample's sum of masked squared errors.
      text_nll: f32[B,M] negative log-likelihood of every target.
    """

    action: Array
    text: Array
    action_error: Array | None
    text_nll: Array | None


@struct.dataclass
class UpdateDraws:
    """Everything random in one update, drawn for its whole global batch (DESIGN.md D5).

    Attributes:
      diffusion: noise f32[B,K,R,C,A], timesteps i32[B,K,R], drop bool[B,K,R].
      dropout_keys: key[B,K] of the Q-Former's dropout, or None in evaluation.
    """

    diffusion: diffusion.Draws
    dropout_keys: Array | None


@dataclasses.dataclass(frozen=True)
class ST4VLA:
    """The policy of one config; holds no arrays, hashable, so jit can close over it."""

    cfg: ModelConfig
    rt: Runtime = Runtime()

    @property
    def vlm(self) -> QwenVL:
        return QwenVL(self.cfg, self.rt)

    @property
    def dino(self) -> DinoV2:
        return DinoV2(self.cfg.dino, self.rt)

    @property
    def bridge(self) -> Bridge:
        cfg = self.cfg
        return Bridge(cfg.bridge, cfg.text.hidden_size, cfg.dino.hidden_size, self.rt)

    @property
    def dit(self) -> DiT:
        return DiT(self.cfg.dit, self.rt)

    def init(self, key: Array, parts: Sequence[str] | None = None) -> Params:
        """Fresh parameters in `sharding.Axes` boxes (use `jax.eval_shape` for the shapes alone).

        Each part has its own key, so that stage 2 draws the same fresh parts whether or not the
        VLM was restored.

        Args:
          key: PRNG key.
          parts: which of "vlm", "dino", "bridge" and "dit"; None is all that the config has.
        """
        makers = {"vlm": self._init_vlm}
        if self.cfg.has_action:
            makers |= {"dino": self._init_dino, "bridge": self._init_bridge, "dit": self._init_dit}
        keys = {part: jax.random.fold_in(key, i) for i, part in enumerate(makers)}
        return {part: makers[part](keys[part]) for part in parts or makers}

    def draw(
        self, key: Array, batch: Batch, repeats: int, train: bool = True
    ) -> UpdateDraws | None:
        """Draws the update's randomness from its key, one key for each robot slot.

        A slot's draws depend on the key and the slot's number alone, so that mesh, process count
        and accumulation do not change them.  ``train=False`` turns both dropouts off.
        """
        if batch.action is None:
            return None
        cfg, keys = self.cfg.dit, diffusion.sample_keys(key, *batch.action.valid.shape)
        split = jax.vmap(jax.vmap(lambda k: jax.random.split(k, 2)))(keys)
        drop_rate = cfg.condition_dropout if train else 0.0
        draws = diffusion.training_draws(
            split[..., 0], repeats, cfg.chunk, cfg.action_dim, cfg.diffusion_steps, drop_rate
        )
        return UpdateDraws(draws, split[..., 1] if train else None)

    def loss(
        self,
        params: Params,
        batch: Batch,
        draws: UpdateDraws | None,
        denominators: Denominators,
        weights: LossWeights = LossWeights(),
        probe: Array | float = 0.0,
        text_probe: Array | float = 0.0,
    ) -> tuple[Array, Losses]:
        """Weighted sum of both losses, and their parts.

        Args:
          params: the plain parameter dict.
          batch: a batch or one microbatch of it.
          draws: from `draw`, for the same samples; None if the batch has no robot samples.
          denominators: of the whole update (`Denominators.of`).
          weights: factors of the two losses.
          probe: zero; its gradient is the bridge gradient's sum of squares before the decay.
          text_probe: zero; its gradient is that of the next-token loss's gradient into the
            hidden states.
        """
        dropout_keys = None if draws is None else draws.dropout_keys
        hidden, condition = self.encode(params, batch, probe, dropout_keys)
        action, action_error = jnp.zeros(()), None
        if condition is not None:
            action_error = self.action_error(params, batch.action, condition, draws.diffusion)
            repeats = draws.diffusion.timesteps.shape[-1]
            action = jnp.sum(action_error) * repeats / denominators.action
        text, text_nll = jnp.zeros(()), None
        if batch.vlm.targets.shape[1]:
            predicting = scale_gradient(hidden, 1.0, jnp.asarray(text_probe, jnp.float32))
            text_nll = self.text_nll(params, batch.vlm, predicting)
            text = jnp.sum(text_nll * batch.vlm.target_weight) / denominators.text
        total = weights.action * action + weights.text * text
        return total, Losses(action, text, action_error, text_nll)

    def encode(
        self,
        params: Params,
        batch: Batch,
        probe: Array | float = 0.0,
        dropout_keys: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """One forward of the VLM with the bridge riding along.

        Returns:
          hidden [B,T,D] after the final norm, and the condition tokens [B,K,Q,D'] of the robot
          samples (zero for unused slots), or None without robot samples.
        """
        vlm = {"params": params["vlm"]}
        if batch.action is None:
            return self.vlm.apply(vlm, batch.vlm).hidden, None
        tap = self.bridge_tap(params, batch.action, jnp.asarray(probe, jnp.float32), dropout_keys)
        out = self.vlm.apply(vlm, batch.vlm, tap=tap)
        valid = batch.action.valid[..., None, None]
        return out.hidden, jnp.where(valid, out.carry, 0)

    def sample_actions(
        self,
        params: Params,
        batch: Batch,
        noise: Array,
        cfg_scale: float = 1.5,
        num_steps: int = 10,
    ) -> Array:
        """Denoises action chunks with DDIM and classifier-free guidance.

        Args:
          params: the plain parameter dict.
          batch: robot samples; their ``actions`` are not read.
          noise: f32[B,K,C,A] start of the sampler.
          cfg_scale: guidance scale; 1 samples without guidance.
          num_steps: DDIM steps (static); one of the counts that the index rule reaches.

        Returns:
          f32[B,K,C,A] normalised actions, not clipped.
        """
        _, condition = self.encode(params, batch)
        return self.denoise(params, condition, noise[None], cfg_scale, num_steps)[0]

    def denoise(
        self,
        params: Params,
        condition: Array,
        noise: Array,
        cfg_scale: float = 1.5,
        num_steps: int = 10,
    ) -> Array:
        """DDIM from S noises f32[S,B,K,C,A], one after another: memory does not grow with S.

        Args:
          params: the plain parameter dict.
          condition: [B,K,Q,D'] from `encode`.
          noise: f32[S,B,K,C,A].
          cfg_scale: guidance scale; 1 samples without guidance.
          num_steps: DDIM steps (static).
        """
        dit = functools.partial(self.dit.apply, {"params": params["dit"]})
        eps_fn = diffusion.guided(
            functools.partial(dit, method="denoise"),
            dit(condition, method="embed_condition"),
            dit(dit(method="unconditional"), method="embed_condition"),
            cfg_scale,
        )
        steps = self.cfg.dit.diffusion_steps
        return jax.lax.map(lambda x: diffusion.ddim_sample(eps_fn, x, num_steps, steps), noise)

    def text_nll(self, params: Params, vlm: VlmInputs, hidden: Array) -> Array:
        """Negative log-likelihood f32[B,M] of every target; ``hidden`` [B,T,D] from `encode`."""
        table = self.vlm.apply({"params": params["vlm"]}, method=QwenVL.head_table)
        rows = gather_rows(hidden, vlm.target_index)
        return next_token_nll(
            rows, table, vlm.targets, tile=self.rt.vocab_tile, rules=self.rt.rules
        )

    def bridge_tap(
        self, params: Params, action: ActionInputs, probe: Array, dropout_keys: Array | None
    ) -> Tap:
        """The Q-Former riding along the decoder; its final carry is the condition [B,K,Q,D']."""
        cfg, bridge = self.cfg.bridge, self.bridge.bind({"params": params["bridge"]})
        batch, samples, views = action.dino_images.shape[:3]
        images = action.dino_images.reshape(-1, *action.dino_images.shape[3:])
        dino = self.dino.apply({"params": params["dino"]}, images)
        per_view = dino.shape[1]
        dino = dino.reshape(batch, samples, views * per_view, dino.shape[-1])
        context = bridge.encode(dino, action.state)
        mask = bridge.key_mask(action.token_mask, jnp.repeat(action.view_mask, per_view, axis=-1))

        def read_layer(query, x, hidden):
            block, layer = x
            tokens = gather_rows(hidden, action.token_index)
            tokens = scale_gradient(tokens, cfg.gradient_scale, probe)
            return bridge.block(block, query, tokens, context, mask, dropout_keys, layer)

        xs = (params["bridge"]["blocks"], jnp.arange(cfg.num_layers))
        queries = bridge.queries((batch, samples))
        return Tap(cfg.start_layer, cfg.end_layer, xs, queries, read_layer)

    def action_error(
        self, params: Params, action: ActionInputs, condition: Array, draws: diffusion.Draws
    ) -> Array:
        """f32[B,K]: masked squared error of the predicted noise, averaged over the repeats."""
        repeats = draws.timesteps.shape[-1]
        # What an unused slot holds must not reach the DiT: 0 x NaN is NaN in its gradients.
        actions = jnp.where(action.valid[..., None, None], action.actions, 0)[:, :, None]
        steps = self.cfg.dit.diffusion_steps
        noisy = diffusion.q_sample(actions, draws.noise, draws.timesteps, steps)
        repeated = jnp.repeat(condition[:, :, None], repeats, axis=2)
        dit = {"params": params["dit"]}
        predicted = self.dit.apply(dit, noisy, draws.timesteps, repeated, draws.drop)
        counted = action.action_mask & action.valid[..., None, None]
        error = masked_squared_error(predicted, draws.noise, counted[:, :, None])
        return jnp.sum(error, axis=(2, 3, 4)) / repeats

    def _init_vlm(self, key: Array) -> Params:
        return self.vlm.init(key, example_vlm_inputs(self.cfg))["params"]

    def _init_dino(self, key: Array) -> Params:
        side = self.cfg.dino.image_size
        return self.dino.init(key, jnp.zeros((1, side, side, 3), jnp.uint8))["params"]

    def _init_bridge(self, key: Array) -> Params:
        cfg = self.cfg
        hidden = jnp.zeros((cfg.bridge.num_layers, 1, 1, cfg.text.hidden_size))
        dino = jnp.zeros((1, cfg.dino.tokens_per_view, cfg.dino.hidden_size))
        state = jnp.zeros((1, cfg.bridge.state_dim)) if cfg.bridge.state_dim else None
        mask = jnp.ones((1, 1), bool), jnp.ones((1, cfg.dino.tokens_per_view), bool)
        return self.bridge.init(key, hidden, dino, state, *mask)["params"]

    def _init_dit(self, key: Array) -> Params:
        cfg = self.cfg.dit
        x = jnp.zeros((1, cfg.chunk, cfg.action_dim))
        condition = jnp.zeros((1, cfg.num_condition_tokens, cfg.hidden_size))
        return self.dit.init(key, x, jnp.zeros((1,), jnp.int32), condition)["params"]


def example_vlm_inputs(cfg: ModelConfig) -> VlmInputs:
    """The smallest valid VlmInputs, for initialisation."""
    tokens = np.zeros((1, 2), np.int32)
    slots = np.zeros((1, VISION_BIN), np.int32)
    size = cfg.vision.in_channels * cfg.vision.patch_size**2
    none = np.zeros((1, 0), np.int32)
    return VlmInputs(
        tokens=tokens,
        positions=np.zeros((1, 2, 3), np.int32),
        segment_ids=tokens,
        patches=np.zeros((1, VISION_BIN, size), np.uint8),
        patch_hw=np.zeros((1, VISION_BIN, 2), np.int32),
        patch_image=slots,
        patch_window=slots,
        vision_index=tokens - 1,
        target_index=none,
        targets=none,
        target_weight=none.astype(np.float32),
        target_group=none,
    )
