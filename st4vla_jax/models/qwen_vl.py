"""Qwen2.5-VL: image features take the places of image tokens in the packed decoder.

Source: HF Qwen2_5_VLForConditionalGeneration.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from st4vla_jax.batch import VlmInputs
from st4vla_jax.config import ModelConfig, Runtime
from st4vla_jax.models.kv_cache import KVCache
from st4vla_jax.models.layers import Embed, gather_rows
from st4vla_jax.models.qwen_lm import LanguageModel, LmOutput, Tap
from st4vla_jax.models.qwen_vision import VisionTower

Array = jax.Array


class QwenVL(nn.Module):
    """The VLM; its parameters {visual, language_model, lm_head if untied} are params["vlm"].

    `init` creates all of them; its inputs need at least one vision bin.
    """

    cfg: ModelConfig
    rt: Runtime

    def setup(self):
        text = self.cfg.text
        self.visual = VisionTower(self.cfg.vision, self.rt)
        self.language_model = LanguageModel(text, self.rt)
        if not text.tie_word_embeddings:
            self.lm_head = Embed(
                text.vocab_size, text.hidden_size, param_dtype=self.rt.dtypes.params
            )

    def inputs_embeds(self, vlm: VlmInputs) -> Array:
        """Embeddings [B,T,D]; an image token (vision_index >= 0) becomes its image feature."""
        embeds = self.language_model.embed(vlm.tokens)
        if vlm.patches.shape[1] == 0:
            if self.is_initializing():
                raise ValueError("QwenVL.init needs inputs with at least one bin of vision slots")
            return embeds
        with jax.named_scope("visual"):
            features = self.visual(
                vlm.patches, vlm.patch_hw, vlm.patch_image, vlm.patch_window
            )  # fmt: skip
        picked = gather_rows(features, jnp.maximum(vlm.vision_index, 0)).astype(embeds.dtype)
        return jnp.where((vlm.vision_index >= 0)[..., None], picked, embeds)

    def __call__(
        self, vlm: VlmInputs, tap: Tap | None = None, cache: KVCache | None = None
    ) -> LmOutput:
        """Hidden states [B,T,D] after the final norm, with the tap's carry and the cache."""
        embeds = self.inputs_embeds(vlm)
        if self.is_initializing():
            self.head_table()
        return self.language_model(embeds, vlm.positions, vlm.segment_ids, tap=tap, cache=cache)

    def next_token(
        self, tokens: Array, positions: Array, segment_ids: Array, cache: KVCache
    ) -> LmOutput:
        """Continues cached rows by text: tokens, segment_ids i32[B,T], positions i32[B,T,3]."""
        embeds = self.language_model.embed(tokens)
        return self.language_model(embeds, positions, segment_ids, cache=cache)

    def head_table(self) -> Array:
        """The output head [V,D], in the parameters' dtype: the embeddings if tied."""
        tied = self.cfg.text.tie_word_embeddings
        return self.language_model.embed_tokens() if tied else self.lm_head()

    def logits(self, hidden: Array) -> Array:
        """f32[...,V] from hidden states [...,D] after the final norm."""
        table = self.head_table().astype(self.rt.dtypes.compute)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
