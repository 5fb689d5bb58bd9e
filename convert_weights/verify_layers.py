"""Hidden states of two VLMs on the same image and tokens, layer by layer.

A checkpoint of this package runs in its own model; a Hugging Face folder or an upstream file runs
in transformers (needs torch).  Both in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert_weights import qwen2_5_vl, st4vla
from convert_weights.rules import ConversionError
from convert_weights.verify import Weights, difference
from st4vla_jax.batch import VlmInputs
from st4vla_jax.checkpoint import read_meta, read_params
from st4vla_jax.config import FLOAT32, ModelConfig
from st4vla_jax.data.image import IMAGE_MEAN, IMAGE_STD, arrange
from st4vla_jax.data.transforms import mrope_positions
from st4vla_jax.models.qwen_lm import Tap
from st4vla_jax.models.qwen_vl import QwenVL

HEIGHT, WIDTH = 140, 196  # no multiple of the attention window: edge windows are exercised too
TEXT_BEFORE, TEXT_AFTER = 5, 11
States = dict[str, np.ndarray]


def compare_layers(a: Weights, b: Weights, tolerance: float, report: Callable = print) -> list[str]:
    """Compares the vision features and every hidden state.

    Args:
      a: opened weights; A or B is a checkpoint or a Hugging Face folder, for the sizes.
      b: opened weights.
      tolerance: largest error, relative to the largest entry of B's state.
      report: takes one line a layer.

    Returns:
      problems, the first layer out of tolerance first.
    """
    cfg, hf = _config(a, b)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    text = rng.integers(0, min(cfg.text.vocab_size // 2, 10_000), TEXT_BEFORE + TEXT_AFTER)
    states = [
        our_states(x, cfg, image, text)
        if x.kind == "checkpoint"
        else torch_states(x, hf, image, text)
        for x in (a, b)
    ]
    problems = []
    for name, theirs in states[1].items():
        found = difference(states[0][name], theirs, np.inf, 0.0)
        out = not found.relative <= tolerance
        report(f"{found.absolute:.3e} {found.relative:.3e}  {name}{'  OUT OF TOLERANCE' * out}")
        if out:
            problems.append(
                f"{name}: max abs error {found.absolute:.3e}, rel {found.relative:.3e}, beyond "
                f"{tolerance:g}"
            )
    return problems


def _config(a: Weights, b: Weights) -> tuple[ModelConfig, dict]:
    """Sizes, and a Hugging Face config whose token ids fit."""
    for side in (a, b):
        if side.kind == "checkpoint":
            cfg = read_meta(side.path).model
            break
        if side.kind == "hf":
            folder = qwen2_5_vl.read_folder(side.path)
            cfg = ModelConfig(folder.vision, folder.text, None, None, None)
            break
    else:
        raise ConversionError("--layers needs a checkpoint or a Hugging Face folder as A or B")
    ids = {"<|image_pad|>": 151_655, "<|vision_start|>": 151_652}
    if cfg.text.vocab_size <= max(ids.values()):
        ids = {token: cfg.text.vocab_size - 1 - i for i, token in enumerate(ids)}
    return cfg, qwen2_5_vl.hf_config(cfg.vision, cfg.text, ids)


def our_states(side: Weights, cfg: ModelConfig, image: np.ndarray, text: np.ndarray) -> States:
    """Vision features and hidden states of a checkpoint in this package's model."""
    params = read_params(side.path, dtype=np.float32, subtrees=("vlm",))["vlm"]
    vlm = _inputs(image, text)
    with jax.default_matmul_precision("highest"):
        hidden = jax.device_get(_hidden_states(cfg, params, vlm))
    return _named(hidden, vlm.vision_index[0] >= 0)


@functools.partial(jax.jit, static_argnums=0)
def _hidden_states(cfg: ModelConfig, params: Any, vlm: VlmInputs) -> jax.Array:
    """f32[ids,T,D]: all hidden states of one sequence."""
    ids = cfg.text.num_hidden_layers + 1
    states = jnp.zeros((ids, *vlm.tokens.shape, cfg.text.hidden_size))
    tap = Tap(0, ids, jnp.arange(ids), states, lambda carry, i, h: carry.at[i].set(h))
    return QwenVL(cfg, FLOAT32).apply({"params": params}, vlm, tap=tap).carry[:, 0]


def _named(hidden: Sequence[np.ndarray], is_image: np.ndarray) -> States:
    # Id 0 holds the embeddings, and the vision features in the places of image tokens.
    names = {f"hidden state {i}": h for i, h in enumerate(hidden)}
    return {"vision features": hidden[0][is_image]} | names


def _inputs(image: np.ndarray, text: np.ndarray) -> VlmInputs:
    slots = arrange([image])
    (rows, cols), (cells,) = slots.grids[0], slots.cells
    before, after = np.split(text, [TEXT_BEFORE])
    # The token under an image feature is never read.
    tokens = np.concatenate([before, np.zeros(rows * cols, np.int64), after])
    index = np.full(len(tokens), -1)
    index[TEXT_BEFORE : TEXT_BEFORE + rows * cols] = cells
    none = np.zeros((1, 0), np.int32)
    return VlmInputs(
        tokens=tokens[None].astype(np.int32),
        positions=mrope_positions(index >= 0, [(rows, cols)])[None],
        segment_ids=np.ones((1, len(tokens)), np.int32),
        patches=slots.patches[None],
        patch_hw=slots.patch_hw[None],
        patch_image=slots.patch_image[None],
        patch_window=slots.patch_window[None],
        vision_index=index[None].astype(np.int32),
        target_index=none,
        targets=none,
        target_weight=none.astype(np.float32),
        target_group=none,
    )


def torch_states(side: Weights, hf: dict, image: np.ndarray, text: np.ndarray) -> States:
    """The same of a Hugging Face folder or an upstream file in transformers."""
    import torch

    vlm = {
        key.removeprefix(st4vla.VLM): np.asarray(tensor.read(), np.float32)
        for key, tensor in side.tensors.items()
        if key.startswith(st4vla.VLM)
    }
    model = qwen2_5_vl.build_torch(hf, vlm)
    cells = HEIGHT * WIDTH // 28**2
    image_id = model.config.image_token_id
    before, after = np.split(text, [TEXT_BEFORE])
    tokens = np.concatenate([before, np.full(cells, image_id), after])[None]
    rows, cols = HEIGHT // 14, WIDTH // 14
    pixels = (image.astype(np.float32) / 255 - np.ravel(IMAGE_MEAN)) / np.ravel(IMAGE_STD)
    # Patches in merge groups; a still image is two equal frames (spec upstream.md 1.3).
    pixels = pixels.reshape(rows // 2, 2, 14, cols // 2, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    pixels = np.repeat(pixels[..., None, :, :], 2, axis=-3).reshape(rows * cols, -1)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            mm_token_type_ids=torch.from_numpy((tokens == image_id).astype(np.int32)),
            pixel_values=torch.from_numpy(pixels.astype(np.float32)),
            image_grid_thw=torch.tensor([[1, rows, cols]]),
            output_hidden_states=True,
        )
    return _named([h[0].numpy() for h in out.hidden_states], tokens[0] == image_id)
