"""Tiny checkpoints of every source kind, made with torch, transformers and upstream's key list."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from st4vla_jax.data.tokenizer import byte_level_tokenizer
from tests.reference.qwen import tiny_hf

WIDTH, QUERIES, CHUNK, ACTION_DIM, HEADS = 32, 8, 6, 7, 4
DINO_WIDTH, DINO_HEADS, GRID = 24, 3, 4

STATISTICS = {
    "oxe_bridge": {
        "action": {
            name: [value] * ACTION_DIM
            for name, value in {
                "mean": 0.0, "std": 1.0, "max": 2.0, "min": -2.0, "q01": -1.0, "q99": 1.0,
            }.items()
        }
        | {"mask": [True] * 6 + [False]},
        "num_transitions": 10,
        "num_trajectories": 2,
    }
}  # fmt: skip

State = dict[str, torch.Tensor]


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Asserts equal keys, dtypes, shapes and bytes."""
    assert sorted(a) == sorted(b)
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        bits = a[key].contiguous().view(torch.uint8), b[key].contiguous().view(torch.uint8)
        assert torch.equal(*bits), key


def hf_folder(
    folder: Path,
    *,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard: str = "1GB",
    memory_keys: bool = False,
    stored_head: bool = False,
    flat: bool = False,
) -> State:
    """Saves a tiny Qwen2.5-VL as transformers does; returns its weights under in-memory keys.

    Args:
      folder: to make.
      tie: tied output head.
      dtype: of all weights.
      max_shard: transformers' max_shard_size.
      memory_keys: store one file under in-memory keys instead.
      stored_head: store a tied head a second time (implies one file).
      flat: rewrite config.json in the hub's older flat form.
    """
    hf, _ = tiny_hf(tie)
    hf.to(dtype).save_pretrained(folder, max_shard_size=max_shard)
    byte_level_tokenizer().save(folder)
    state = {
        k: v.clone() for k, v in hf.state_dict().items() if not (tie and k == "lm_head.weight")
    }
    if memory_keys or stored_head:
        disk = {k: v.clone() for k, v in state.items()}
        if stored_head:
            disk["lm_head.weight"] = disk["model.language_model.embed_tokens.weight"].clone()
        save_file(disk, folder / "model.safetensors", {"format": "pt"})
    if flat:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        del text["model_type"]
        path.write_text(json.dumps(text | config))
    return state


def disk_state(folder: Path) -> State:
    """Weights of a Hugging Face folder under its own keys."""
    from safetensors.torch import load_file

    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def memory_keys(state: State) -> State:
    """Weights under transformers' in-memory keys, renamed independently of the package."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("visual."):
            key = "model." + key
        elif key.startswith("model.") and key.split(".")[1] not in ("visual", "language_model"):
            key = "model.language_model." + key[len("model.") :]
        renamed[key] = value
    return renamed


def _random(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def hub_dino(dtype: torch.dtype = torch.float32, swiglu: bool = False) -> State:
    """A tiny DINOv2 under torch.hub's keys (spec upstream.md 2.3)."""
    d = DINO_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "pos_embed": (1, 1 + GRID**2, d), "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,),
    } | _norm("norm", d)  # fmt: skip
    for i in range(2):
        block = f"blocks.{i}."
        shapes |= _norm(block + "norm1", d) | _norm(block + "norm2", d)
        shapes |= _linear(block + "attn.qkv", 3 * d, d) | _linear(block + "attn.proj", d, d)
        shapes |= {block + "ls1.gamma": (d,), block + "ls2.gamma": (d,)}
        if swiglu:
            shapes |= _linear(block + "mlp.w12", 2 * 40, d) | _linear(block + "mlp.w3", d, 40)
        else:
            shapes |= _linear(block + "mlp.fc1", 4 * d, d) | _linear(block + "mlp.fc2", d, 4 * d)
    return _random(shapes, dtype, 1)


def hf_dino(folder: Path, dtype: torch.dtype = torch.float32, swiglu: bool = False) -> State:
    """Saves the same kind of model as a Hugging Face Dinov2 folder; returns it under hub keys."""
    config = Dinov2Config(
        hidden_size=DINO_WIDTH, num_hidden_layers=2, num_attention_heads=DINO_HEADS, mlp_ratio=4,
        image_size=14 * GRID, patch_size=14, use_swiglu_ffn=swiglu,
    )  # fmt: skip
    model = Dinov2Model(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    state = model.state_dict()
    hub = {
        "cls_token": state["embeddings.cls_token"],
        "mask_token": state["embeddings.mask_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        hub[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        for i in range(2):
            old, new = f"encoder.layer.{i}.", f"blocks.{i}."
            qkv = [state[f"{old}attention.{x}_proj.{kind}"] for x in "qkv"]
            hub[f"{new}attn.qkv.{kind}"] = torch.cat(qkv)
            hub[f"{new}attn.proj.{kind}"] = state[f"{old}attention.o_proj.{kind}"]
            for norm in ("norm1", "norm2"):
                hub[f"{new}{norm}.{kind}"] = state[f"{old}{norm}.{kind}"]
            if swiglu:
                parts = [state[f"{old}mlp.{x}_proj.{kind}"] for x in ("gate", "up")]
                hub[f"{new}mlp.w12.{kind}"] = torch.cat(parts)
                hub[f"{new}mlp.w3.{kind}"] = state[f"{old}mlp.down_proj.{kind}"]
            else:
                for fc in ("fc1", "fc2"):
                    hub[f"{new}mlp.{fc}.{kind}"] = state[f"{old}mlp.{fc}.{kind}"]
    for i in range(2):
        for ls in ("1", "2"):
            hub[f"blocks.{i}.ls{ls}.gamma"] = state[f"encoder.layer.{i}.layer_scale{ls}.lambda1"]
    return {k: v.detach().clone() for k, v in hub.items()}


def action_shapes(vlm_width: int, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Q-Former, DiT and dino_pro of spec upstream.md 2.3, in small."""
    d, q, a = WIDTH, QUERIES, ACTION_DIM
    dit, former = "action_model.net.", "layer_qformer."
    shapes: dict[str, tuple[int, ...]] = {
        former + "query_tokens": (q, d),
        dit + "positional_embedding": (q + CHUNK, d),
        dit + "z_embedder.uncondition": (q, d),
    }
    shapes |= _linear("dino_pro", vlm_width, DINO_WIDTH) | _linear(former + "proj", d, vlm_width)
    for i in range(layers):
        block = f"{former}layers.{i}."
        shapes |= _norm(block + "norm1", d) | _norm(block + "norm2", d)
        shapes |= {
            block + "cross_attn.in_proj_weight": (3 * d, d),
            block + "cross_attn.in_proj_bias": (3 * d,),
        }
        shapes |= _linear(block + "cross_attn.out_proj", d, d)
        shapes |= _linear(block + "mlp.0", 4 * d, d) | _linear(block + "mlp.2", d, 4 * d)
    for i in range(3):
        block = f"{dit}blocks.{i}."
        shapes |= _linear(block + "attn.qkv", 3 * d, d) | _linear(block + "attn.proj", d, d)
        shapes |= _linear(block + "mlp.fc1", 4 * d, d) | _linear(block + "mlp.fc2", d, 4 * d)
    shapes |= _linear(dit + "history_embedder.linear", d, a) | _linear(
        dit + "x_embedder.linear", d, a
    )
    shapes |= _linear(dit + "t_embedder.mlp.0", d, 256) | _linear(dit + "t_embedder.mlp.2", d, d)
    return (
        shapes
        | _linear(dit + "z_embedder.linear", d, d)
        | _linear(dit + "final_layer.linear", a, d)
    )


def run_config(base_vlm: str, layers: int = 2) -> dict[str, Any]:
    """config.yaml of the tiny run, with a few keys that only upstream reads."""
    return {
        "framework": {
            "name": "DinoQFormerACT",
            "qwenvl": {"base_vlm": base_vlm, "attn_implementation": "flash_attention_2"},
            "dino": {"dino_backbone": "dinov2_vits14", "num_heads": DINO_HEADS},
            "layer_qformer": {
                "qformer_start_layer": 3, "qformer_end_layer": 3 + layers,
                "num_query_tokens": QUERIES, "input_dim": 48, "ouptput_dim": WIDTH,
                "grad_scale": 0.5, "num_heads": HEADS,
            },
            "action_model": {
                "action_model_type": "DiT-B", "action_dim": ACTION_DIM,
                "future_action_window_size": CHUNK - 1, "past_action_window_size": 0,
                "num_heads": HEADS,
            },
        },
        "datasets": {
            "vla_data": {"CoT_prompt": "Your task is {instruction}.", "image_size": [224, 196]}
        },
        "trainer": {"repeated_diffusion_steps": 4, "max_train_steps": 7},
    }  # fmt: skip


def run_folder(
    root: Path,
    *,
    name: str = "checkpoints/steps_70_pytorch_model.pt",
    dtype: torch.dtype = torch.float32,
    old_keys: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[Path, State]:
    """Writes an upstream run folder and its base VLM (ROOT/base).

    Args:
      root: folder of both.
      name: weight file below the run.
      dtype: of every tensor but the VLM's, which are bf16 as in released runs.
      old_keys: the VLM's keys as under transformers <= 4.51.
      config: config.yaml; default `run_config`.

    Returns:
      (weight file, the state dict under upstream's keys, in-memory convention).
    """
    vlm = hf_folder(root / "base", dtype=torch.bfloat16)
    vlm["lm_head.weight"] = vlm["model.language_model.embed_tokens.weight"].clone()
    state = {f"qwen_vl_interface.model.{k}": v for k, v in vlm.items()}
    state |= {f"dino_encoder.body.{k}": v for k, v in hub_dino(dtype).items()}
    state |= _random(action_shapes(48), dtype, 3)
    weights = root / "run" / name
    weights.parent.mkdir(parents=True)
    stored = state
    if old_keys:
        outer = "qwen_vl_interface.model."
        stored = {
            k.replace(f"{outer}model.visual", f"{outer}visual")
            .replace(f"{outer}model.language_model", f"{outer}model"): v
            for k, v in state.items()
        }  # fmt: skip
    if weights.suffix == ".pt":
        torch.save(stored, weights)
    else:
        save_file(stored, weights)
    text = yaml.safe_dump(config or run_config(str(root / "base")))
    (root / "run" / "config.yaml").write_text(text)
    (root / "run" / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    return weights, state


def strip_weights(folder: Path) -> Path:
    """A copy of a Hugging Face folder without its weights, as --base-vlm takes."""
    target = folder.with_name(folder.name + "_bare")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    return target
