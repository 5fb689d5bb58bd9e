"""Benchmarks on the machine at hand, each against PyTorch in the same run.

python -m st4vla_jax.bench forward [--batch 4] [--repeats 5] [--json OUT.json]
python -m st4vla_jax.bench data [--batch 64] [--steps 40] [--tf-python PYTHON] [--json OUT.json]
python -m st4vla_jax.bench step [--preset cpu-100m | gpu-3b --out DIR] [--job JOB ...]

``forward`` times the vision-language model alone (about 100 M parameters, one 224x224 image and
128 text tokens a sample, float32) in this package and in torch/transformers, with equal weights.
``data`` times the way from RLDS records to packed batches against tf.data (bench_data.py).
``step`` times a whole training step against the reference's in PyTorch (bench_step.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st4vla_jax import bench_data, bench_step
from st4vla_jax.batch import VlmInputs
from st4vla_jax.config import FLOAT32, ModelConfig, TextConfig, VisionConfig
from st4vla_jax.models.qwen_vl import QwenVL
from st4vla_jax.sharding import unbox

IMAGE_SIDE = 224
TEXT_TOKENS = 128

MID_SIZE = ModelConfig(
    VisionConfig(
        depth=8, hidden_size=512, intermediate_size=1368, num_heads=8,
        fullatt_block_indexes=(3, 7), out_hidden_size=768,
    ),
    TextConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=3072, num_hidden_layers=9,
        num_attention_heads=12, num_key_value_heads=2, head_dim=64, mrope_section=(8, 12, 12),
    ),
    dino=None, bridge=None, dit=None,
)  # fmt: skip


def make_inputs(cfg: ModelConfig, batch: int, rng: np.random.Generator) -> VlmInputs:
    """One image and TEXT_TOKENS text tokens in each of ``batch`` sequences, image first."""
    from st4vla_jax.data.image import arrange

    side = IMAGE_SIDE // cfg.vision.patch_size // cfg.vision.spatial_merge_size
    images = rng.integers(0, 256, (batch, IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    slots = [arrange([image]) for image in images]
    grid = np.stack([np.zeros((side, side)), *np.mgrid[:side, :side]], -1).reshape(-1, 3)
    text = side + np.arange(TEXT_TOKENS)[:, None].repeat(3, 1)
    length = side * side + TEXT_TOKENS
    none = np.zeros((batch, 0), np.int32)
    cells = [np.concatenate([s.cells[0], np.full(TEXT_TOKENS, -1)]) for s in slots]
    return VlmInputs(
        tokens=rng.integers(16, cfg.text.vocab_size, (batch, length)).astype(np.int32),
        positions=np.concatenate([grid, text])[None].repeat(batch, 0).astype(np.int32),
        segment_ids=np.ones((batch, length), np.int32),
        patches=np.stack([s.patches for s in slots]),
        patch_hw=np.stack([s.patch_hw for s in slots]),
        patch_image=np.stack([s.patch_image for s in slots]),
        patch_window=np.stack([s.patch_window for s in slots]),
        vision_index=np.stack(cells).astype(np.int32),
        target_index=none,
        targets=none,
        target_weight=none.astype(np.float32),
        target_group=none,
    )


def seconds(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median wall time of each of ``runs``, which must wait for their results.

    They take turns after one warm-up each, so that whatever else the machine does meets all alike.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


class JaxForward:
    """The model of this package, compiled."""

    def __init__(self, cfg: ModelConfig, inputs: VlmInputs):
        self.inputs = jax.device_put(inputs)
        # torch keeps its activations: no rematerialisation here either.
        self.model = QwenVL(cfg, dataclasses.replace(FLOAT32, remat="none"))
        init = jax.jit(lambda key: unbox(self.model.init(key, inputs)["params"]))
        self.params = init(jax.random.key(0))

        def hidden(params, vlm):
            return self.model.apply({"params": params}, vlm).hidden

        self.hidden = jax.jit(hidden)
        self.gradient = jax.jit(jax.grad(lambda p, v: jnp.mean(jnp.square(hidden(p, v)))))

    def forward(self) -> jax.Array:
        return jax.block_until_ready(self.hidden(self.params, self.inputs))

    def forward_backward(self) -> Any:
        return jax.block_until_ready(self.gradient(self.params, self.inputs))


class TorchForward:
    """transformers' Qwen2_5_VLModel with the same weights and inputs."""

    def __init__(self, cfg: ModelConfig, inputs: VlmInputs, params: Any):
        import torch

        from convert_weights.qwen2_5_vl import torch_model

        self.torch = torch
        self.model = torch_model(cfg, params).model
        self.inputs = self._inputs(cfg, inputs)

    def _inputs(self, cfg: ModelConfig, vlm: VlmInputs) -> dict[str, Any]:
        from st4vla_jax.data.image import IMAGE_MEAN, IMAGE_STD

        torch, batch = self.torch, len(vlm.tokens)
        tokens = np.where(vlm.vision_index >= 0, self.model.config.image_token_id, vlm.tokens)
        grid = IMAGE_SIDE // cfg.vision.patch_size
        merged = np.take_along_axis(
            vlm.patches.reshape(batch, -1, 4, 3, 14 * 14),
            vlm.vision_index[:, : grid * grid // 4, None, None, None],
            1,
        )
        mean, std = (np.reshape(x, (3, 1)) for x in (IMAGE_MEAN, IMAGE_STD))
        pixels = (merged / 255.0 - mean) / std
        frames = np.repeat(pixels[..., None, :], 2, axis=-2)  # a still image is two equal frames
        return {
            "input_ids": torch.tensor(tokens, dtype=torch.long),
            "mm_token_type_ids": torch.tensor(vlm.vision_index >= 0, dtype=torch.int),
            "attention_mask": torch.ones(tokens.shape, dtype=torch.long),
            "pixel_values": torch.tensor(frames.reshape(batch * grid * grid, -1)).float(),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * batch),
            "use_cache": False,
        }

    def forward(self) -> np.ndarray:
        with self.torch.no_grad():
            return self.model(**self.inputs).last_hidden_state.numpy()

    def forward_backward(self) -> None:
        self.model.zero_grad()
        self.model(**self.inputs).last_hidden_state.square().mean().backward()


def forward(batch: int, repeats: int) -> dict[str, Any]:
    """Times both models; returns seconds, ratios (torch / jax) and the outputs' difference."""
    inputs = make_inputs(MID_SIZE, batch, np.random.default_rng(0))
    ours = JaxForward(MID_SIZE, inputs)
    theirs = TorchForward(MID_SIZE, inputs, ours.params)
    difference = float(np.abs(np.asarray(ours.forward()) - theirs.forward()).max())
    result = {
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "parameters": sum(p.size for p in jax.tree.leaves(ours.params)),
        "batch": batch,
        "max_abs_difference": difference,
    }
    for name in ("forward", "forward_backward"):
        times = seconds([getattr(model, name) for model in (ours, theirs)], repeats)
        result[name] = {"jax_s": times[0], "torch_s": times[1], "ratio": times[1] / times[0]}
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m st4vla_jax.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("forward", help="vision-language model against torch/transformers")
    sub.add_argument("--batch", type=int, default=4)
    sub.add_argument("--repeats", type=int, default=5)
    sub.add_argument("--json", type=Path, help="also write the result here")
    sub.set_defaults(run=run_forward)
    bench_data.register(commands)
    bench_step.register(commands)
    args = parser.parse_args(argv)
    args.run(args)


def run_forward(args: argparse.Namespace) -> None:
    """What ``forward`` does."""
    result = forward(args.batch, args.repeats)
    print(
        f"{result['parameters'] / 1e6:.0f} M parameters on {result['machine']}, batch {args.batch}"
    )
    print(f"largest difference of the hidden states: {result['max_abs_difference']:.1e}")
    for name in ("forward", "forward_backward"):
        row = result[name]
        print(
            f"{name:17s} jax {row['jax_s']:.3f} s   torch {row['torch_s']:.3f} s   "
            f"ratio {row['ratio']:.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
