"""Tiny random Qwen2.5-VL of transformers, and packed inputs built by hand, independent of data/.

Positions come from HF's get_rope_index and pixels for HF are cut up here, so that only the slot
order (data/image.py's `arrange`) is taken from the package.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from convert_weights.rules import leaves_from_torch, text_rules, vision_rules
from st4vla_jax.batch import VlmInputs
from st4vla_jax.checkpoint import nested
from st4vla_jax.config import ModelConfig, TextConfig, VisionConfig
from st4vla_jax.data.image import IMAGE_MEAN, IMAGE_STD, arrange

VOCAB, PAD, IMAGE, VISION_START, VISION_END, VIDEO = 320, 300, 301, 302, 303, 304
TEXT_IDS = 300  # ids below are plain text


@dataclasses.dataclass
class Sample:
    """One sequence: token ids with image placeholders expanded, and u8[h,w,3] images."""

    tokens: list[int]
    images: list[np.ndarray]


def tiny_hf(tie: bool, **text: Any) -> tuple[Qwen2_5_VLForConditionalGeneration, ModelConfig]:
    """A random f32 model (every weight random, norms and biases too) and our config of it."""
    cfg = ModelConfig(
        VisionConfig(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2,
            fullatt_block_indexes=(1,), out_hidden_size=48,
        ),
        TextConfig(**({
            "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 12, "mrope_section": (1, 2, 3), "tie_word_embeddings": tie,
        } | text)),
        None, None, None,
    ).check()  # fmt: skip
    torch.set_num_threads(1)  # a model this small only loses by more
    vision, language = cfg.vision, cfg.text
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": vision.depth, "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size, "num_heads": vision.num_heads,
            "out_hidden_size": vision.out_hidden_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
        },
        text_config={
            "vocab_size": language.vocab_size, "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "num_hidden_layers": language.num_hidden_layers,
            "num_attention_heads": language.num_attention_heads,
            "num_key_value_heads": language.num_key_value_heads,
            "rms_norm_eps": language.rms_norm_eps, "tie_word_embeddings": tie,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": language.rope_theta,
                "mrope_section": list(language.mrope_section),
            },
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD,
        },
        image_token_id=IMAGE, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        video_token_id=VIDEO, tie_word_embeddings=tie,
    )  # fmt: skip
    hf = Qwen2_5_VLForConditionalGeneration(config).eval().float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "embed_tokens" in name or "lm_head" in name:
                p.copy_(noise * 0.1)  # small, or a tied head repeats the last token for ever
            elif p.ndim > 1:
                p.copy_(noise * 1.2 / np.sqrt(p[0].numel()))
            else:
                p.copy_(noise * 0.2 + (1 if "norm" in name or "ln_q" in name else 0))
    return hf, cfg


def params_of(hf: Qwen2_5_VLForConditionalGeneration, cfg: ModelConfig) -> dict[str, Any]:
    """Our parameter dict params["vlm"] with the HF model's weights."""
    state = hf.state_dict()

    def read(key: str) -> np.ndarray:
        return state[key if key.startswith("lm_head") else f"model.{key}"].numpy()

    return nested(leaves_from_torch(vision_rules(cfg.vision) + text_rules(cfg.text), read))


def random_sample(
    rng: np.random.Generator, num_text: int, sizes: tuple[tuple[int, int], ...] = ()
) -> Sample:
    """Random text around random images of (height, width) pixels, each a multiple of 28."""
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]
    tokens = []
    for part in np.array_split(rng.integers(0, TEXT_IDS, num_text), len(sizes) + 1):
        tokens += part.tolist()
        if len(images) > (index := sum(t == VISION_END for t in tokens)):
            cells = sizes[index][0] * sizes[index][1] // 28**2
            tokens += [VISION_START, *[IMAGE] * cells, VISION_END]
    return Sample(tokens, images)


def hf_pixels(image: np.ndarray) -> np.ndarray:
    """HF's pixel_values [patches, 3*2*14*14] of one prepared image."""
    x = (image.astype(np.float32) / 255 - IMAGE_MEAN) / IMAGE_STD
    rows, cols = image.shape[0] // 28, image.shape[1] // 28
    x = x.reshape(rows, 2, 14, cols, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = np.repeat(x[..., None, :, :], 2, axis=-3)  # both frames of a still image
    return x.reshape(4 * rows * cols, -1).astype(np.float32)


def hf_inputs(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """HF's arguments for a batch, padded on the left."""
    length = max(len(s.tokens) for s in samples)
    pads = [length - len(s.tokens) for s in samples]
    ids = torch.tensor([[PAD] * n + s.tokens for n, s in zip(pads, samples, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (length - n) for n in pads])
    out = {"input_ids": ids, "attention_mask": mask}
    images = [image for s in samples for image in s.images]
    if images:
        out["pixel_values"] = torch.from_numpy(np.concatenate([hf_pixels(i) for i in images]))
        out["image_grid_thw"] = torch.tensor(
            [[1, i.shape[0] // 14, i.shape[1] // 14] for i in images]
        )
        out["mm_token_type_ids"] = (ids == IMAGE).int()
    return out


def hf_positions(hf: Qwen2_5_VLForConditionalGeneration, sample: Sample) -> np.ndarray:
    """i32[L,3] mRoPE ids of one sample."""
    if not sample.images:
        return np.repeat(np.arange(len(sample.tokens), dtype=np.int32)[:, None], 3, axis=1)
    args = hf_inputs([sample])
    args.pop("pixel_values")
    return hf.model.get_rope_index(**args)[0][:, 0].T.numpy().astype(np.int32)


def hf_forward(
    hf: Qwen2_5_VLForConditionalGeneration, sample: Sample
) -> tuple[list[np.ndarray], np.ndarray]:
    """Hidden states (ids 0..last, each [L,D]) and logits [L,V] of one sample."""
    with torch.no_grad():
        out = hf(**hf_inputs([sample]), output_hidden_states=True)
    return [h[0].numpy() for h in out.hidden_states], out.logits[0].numpy()


def pack(
    hf: Qwen2_5_VLForConditionalGeneration,
    rows: list[list[Sample]],
    length: int | None = None,
) -> VlmInputs:
    """Packs each row's samples side by side; without targets (M = 0)."""
    slots = [arrange([image for s in row for image in s.images]) for row in rows]
    tokens = length or max(sum(len(s.tokens) for s in row) for row in rows)
    patches = max(len(s.patches) for s in slots)

    def rowwise(arrays: list[np.ndarray], size: int, fill: int = 0) -> np.ndarray:
        pad = [(0, 0)] * (arrays[0].ndim - 1)
        return np.stack(
            [np.pad(a, [(0, size - len(a)), *pad], constant_values=fill) for a in arrays]
        )

    segments = [
        np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), [len(s.tokens) for s in row])
        for row in rows
    ]
    ids = [np.concatenate([np.array(s.tokens, np.int32) for s in row]) for row in rows]
    index = []
    for row_ids, slot in zip(ids, slots, strict=True):
        cells = np.concatenate([*slot.cells, np.zeros(0, np.int32)])
        index.append(np.full(len(row_ids), -1, np.int32))
        index[-1][row_ids == IMAGE] = cells
    none = np.zeros((len(rows), 0), np.int32)
    return VlmInputs(
        tokens=rowwise(ids, tokens, PAD),
        positions=rowwise(
            [np.concatenate([hf_positions(hf, s) for s in row]) for row in rows], tokens
        ),
        segment_ids=rowwise(segments, tokens),
        patches=rowwise([s.patches for s in slots], patches),
        patch_hw=rowwise([s.patch_hw for s in slots], patches),
        patch_image=rowwise([s.patch_image for s in slots], patches),
        patch_window=rowwise([s.patch_window for s in slots], patches),
        vision_index=rowwise(index, tokens, -1),
        target_index=none,
        targets=none,
        target_weight=none.astype(np.float32),
        target_group=none,
    )
