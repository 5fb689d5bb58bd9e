"""What upstream's code can run of a checkpoint, and its config.yaml (spec/upstream.md 1.5-1.7, 2).

Upstream builds the model from names and fixed numbers: it has no place for other head counts, and
computes something else, without a word, where the shapes happen to fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert_weights.dinov2 import MASK_TOKEN
from convert_weights.st4vla import CUSTOM_DINO, CUSTOM_DIT, DINO, DIT, HISTORY
from st4vla_jax.checkpoint import Meta
from st4vla_jax.config import (
    DINO_PRESETS,
    DIT_PRESETS,
    OWN_PRESETS,
    DinoConfig,
    DitConfig,
    ModelConfig,
)

QUERIES = 64  # fixed in upstream's DiT
QFORMER_HEADS, QFORMER_RATIO = 8, 4
NORMALIZATION = "q99"  # what upstream's clients undo, whatever the model was trained with
# Of the action dimensions; and dropout, which acts in training only.
_FREE_DIT_FIELDS = {"chunk", "action_dim", "condition_dropout"}


def dino_name(cfg: DinoConfig) -> str | None:
    """torch.hub's name of exactly these sizes, or None."""
    letters = [n for n, preset in DINO_PRESETS.items() if preset == cfg and n not in OWN_PRESETS]
    return f"dinov2_vit{letters[0]}14" if letters else None


def dit_name(cfg: DitConfig) -> str | None:
    """Upstream's name of a DiT of these sizes, or None."""
    free = {name: getattr(cfg, name) for name in _FREE_DIT_FIELDS}
    for name, preset in DIT_PRESETS.items():
        if name not in OWN_PRESETS and dataclasses.replace(preset, **free) == cfg:
            return f"DiT-{name.upper()}"
    return None


def structural_problems(cfg: ModelConfig) -> list[str]:
    """Parts that upstream has no tensors for."""
    if not cfg.has_action:
        return ["it is a VLM alone, without bridge and DiT; use --format hf"]
    return []


def vlm_problems(cfg: ModelConfig) -> list[str]:
    """What no Qwen2.5-VL computes: transformers would load the weights and say nothing."""
    if cfg.vision.from_scratch:
        return [
            "its vision tower centres patches and adds absolute positions (vision.from_scratch); "
            "transformers' Qwen2.5-VL does not, and would give other features"
        ]
    return []


def size_problems(cfg: ModelConfig) -> list[str]:
    """Sizes that upstream's strict load refuses, or with which its code computes something else."""
    if not cfg.has_action:
        return []
    dino, bridge, dit = cfg.dino, cfg.bridge, cfg.dit
    checks = {
        f"its bridge reads proprioception (state_dim {bridge.state_dim}); upstream has no state "
        "encoder and would refuse or ignore those weights": bridge.state_dim,
        f"{bridge.num_queries} queries; upstream's DiT takes {QUERIES}": (
            bridge.num_queries != QUERIES
        ),
        f"a Q-Former of {bridge.num_heads} heads; upstream's has {QFORMER_HEADS}": (
            bridge.num_heads != QFORMER_HEADS
        ),
        f"a Q-Former with mlp_ratio {bridge.mlp_ratio}; upstream's has {QFORMER_RATIO}": (
            bridge.mlp_ratio != QFORMER_RATIO
        ),
        f"a DiT of {_sizes(dit)}; upstream has {_presets(DIT_PRESETS)}": dit_name(dit) is None,
        f"a DINOv2 of {_sizes(dino)} for images of {dino.image_size} pixels; upstream has "
        f"{_presets(DINO_PRESETS, 'g')}, and 224 pixels": dino_name(dino) is None,
        "a DINOv2 that centres patches and adds fixed positions (dino.from_scratch); upstream's "
        "does not, and would give other tokens": dino.from_scratch,
        "DINOv2 g, of width 1536; upstream's table of channels says 1408": (
            dino == DINO_PRESETS["g"]
        ),
    }
    return [text for text, bad in checks.items() if bad]


def _sizes(cfg: DinoConfig | DitConfig) -> str:
    return f"width {cfg.hidden_size}, depth {cfg.depth} and {cfg.num_heads} heads"


def _presets(table: Mapping[str, DinoConfig | DitConfig], *without: str) -> str:
    names = [n for n in table if n not in (*OWN_PRESETS, *without)]
    return ", ".join(f"{n.upper()} ({_sizes(table[n])})" for n in names)


def behaviour_notes(meta: Meta) -> list[str]:
    """Settings of the checkpoint that upstream's own inference does not follow."""
    notes = []
    if meta.action is not None and meta.action.mode != NORMALIZATION:
        notes.append(
            f"the actions are normalised by {meta.action.mode}; upstream's clients undo "
            f"{NORMALIZATION} always, which gives other actions"
        )
    if not meta.prompt.lower_case:
        notes.append(
            "the policy takes instructions as they are written; upstream's inference lower-cases "
            "them"
        )
    return notes


def config_yaml(
    meta: Meta, base_vlm: str | None, source: Mapping[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """config.yaml's contents: what upstream reads to build and run the model.

    ``num_heads`` entries and the section ``st4vla_jax`` are ours; upstream ignores keys that it
    does not know.

    Args:
      meta: of the checkpoint.
      base_vlm: Hugging Face folder that upstream builds the VLM from; None keeps the source's.
      source: config.yaml that the policy came with, or empty; keeps what is not said here.
      notes: `behaviour_notes`, kept in the file.
    """
    cfg, image_size = meta.model, meta.image.size
    dit, bridge = cfg.dit, cfg.bridge
    said = {
        "framework": {
            "dino": {
                "dino_backbone": dino_name(cfg.dino) or CUSTOM_DINO,
                "num_heads": cfg.dino.num_heads,
            },
            "layer_qformer": {
                "qformer_start_layer": bridge.start_layer,
                "qformer_end_layer": bridge.end_layer,
                "num_query_tokens": bridge.num_queries,
                "input_dim": cfg.text.hidden_size,
                "ouptput_dim": bridge.hidden_size,
                "grad_scale": bridge.gradient_scale,
                "num_heads": bridge.num_heads,
            },
            "action_model": {
                "action_model_type": dit_name(dit) or CUSTOM_DIT,
                "action_hidden_dim": dit.hidden_size,
                "action_dim": dit.action_dim,
                "future_action_window_size": dit.chunk - 1,
                "past_action_window_size": 0,
                "num_heads": dit.num_heads,
            },
        },
        "datasets": {"vla_data": {"CoT_prompt": meta.prompt.template}},
        "trainer": {"pretrained_checkpoint": None},
        "st4vla_jax": {"notes": list(notes)},
    }
    if image_size is not None:
        said["datasets"]["vla_data"]["image_size"] = list(image_size[::-1])  # PIL's order
    if base_vlm is not None:
        said["framework"]["qwenvl"] = {"base_vlm": base_vlm}
    defaults = {
        "framework": {"name": "InternVLA-M1", "qwenvl": {"base_vlm": None}},
        "trainer": {"repeated_diffusion_steps": 4},
    }
    return _merged(_merged(defaults, source), said)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {k for k in over if isinstance(over[k], Mapping) and isinstance(base.get(k), Mapping)}
    return {**base, **over, **{k: _merged(base[k], over[k]) for k in both}}


def passthrough_tensors(
    cfg: ModelConfig, dtypes: Mapping[str, np.dtype], passthrough: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors of upstream's strict load that are no parameters here, except the tied head.

    What was passed through comes back bit by bit; what a fresh policy never had is zero: both are
    unused by upstream (spec 1.7, 2.3).

    Args:
      cfg: sizes.
      dtypes: {upstream key: dtype} of the parameters.
      passthrough: of the checkpoint.
    """
    width = cfg.dit.hidden_size
    dit = dtypes[f"{DIT}x_embedder.linear.weight"]
    made = {
        DIT + HISTORY[0]: np.zeros((width, cfg.dit.action_dim), dit),
        DIT + HISTORY[1]: np.zeros((width,), dit),
        DINO + MASK_TOKEN: np.zeros((1, cfg.dino.hidden_size), dtypes[f"{DINO}cls_token"]),
    }
    return {key: passthrough.get(key, array) for key, array in made.items()}
