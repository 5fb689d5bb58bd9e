"""DINOv2: torch.hub keys from a hub .pth or a Hugging Face Dinov2 file, and sizes from shapes.

Hugging Face stores separate query, key and value (and, in transformers 5's in-memory names,
separate gate and up projections of the g model's SwiGLU); torch.hub stores them joined, in that
order.  The joined form is the one that the rules know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert_weights.qwen2_5_vl import count_layers, read_json
from convert_weights.rules import ConversionError, check_keys, dino_rules
from convert_weights.safetensors_io import (
    SINGLE,
    Tensors,
    concatenated,
    open_weights,
    shapes,
)
from st4vla_jax.config import DINO_PRESETS, OWN_PRESETS, DinoConfig

MASK_TOKEN = "mask_token"  # used in pre-training only: passed through, not a parameter here

_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": MASK_TOKEN,
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
}

# Tail of `encoder.layer.N.` -> (tail of `blocks.N.`, place among the joined parts).  Left of the
# commas: both generations of Hugging Face's names (transformers 5 renamed them in memory).
_BLOCK = {
    "norm1": ("norm1", 0),
    "norm2": ("norm2", 0),
    "attention.attention.query": ("attn.qkv", 0),
    "attention.attention.key": ("attn.qkv", 1),
    "attention.attention.value": ("attn.qkv", 2),
    "attention.output.dense": ("attn.proj", 0),
    "attention.q_proj": ("attn.qkv", 0),
    "attention.k_proj": ("attn.qkv", 1),
    "attention.v_proj": ("attn.qkv", 2),
    "attention.o_proj": ("attn.proj", 0),
    "layer_scale1.lambda1": ("ls1.gamma", 0),
    "layer_scale2.lambda1": ("ls2.gamma", 0),
    "mlp.fc1": ("mlp.fc1", 0),
    "mlp.fc2": ("mlp.fc2", 0),
    "mlp.weights_in": ("mlp.w12", 0),
    "mlp.weights_out": ("mlp.w3", 0),
    "mlp.gate_proj": ("mlp.w12", 0),
    "mlp.up_proj": ("mlp.w12", 1),
    "mlp.down_proj": ("mlp.w3", 0),
}

_LAYER = re.compile(r"(?:encoder\.)?layer\.(\d+)\.(.+?)(?:\.(weight|bias))?$")


def hub_tensors(tensors: Tensors) -> Tensors:
    """Tensors under torch.hub's keys; hub keys and unknown keys stay as they are."""
    parts: dict[str, dict[int, str]] = {}
    for key in tensors:
        name, place = _hub_key(key.removeprefix("dinov2."))
        parts.setdefault(name, {})[place] = key
    joined = {}
    for name, places in parts.items():
        keys = [tensors[places[i]] for i in sorted(places)]
        joined[name] = keys[0] if len(keys) == 1 else concatenated(keys)
    return joined


def _hub_key(key: str) -> tuple[str, int]:
    layer = _LAYER.fullmatch(key)
    if layer and layer[2] in _BLOCK:
        tail, place = _BLOCK[layer[2]]
        kind = f".{layer[3]}" if layer[3] else ""
        return f"blocks.{layer[1]}.{tail}{kind}", place
    for old, new in _TOP.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key.removeprefix(old), 0
    return key, 0


def config_from_shapes(
    shape: Mapping[str, tuple[int, ...]], where: str, num_heads: int | None = None
) -> DinoConfig:
    """Sizes from the shapes of hub-named tensors.

    Args:
      shape: {hub key: shape}.
      where: file, for messages.
      num_heads: heads if known (shapes cannot tell); else as in the preset of that width.

    Raises:
      ConversionError: tensors that tell the sizes are missing, registers, or unknown heads.
    """
    if "register_tokens" in shape:
        raise ConversionError(f"{where}: DINOv2 with registers is not supported (register_tokens)")
    need = {"pos_embed": 3, "patch_embed.proj.weight": 4}
    bad = [key for key, rank in need.items() if len(shape.get(key, ())) != rank]
    swiglu = "blocks.0.mlp.w3.weight" in shape
    up = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc1.weight"
    bad += [up] if len(shape.get(up, ())) != 2 else []
    if bad:
        raise ConversionError(f"{where}: no DINOv2, lacks or misshapes {', '.join(bad)}")
    _, positions, width = shape["pos_embed"]
    patch = shape["patch_embed.proj.weight"][-1]
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise ConversionError(f"{where}: pos_embed of {positions} rows is not 1 + a square")
    cfg = DinoConfig(
        depth=count_layers(shape, "blocks."),
        hidden_size=width,
        num_heads=num_heads or _preset_heads(width, where),
        mlp_size=shape[up][1] if swiglu else shape[up][0],
        swiglu=swiglu,
        patch_size=patch,
        pretrain_size=side * patch,
    )
    problems = cfg.problems()
    if problems:
        raise ConversionError(f"{where}: " + "; ".join(problems))
    return cfg


def _preset_heads(width: int, where: str) -> int:
    heads = {c.hidden_size: c.num_heads for n, c in DINO_PRESETS.items() if n not in OWN_PRESETS}
    if width not in heads:
        raise ConversionError(
            f"{where}: DINOv2 of width {width} is none of {sorted(heads)}, so its number of heads "
            "is unknown; give --dino-heads"
        )
    return heads[width]


def check_dino(tensors: Tensors, cfg: DinoConfig, where: str) -> tuple[Tensors, np.ndarray | None]:
    """Checks hub-named tensors: (the tensors the rules name, mask_token or None)."""
    tensors = dict(tensors)
    mask = tensors.pop(MASK_TOKEN, None)
    check_keys(dino_rules(cfg), shapes(tensors), where)
    return tensors, None if mask is None else mask.read()


def read_file(
    path: Path | str, num_heads: int | None = None
) -> tuple[DinoConfig, Tensors, np.ndarray | None]:
    """Opens a hub .pth or a Hugging Face Dinov2 safetensors file or folder.

    The heads come from ``num_heads``, else from a config.json beside the file, else by width.

    Returns:
      (config, hub-named tensors, mask_token or None).
    """
    path = Path(path)
    tensors = hub_tensors(open_weights(path))
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if num_heads is None and (path.is_dir() or path.name == SINGLE) and beside.is_file():
        num_heads = read_json(beside).get("num_attention_heads")
    cfg = config_from_shapes(shapes(tensors), str(path), num_heads)
    return cfg, *check_dino(tensors, cfg, str(path))
