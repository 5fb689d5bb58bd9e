"""The reference's policy in PyTorch under its own parameter names, for ``bench step``.

transformers' Qwen2.5-VL with SDPA and compact modules of the other parts (spec upstream.md 1 and
2), so that convert_weights maps weights either way.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from convert_weights.qwen2_5_vl import hf_config
from st4vla_jax.bench_mixture import pad_id
from st4vla_jax.config import BridgeConfig, DinoConfig, DitConfig, ModelConfig
from st4vla_jax.models.diffusion import make_alphas_cumprod

Tensors = dict[str, torch.Tensor]
NAMES = ("<|video_pad|>", "<|image_pad|>", "<|vision_end|>", "<|vision_start|>")


class SelfAttention(nn.Module):
    """timm's attention: one fused qkv, scaled_dot_product_attention."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, size = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(batch, length, size))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, size: int, hidden: int, gelu: str):
        super().__init__()
        self.gelu = gelu
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class LayerScale(nn.Module):
    """x * gamma."""

    def __init__(self, size: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class DinoBlock(nn.Module):
    """A block of torch.hub's DINOv2."""

    def __init__(self, cfg: DinoConfig):
        super().__init__()
        size = cfg.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(size, cfg.norm_eps) for _ in range(2))
        self.attn, self.mlp = SelfAttention(size, cfg.num_heads), Mlp(size, cfg.mlp_size, "none")
        self.ls1, self.ls2 = LayerScale(size), LayerScale(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, cfg: DinoConfig):
        super().__init__()
        side = cfg.patch_size
        self.proj = nn.Conv2d(3, cfg.hidden_size, side, side)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Dino(nn.Module):
    """torch.hub's DINOv2: normed patch tokens."""

    def __init__(self, cfg: DinoConfig):
        super().__init__()
        size, grid = cfg.hidden_size, cfg.pretrain_size // cfg.patch_size
        self.grid, self.target = grid, cfg.image_size // cfg.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + grid * grid, size))
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(DinoBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(size, cfg.norm_eps)

    def positions(self) -> torch.Tensor:
        if self.grid == self.target:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().reshape(1, self.grid, self.grid, -1)
        factor = (self.target + 0.1) / self.grid
        grid = F.interpolate(
            grid.permute(0, 3, 1, 2), scale_factor=(factor, factor), mode="bicubic"
        )
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions()
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


class QFormerBlock(nn.Module):
    """query += attn(norm1(query), keys); query += dropout(mlp(norm2(query)))."""

    def __init__(self, cfg: BridgeConfig):
        super().__init__()
        size, wide = cfg.hidden_size, cfg.mlp_ratio * cfg.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.cross_attn = nn.MultiheadAttention(
            size, cfg.num_heads, dropout=cfg.dropout, batch_first=True
        )
        self.mlp = nn.Sequential(
            nn.Linear(size, wide), nn.GELU(), nn.Linear(wide, size), nn.Dropout(cfg.dropout)
        )

    def forward(self, query: torch.Tensor, keys: torch.Tensor, padded: torch.Tensor | None):
        normed = self.norm1(query)
        attended, _ = self.cross_attn(
            normed, keys, keys, key_padding_mask=padded, need_weights=False
        )
        query = query + attended
        return query + self.mlp(self.norm2(query))


class QFormer(nn.Module):
    """Layer-wise Q-Former; one block reads one hidden state."""

    def __init__(self, cfg: BridgeConfig, vlm_size: int):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(cfg.num_queries, cfg.hidden_size))
        self.proj = nn.Linear(vlm_size, cfg.hidden_size)
        self.layers = nn.ModuleList(QFormerBlock(cfg) for _ in range(cfg.num_layers))

    def forward(self, features: list[torch.Tensor], padded: torch.Tensor | None) -> torch.Tensor:
        query = self.query_tokens.expand(len(features[0]), -1, -1)
        for layer, feature in zip(self.layers, features, strict=True):
            query = layer(query, self.proj(feature), padded)
        return query


class DitBlock(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)); norms without parameters."""

    def __init__(self, cfg: DitConfig):
        super().__init__()
        size, self.eps = cfg.hidden_size, cfg.norm_eps
        self.attn = SelfAttention(size, cfg.num_heads)
        self.mlp = Mlp(size, cfg.mlp_ratio * size, "tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape[-1:]
        x = x + self.attn(F.layer_norm(x, shape, eps=self.eps))
        return x + self.mlp(F.layer_norm(x, shape, eps=self.eps))


class Wrapped(nn.Module):
    """Gives one linear map the reference's extra name level."""

    def __init__(self, num_in: int, num_out: int):
        super().__init__()
        self.linear = nn.Linear(num_in, num_out)


class TimestepEmbedder(nn.Module):
    """mlp(sinusoids), cosines first."""

    def __init__(self, cfg: DitConfig):
        super().__init__()
        self.half = cfg.frequency_size // 2
        self.mlp = nn.Sequential(
            nn.Linear(cfg.frequency_size, cfg.hidden_size), nn.SiLU(),
            nn.Linear(cfg.hidden_size, cfg.hidden_size),
        )  # fmt: skip

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(self.half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-np.log(10_000) / self.half * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class DiT(nn.Module):
    """Noise prediction for action chunks, condition tokens in front."""

    def __init__(self, cfg: DitConfig):
        super().__init__()
        size, self.cfg = cfg.hidden_size, cfg
        tokens = cfg.num_condition_tokens + cfg.chunk
        self.positional_embedding = nn.Parameter(size**-0.5 * torch.randn(tokens, size))
        self.x_embedder, self.t_embedder = Wrapped(cfg.action_dim, size), TimestepEmbedder(cfg)
        self.z_embedder = Wrapped(size, size)
        self.z_embedder.uncondition = nn.Parameter(
            0.02 * torch.randn(cfg.num_condition_tokens, size)
        )
        self.blocks = nn.ModuleList(DitBlock(cfg) for _ in range(cfg.depth))
        self.final_layer = Wrapped(size, cfg.action_dim)

    def forward(self, x, t, condition, drop) -> torch.Tensor:
        condition = torch.where(drop[:, None, None], self.z_embedder.uncondition, condition)
        condition = self.z_embedder.linear(condition) + self.t_embedder(t)[:, None]
        tokens = torch.cat([condition, self.x_embedder.linear(x)], 1) + self.positional_embedding
        for block in self.blocks:
            tokens = block(tokens)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=self.cfg.norm_eps)
        return self.final_layer.linear(tokens)[:, self.cfg.num_condition_tokens :]


class Policy(nn.Module):
    """The reference's whole policy under its parameter names.

    Attributes:
      cfg: sizes.
      action_dtype: what the DiT computes in (spec upstream.md 1.9: float32).
      idle_logits: the robot forward makes logits of every token, as the reference's does.
    """

    def __init__(self, cfg: ModelConfig, idle_logits: bool = True):
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        super().__init__()
        self.cfg, self.idle_logits = cfg, idle_logits
        first = pad_id(cfg) + 1
        ids = {name: first + i for i, name in enumerate(NAMES)}
        no_text_ids = {"bos_token_id": None, "eos_token_id": None}
        config = Qwen2_5_VLConfig(**hf_config(cfg.vision, cfg.text, ids), **no_text_ids)
        config._attn_implementation = "sdpa"
        self.qwen_vl_interface = nn.Module()
        self.qwen_vl_interface.model = Qwen2_5_VLForConditionalGeneration(config).float()
        self.layer_qformer = QFormer(cfg.bridge, cfg.text.hidden_size)
        self.action_model = nn.Module()
        self.action_model.net = DiT(cfg.dit)
        self.dino_encoder = nn.Module()
        self.dino_encoder.body = Dino(cfg.dino)
        self.dino_pro = nn.Linear(cfg.dino.hidden_size, cfg.text.hidden_size)
        keep = make_alphas_cumprod(cfg.dit.diffusion_steps)
        for name, table in (("signal", np.sqrt(keep)), ("spread", np.sqrt(1 - keep))):
            values = torch.tensor(table, dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    @property
    def vlm(self) -> nn.Module:
        return self.qwen_vl_interface.model

    def condition(self, vlm: Tensors, pixels: torch.Tensor) -> torch.Tensor:
        """Condition tokens [n,Q,D] of robot samples."""
        cfg = self.cfg.bridge
        kept = {} if self.idle_logits else {"logits_to_keep": 1}
        out = self.vlm(**vlm, **kept, output_hidden_states=True)
        dino = self.dino_pro(self.dino_encoder.body(pixels))
        features = []
        for hidden in out.hidden_states[cfg.start_layer : cfg.end_layer]:
            if hidden.requires_grad:
                hidden.register_hook(lambda g: g * cfg.gradient_scale)
            features.append(torch.cat([hidden.to(dino.dtype), dino], 1))
        padded = ~vlm["attention_mask"].bool()
        if not padded.any():
            return self.layer_qformer(features, None)
        return self.layer_qformer(features, F.pad(padded, (0, dino.shape[1])))

    def action_loss(self, batch: Tensors, draws: Tensors) -> torch.Tensor:
        """Mean squared error of the predicted noise, over R draws a sample."""
        vlm = {k: v for k, v in batch.items() if k not in ("pixels", "actions")}
        condition = self.condition(vlm, batch["pixels"])
        repeats, t = len(draws["noise"]) // len(condition), draws["timesteps"]
        actions = batch["actions"].repeat_interleave(repeats, 0)
        with torch.autocast(condition.device.type, enabled=False):  # the reference: float32
            condition = condition.float().repeat_interleave(repeats, 0)
            noisy = self.signal[t][:, None, None] * actions
            noisy = noisy + self.spread[t][:, None, None] * draws["noise"]
            predicted = self.action_model.net(noisy, t, condition, draws["drop"])
            return F.mse_loss(predicted, draws["noise"])

    def text_loss(self, batch: Tensors) -> torch.Tensor:
        """The next-token loss of transformers itself."""
        return self.vlm(**batch).loss
