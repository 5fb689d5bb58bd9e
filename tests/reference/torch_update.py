"""The paper's update in PyTorch over padded batches: what the packed train step is compared with.

transformers' Qwen2.5-VL and the modules of the step benchmark under upstream's names; losses,
decay, clip, AdamW and schedule are torch's and transformers' own, written for masks and weights.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from convert_weights.rules import leaves_from_torch, tensors_to_torch
from convert_weights.st4vla import VLM, policy_rules
from st4vla_jax.bench_torch_policy import Policy, Tensors
from st4vla_jax.bench_torch_step import padded_inputs
from st4vla_jax.config import ModelConfig
from st4vla_jax.data.packing import RobotArrays
from st4vla_jax.models.dinov2 import PIXEL_MEAN, PIXEL_STD
from st4vla_jax.state import leaves_by_path

Tree = dict[str, np.ndarray]  # by path in our parameter dict


def torch_policy(cfg: ModelConfig, params) -> Policy:
    """The baseline with our parameters."""
    policy = Policy(cfg).eval()
    leaves = dict(leaves_by_path(params))
    state = {
        key: torch.from_numpy(np.array(value))
        for rule in policy_rules(cfg)
        for key, value in tensors_to_torch(rule, np.asarray(leaves[rule.jax]))
    }
    loaded = policy.load_state_dict(state, strict=False)
    assert loaded.missing_keys == [VLM + "lm_head.weight"]  # tied
    assert not loaded.unexpected_keys
    return policy


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the update is made of; rates by the first part of upstream's names."""

    rate_vlm: float
    rate_rest: float
    decay_vlm: float
    decay_rest: float
    warmup: int
    steps: int
    min_ratio: float
    eps: float
    clip: float = 1.0
    text_weight: float = 0.1
    gradient_scale: float = 0.5


@dataclasses.dataclass
class Outcome:
    """One update: ``metrics`` under the train step's names, trees of every parameter."""

    metrics: dict[str, float]
    grads: Tree
    first: Tree
    second: Tree
    params: Tree


class TorchUpdate:
    """One policy and its optimizer, updated on fixed samples with the draws it is given."""

    def __init__(self, cfg: ModelConfig, policy: Policy, samples, recipe: Recipe):
        self.cfg, self.policy, self.recipe = cfg, policy, recipe
        own = {"vlm": [], "rest": []}
        for name, p in policy.named_parameters():
            own["vlm" if name.startswith(VLM) else "rest"].append(p)
        groups = [
            {"params": own["vlm"], "lr": recipe.rate_vlm, "weight_decay": recipe.decay_vlm},
            {"params": own["rest"], "lr": recipe.rate_rest, "weight_decay": recipe.decay_rest},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=recipe.eps)
        self.schedule = get_cosine_with_min_lr_schedule_with_warmup(
            self.adam, recipe.warmup, recipe.steps, min_lr_rate=recipe.min_ratio
        )
        robot = [s for s in samples if s[1] is not None]
        grounding = [s for s in samples if s[1] is None]
        self.robots: list[RobotArrays] = [arrays for _, arrays in robot]
        self.robot_inputs = self._inputs(robot)
        self.grounding_inputs = self._inputs(grounding)
        self.targets, self.weights = self._targets([s for s, _ in grounding])

    def _inputs(self, samples) -> Tensors:
        """Padded token and pixel inputs of one kind; transformers finds the positions itself."""
        inputs = padded_inputs(self.cfg, samples, self.policy.vlm)
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        return {name: inputs[name] for name in (*names, "mm_token_type_ids")}

    def _targets(self, samples) -> tuple[torch.Tensor, torch.Tensor]:
        """Next token and weight [n,L] of every position, padded on the left."""
        length = self.grounding_inputs["input_ids"].shape[1]
        targets = np.zeros((len(samples), length), np.int64)
        weights = np.zeros((len(samples), length), np.float32)
        for i, sample in enumerate(samples):
            index = length - len(sample.tokens) + sample.target_index
            targets[i, index], weights[i, index] = sample.targets, sample.target_weight
        return torch.from_numpy(targets), torch.from_numpy(weights)

    # --- Losses ---------------------------------------------------------------------------------

    def text_loss(self, squares: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weighted mean cross-entropy of the grounding samples."""
        vlm = self.policy.vlm
        hidden = vlm.model(**self.grounding_inputs).last_hidden_state
        hidden.register_hook(lambda g: _add(squares, "grad/text_hidden", g))
        logits = vlm.lm_head(hidden).transpose(1, 2)
        nll = F.cross_entropy(logits, self.targets, reduction="none")
        return (nll * self.weights).sum() / self.weights.sum()

    def _dino(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected tokens [n,V*t,E] and a mask of those that stand for no view."""
        policy = self.policy
        images = np.concatenate([robot.dino_images for robot in self.robots]) / 255
        pixels = (images - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
        pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float()
        tokens = policy.dino_pro(policy.dino_encoder.body(pixels))
        views = tokens.split([len(robot.dino_images) for robot in self.robots])
        parts = nn.utils.rnn.pad_sequence([v.flatten(0, 1) for v in views], batch_first=True)
        counts = torch.tensor([v.shape[0] * v.shape[1] for v in views])
        return parts, torch.arange(parts.shape[1]) >= counts[:, None]

    def action_loss(self, draws, squares: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over the entries that count of the squared error of the predicted noise."""
        policy, cfg, scale = self.policy, self.cfg, self.recipe.gradient_scale
        out = policy.vlm.model(**self.robot_inputs, output_hidden_states=True)
        dino, no_view = self._dino()
        features = []
        for hidden in out.hidden_states[cfg.bridge.start_layer : cfg.bridge.end_layer]:
            branch = hidden.clone()  # the decoder's next layer reads `hidden` without the decay
            branch.register_hook(lambda g: _add(squares, "grad/bridge", g))
            branch.register_hook(lambda g: g * scale)
            features.append(torch.cat([branch, dino], 1))
        padded = ~self.robot_inputs["attention_mask"].bool()
        condition = policy.layer_qformer(features, torch.cat([padded, no_view], 1))
        noise, t, drop = draws  # [n,R,C,A], [n,R], [n,R]
        actions = torch.from_numpy(np.stack([robot.actions for robot in self.robots]))
        mask = torch.from_numpy(np.stack([robot.action_mask for robot in self.robots]))
        kept = _kept(cfg.dit.diffusion_steps)[t][..., None, None]
        noisy = kept.sqrt() * actions[:, None] + (1 - kept).sqrt() * noise
        repeats = t.shape[1]
        predicted = policy.action_model.net(
            noisy.flatten(0, 1).float(), t.flatten(),
            condition.repeat_interleave(repeats, 0), drop.flatten(),
        )  # fmt: skip
        errors = (predicted - noise.flatten(0, 1)).square()
        counted = mask.repeat_interleave(repeats, 0)
        return errors[counted].sum() / counted.sum()

    # --- The update -----------------------------------------------------------------------------

    def step(self, draws) -> Outcome:
        """One update from the summed gradients of both losses."""
        policy, recipe, squares = self.policy, self.recipe, {}
        rates = self.schedule.get_last_lr()
        self.adam.zero_grad(set_to_none=True)
        action = self.action_loss(draws, squares)
        text = self.text_loss(squares)
        total = action + recipe.text_weight * text
        total.backward()
        named = dict(policy.named_parameters())
        grads = self._tree({k: p.grad.clone() for k, p in named.items()})
        norm = nn.utils.clip_grad_norm_(policy.parameters(), recipe.clip)
        self.adam.step()
        self.schedule.step()
        moments = {k: self.adam.state[p] for k, p in named.items()}
        metrics = {
            "loss/action": action, "loss/text": text, "loss/total": total, "grad/norm": norm,
            "lr/vlm": rates[0], "lr/rest": rates[1],
        } | {name: value.sqrt() for name, value in squares.items()}  # fmt: skip
        return Outcome(
            {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()},
            grads,
            self._tree({k: m["exp_avg"] for k, m in moments.items()}),
            self._tree({k: m["exp_avg_sq"] for k, m in moments.items()}),
            self._tree(named),
        )

    def _tree(self, tensors: Tensors) -> Tree:
        read = {k: t.detach().numpy().copy() for k, t in tensors.items()}
        return dict(leaves_from_torch(policy_rules(self.cfg), read.__getitem__))


def _add(squares: dict[str, torch.Tensor], name: str, grad: torch.Tensor) -> None:
    squares[name] = squares.get(name, 0) + grad.square().sum()


def _kept(steps: int) -> torch.Tensor:
    """Share of the signal's variance left after each diffusion step (Nichol and Dhariwal 2021)."""
    level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    betas = torch.tensor(
        [min(1 - b / a, 0.999) for a, b in zip(level, level[1:], strict=False)],
        dtype=torch.float64,
    )
    return torch.cumprod(1 - betas, 0)
