"""The reference's training step in PyTorch, as its users run it: the baseline of ``bench step``.

Two padded batches a step, two forwards and backwards into one AdamW update (spec upstream.md 3.1
and 7.1).  Where the reference wastes time by accident, the baseline does not: positions come from
the host, the Q-Former's attention takes the fast path, TF32 is on for float32 products, AdamW is
fused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from st4vla_jax.bench_mixture import Packed, pad_id
from st4vla_jax.bench_torch_policy import Policy, Tensors
from st4vla_jax.config import ModelConfig
from st4vla_jax.data.image import IMAGE_MEAN, IMAGE_STD
from st4vla_jax.models.dinov2 import PIXEL_MEAN, PIXEL_STD

# --- Inputs -------------------------------------------------------------------------------------


def padded_inputs(cfg: ModelConfig, samples: list[Packed], model: nn.Module) -> Tensors:
    """Samples of one kind, padded on the left to the longest, as the reference's processor does."""
    rows = [sample for sample, _ in samples]
    length = max(len(row.tokens) for row in rows)
    ids = np.full((len(rows), length), pad_id(cfg), np.int64)
    labels = np.full_like(ids, -100)
    positions = np.ones((3, *ids.shape), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        start = length - len(row.tokens)
        image = model.config.image_token_id
        ids[i, start:] = np.where(row.vision_index >= 0, image, row.tokens)
        positions[:, i, start:] = row.positions.T
        mask[i, start:] = 1
        labels[i, start + 1 + row.target_index] = row.targets
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(positions),
        "pixel_values": torch.from_numpy(np.concatenate([_pixel_values(row) for row in rows])),
        "image_grid_thw": torch.tensor(
            [[1, 2 * h, 2 * w] for row in rows for h, w in row.slots.grids]
        ),
        "use_cache": False,
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # newer transformers
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    robots = [robot for _, robot in samples if robot is not None]
    if not robots:
        return inputs | {"labels": torch.from_numpy(labels)}
    images = np.concatenate([robot.dino_images for robot in robots]) / np.float32(255)
    pixels = (images - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return inputs | {
        "pixels": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        "actions": torch.from_numpy(np.stack([robot.actions for robot in robots])),
    }


def _pixel_values(row) -> np.ndarray:
    """f32[patches, 3*2*14*14] of a sample's images, in transformers' order of patches."""
    cells = row.slots.patches.reshape(-1, 4, 3, 196)[np.concatenate(row.slots.cells)]
    mean, std = (np.float32(x)[:, None] for x in (IMAGE_MEAN, IMAGE_STD))
    pixels = (cells.astype(np.float32) / 255 - mean) / std
    frames = np.repeat(pixels[..., None, :], 2, axis=-2)  # a still image is two equal frames
    return frames.reshape(len(cells) * 4, -1)


def padding(batch: Tensors) -> float:
    """Share of padded tokens."""
    return 1 - float(batch["attention_mask"].float().mean())


# --- The step -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What may be tried.

    Attributes:
      robot, grounding: samples of a step.
      checkpoint: gradient checkpointing of the VLM.
      idle_logits: see `Policy`.
      vision: "stock" loops over attention windows, as transformers does with SDPA; "varlen" runs
        them in one call of torch's variable-length flash attention (GPU only).
      repeats: noise draws a robot sample.
    """

    robot: int
    grounding: int
    checkpoint: bool = False
    idle_logits: bool = True
    vision: str = "stock"
    repeats: int = 4


class TorchStep:
    """One model with its optimizer, stepped under changing options."""

    def __init__(self, cfg: ModelConfig, device: str = "cpu"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.cfg, self.device = cfg, torch.device(device)
        with self.device:
            self.policy = Policy(cfg).train()
        self.policy.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-8,
            fused=True,
        )  # fmt: skip
        self._checkpointed = False
        self.generator = torch.Generator(self.device).manual_seed(0)

    def recover(self) -> None:
        """Frees what a failed update has left behind."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def version(self) -> str:
        import transformers

        return f"torch {torch.__version__}, transformers {transformers.__version__}"

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.policy.parameters())

    def inputs(self, samples: list[Packed]) -> tuple[Tensors, Tensors]:
        """(robot batch, grounding batch) on the device."""
        kinds = ([s for s in samples if s[1] is not None], [s for s in samples if s[1] is None])
        batches = (padded_inputs(self.cfg, own, self.policy.vlm) for own in kinds)
        return tuple(
            {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            for batch in batches
        )

    def make_step(self, options: StepOptions, samples: list[Packed]) -> Callable[[], float]:
        """A step over fixed samples; it waits for the result and returns the loss."""
        robot, grounding = self.inputs(samples)
        policy = self.policy

        def step() -> float:
            self._configure(options)
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                action = policy.action_loss(robot, self._draws(options))
            action.backward()
            with self._autocast():
                text = policy.text_loss(grounding)
            (0.1 * text).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=True)
            self.optimizer.step()
            return float(action.detach() + 0.1 * text.detach())

        return step

    def _configure(self, options: StepOptions) -> None:
        policy = self.policy
        policy.idle_logits = options.idle_logits
        if options.checkpoint != self._checkpointed:
            self._checkpointed = options.checkpoint
            if options.checkpoint:
                policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                policy.vlm.gradient_checkpointing_disable()
        vision = policy.vlm.model.visual
        vision.config._attn_implementation = "sdpa" if options.vision == "stock" else VARLEN

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _draws(self, options: StepOptions) -> Tensors:
        cfg, count = self.cfg.dit, options.robot * options.repeats
        kwargs: dict[str, Any] = {"generator": self.generator, "device": self.device}
        shape = (count, cfg.chunk, cfg.action_dim)
        return {
            "noise": torch.randn(shape, **kwargs),
            "timesteps": torch.randint(0, cfg.diffusion_steps, (count,), **kwargs),
            "drop": torch.rand((count,), **kwargs) < cfg.condition_dropout,
        }


VARLEN = "flash_torch_varlen"  # "flash" in the name makes transformers hand over all windows


def _varlen(module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, **_):
    from torch.nn.attention.varlen import varlen_attn

    dtype = torch.bfloat16 if query.dtype == torch.float32 else query.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    lengths, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
    out = varlen_attn(q, k, v, lengths, lengths, longest, longest)
    return out[None].to(query.dtype), None


def register_varlen() -> None:
    """Makes VARLEN known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(VARLEN, _varlen)
