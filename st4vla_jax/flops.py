"""Floating point operations: what a batch needs, what a program does, what a device can do.

A multiplication and an addition count as two; only matrix products and convolutions are counted.
`model_flops` is the numerator of the model FLOPs utilisation (MFU): valid tokens only, nothing for
padding and rematerialisation.  `jaxpr_flops` counts a traced program, padding, recomputation and
masked scores included.  XLA's own cost_analysis counts the body of a loop once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from st4vla_jax.batch import VISION_BIN, ActionInputs, Batch, VlmInputs
from st4vla_jax.config import BridgeConfig, DinoConfig, DitConfig, ModelConfig

# Dense bf16 FLOP/s of one jax device, by its exact device_kind (a slice of a GPU has another one).
# TPUs: cloud.google.com/tpu/docs, the page of each version.  A device is a chip, but a core (half
# a chip) for v2, v3 and 7x.  jax/_src/pallas/mosaic/tpu_info.py has the same numbers to 1 %, but
# for v3 (140e12 a chip).
# GPUs: NVIDIA's data sheets of the products, "Tensor Core" rows without sparsity.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
}


class FlopsError(ValueError):
    """A program with parts that cannot be counted; lists them all."""


def mfu(flops_per_second: float, devices: Sequence[Any]) -> float | None:
    """Share of the devices' peak; None where one's peak is not known (CPUs have none here)."""
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    return None if None in peaks or not peaks else flops_per_second / sum(peaks)


# --- A batch ------------------------------------------------------------------------------------

# Part of the model: its parameters' path, and the parts whose results it reads.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vision": ("vlm/visual/", ()),
    "text": ("vlm/language_model/", ("vision",)),
    "head": ("vlm/lm_head/", ("vision", "text")),
    "dino": ("dino/", ()),
    "bridge": ("bridge/", ("vision", "text", "dino")),
    "dit": ("dit/", ("vision", "text", "dino", "bridge")),
}


def trainable_shares(
    cfg: ModelConfig, trainable: Mapping[str, int], frozen: Mapping[str, int]
) -> dict[str, float]:
    """Share of each part's parameters that is trained.

    Args:
      cfg: tells whether the head is the embedding table.
      trainable: path such as "vlm/visual/patch_embed/proj/kernel" -> number of elements.
      frozen: likewise.

    Returns:
      part -> 0..1, for `model_flops`; a small share (LoRA) saves the gradients of kernels, not
      those of activations.
    """
    shares = {}
    for part, (prefix, _) in PARTS.items():
        own, other = (
            sum(size for path, size in tree.items() if path.startswith(prefix))
            for tree in (trainable, frozen)
        )
        shares[part] = own / (own + other) if own else 0.0
    if cfg.text.tie_word_embeddings:
        table = "vlm/language_model/embed_tokens/embedding"
        shares["head"] = float(table in trainable)
    return shares


@dataclasses.dataclass(frozen=True)
class Work:
    """Forward FLOPs: products with parameters, and products of activations (attention)."""

    kernels: float = 0.0
    scores: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.kernels + other.kernels, self.scores + other.scores)

    def times(self, number: float) -> Work:
        """That often."""
        return Work(self.kernels * number, self.scores * number)


def model_flops(
    cfg: ModelConfig,
    batch: Batch,
    repeats: int,
    shares: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """FLOPs that one update needs for the valid entries of a numpy batch.

    A token attends to the tokens before it in its segment and itself, a patch to its window or its
    image.  The embedding table is read, not multiplied; the head runs on supervised positions.
    Backward, a trained kernel takes its forward FLOPs once more for its own gradient, and
    everything that a gradient passes through once more for its input's: three times forward in
    all (also where an input needs no gradient, as the pixels).  Products of LoRA adapters are left
    out.

    Args:
      cfg: sizes.
      batch: numpy arrays; a process's part gives that part's FLOPs.
      repeats: R, noise draws a robot sample.
      shares: from `trainable_shares`; None trains all, {} counts the forward pass alone.

    Returns:
      FLOPs by part (keys of PARTS) and their "total".
    """
    shares = dict.fromkeys(PARTS, 1.0) if shares is None else shares
    work = {"vision": vision_work(cfg, batch.vlm), **text_work(cfg, batch.vlm)}
    if batch.action is not None:
        work |= action_work(cfg, batch.action, repeats)
    flops = {}
    for part, (_, reads) in PARTS.items():
        own = work.get(part, Work())
        # A gradient passes where something trained lies before, or in the part itself.
        passes = any(shares.get(p, 0.0) for p in (part, *reads))
        flops[part] = own.kernels * (1 + shares.get(part, 0.0) + passes) + own.scores * (
            1 + 2 * passes
        )
    return flops | {"total": sum(flops.values())}


def vision_work(cfg: ModelConfig, vlm: VlmInputs) -> Work:
    """The vision tower's."""
    c = cfg.vision
    patches = np.count_nonzero(vlm.patch_image)
    images = _sizes(vlm.patch_image)
    windows = _sizes(vlm.patch_window.reshape(-1, VISION_BIN)) if patches else images
    full = len({i for i in c.fullatt_block_indexes if i < c.depth})
    width, merged = c.hidden_size, c.merged_size
    layer = 2 * width * (4 * width + 3 * c.intermediate_size)
    pixels = c.in_channels * c.patch_size**2
    cells = patches / c.spatial_merge_size**2
    kernels = patches * (2 * pixels * width + c.depth * layer)
    kernels += cells * 2 * merged * (merged + c.out_hidden_size)
    pairs = full * np.sum(images**2) + (c.depth - full) * np.sum(windows**2)
    return Work(float(kernels), float(pairs * 4 * width))


def text_work(cfg: ModelConfig, vlm: VlmInputs) -> dict[str, Work]:
    """The decoder's and the output head's."""
    c = cfg.text
    lengths = _sizes(vlm.segment_ids)
    heads, groups = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    layer = 2 * c.hidden_size * (2 * heads + 2 * groups + 3 * c.intermediate_size)
    pairs = np.sum(lengths * (lengths + 1)) / 2
    depth = c.num_hidden_layers
    targets = np.count_nonzero(vlm.target_weight)
    return {
        "text": Work(float(lengths.sum() * depth * layer), float(depth * pairs * 4 * heads)),
        "head": Work(float(targets * 2 * c.hidden_size * c.vocab_size)),
    }


def action_work(cfg: ModelConfig, action: ActionInputs, repeats: int) -> dict[str, Work]:
    """Those of DINOv2, the bridge and the DiT."""
    views = np.sum(action.view_mask & action.valid[..., None], axis=-1)[action.valid]
    tokens = np.sum(action.token_mask, axis=-1)[action.valid]
    side = action.dino_images.shape[-2]
    per_view = (side // cfg.dino.patch_size) ** 2
    samples = [
        _bridge_sample(cfg, int(length), int(count) * per_view)
        for length, count in zip(tokens, views, strict=True)
    ]
    return {
        "dino": _dino_view(cfg.dino, per_view).times(float(views.sum())),
        "bridge": sum(samples, Work()),
        "dit": _dit_draw(cfg.dit).times(repeats * len(samples)),
    }


def _block(tokens: int, width: int, mlp_kernels: int) -> Work:
    """A bidirectional transformer block with as many weights in its feed-forward."""
    return Work(2 * tokens * (4 * width * width + mlp_kernels), 4 * tokens * tokens * width)


def _dino_view(c: DinoConfig, patches: int) -> Work:
    mlp = (3 if c.swiglu else 2) * c.hidden_size * c.mlp_size
    embed = Work(2 * patches * 3 * c.patch_size**2 * c.hidden_size)
    return embed + _block(patches + 1, c.hidden_size, mlp).times(c.depth)


def _bridge_sample(cfg: ModelConfig, tokens: int, dino_tokens: int) -> Work:
    c: BridgeConfig = cfg.bridge
    width, source = c.hidden_size, cfg.text.hidden_size
    context = dino_tokens * 2 * source * (cfg.dino.hidden_size + width)
    keys = tokens + dino_tokens
    if c.state_dim:
        context += 2 * c.state_hidden_size * (c.state_dim + width)
        keys += 1
    queries = c.num_queries
    layer = tokens * 2 * source * width
    layer += 2 * width * width * (2 * queries + 2 * keys + 2 * c.mlp_ratio * queries)
    layers = Work(layer, 4 * queries * keys * width).times(c.num_layers)
    return Work(context) + layers


def _dit_draw(c: DitConfig) -> Work:
    """One noise draw of one sample; the condition is embedded for each, as dropout changes it."""
    width = c.hidden_size
    embed = c.num_condition_tokens * width + c.frequency_size + width + 2 * c.chunk * c.action_dim
    block = _block(c.num_condition_tokens + c.chunk, width, 2 * c.mlp_ratio * width * width)
    return Work(2 * width * embed) + block.times(c.depth)


def _sizes(ids: np.ndarray) -> np.ndarray:
    """How many entries of each row [n,...] carry each id but 0: f64[rows and ids that occur]."""
    rows = np.arange(ids.shape[0])[:, None]
    span = int(ids.max(initial=0)) + 1
    counts = np.bincount((rows * span + ids)[ids > 0])
    return counts[counts > 0].astype(np.float64)


# --- A program ----------------------------------------------------------------------------------

# Primitives that compute in code which tracing does not see.
_OPAQUE = ("ffi_call", "pure_callback", "io_callback", "triton_kernel_call", "tpu_custom_call",
           "mosaic_gpu", "dot_product_attention", "ragged_dot")  # fmt: skip

Kernels = Mapping[str, Callable[[Any], float]]


def jaxpr_flops(
    jaxpr: Any, *, while_trips: int | None = None, kernels: Kernels | None = None
) -> float:
    """FLOPs of a traced program's matrix products and convolutions.

    Exact over scan (times its length), rematerialisation, derivatives, jit, shard_map (times its
    shards) and Pallas kernels (their cost estimate, else their body times the grid); of the
    branches of a cond the largest counts.

    Args:
      jaxpr: from `jax.make_jaxpr` or a traced jit's ``.jaxpr``.
      while_trips: rounds of every while loop, whose number is not part of the program; loops
        without a product need none.
      kernels: name of a primitive, or of a Pallas kernel -> FLOPs of its equation; goes before
        all else.

    Raises:
      FlopsError: while loops with products and no ``while_trips``, or calls of foreign code.
    """
    counter = _Counter(while_trips, kernels or {})
    flops = counter.count(jaxpr)
    if counter.problems:
        raise FlopsError("cannot count:\n  " + "\n  ".join(sorted(counter.problems)))
    return flops


class _Counter:
    def __init__(self, while_trips: int | None, kernels: Kernels) -> None:
        self._trips, self._kernels = while_trips, kernels
        self.problems: set[str] = set()
        self._rules = {
            "dot_general": _dot_general,
            "conv_general_dilated": _convolution,
            "scan": self._scan,
            "cond": self._cond,
            "while": self._while,
            "shard_map": self._shard_map,
            "pallas_call": self._pallas_call,
        }

    def count(self, jaxpr: Any) -> float:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # closed or not
        return float(sum(self._equation(eqn) for eqn in jaxpr.eqns))

    def _equation(self, eqn: Any) -> float:
        name, params = eqn.primitive.name, eqn.params
        label = str(params.get("name", "")) if name == "pallas_call" else name
        for key in (label, name):
            if key in self._kernels:
                return self._kernels[key](eqn)
        if name in self._rules:
            return self._rules[name](eqn)
        if any(word in name for word in _OPAQUE):
            self.problems.add(f"{name}: foreign code; give its FLOPs in `kernels`")
            return 0.0
        return float(sum(map(self.count, _jaxprs(params))))

    def _scan(self, eqn: Any) -> float:
        return eqn.params["length"] * self.count(eqn.params["jaxpr"])

    def _cond(self, eqn: Any) -> float:
        return max(map(self.count, eqn.params["branches"]))

    def _while(self, eqn: Any) -> float:
        body = self.count(eqn.params["body_jaxpr"])
        test = self.count(eqn.params["cond_jaxpr"])
        if not body + test:
            return 0.0
        if self._trips is None:
            self.problems.add(
                f"a while loop with {body:.3g} FLOPs a round; give while_trips, or write it as a "
                "scan"
            )
            return 0.0
        return self._trips * body + (self._trips + 1) * test

    def _shard_map(self, eqn: Any) -> float:
        mesh, params = eqn.params["mesh"], eqn.params
        # The parameter has had two names.
        axes = params.get("newly_manual_axes", params.get("manual_axes"))
        shards = math.prod(mesh.shape[axis] for axis in axes)
        return shards * self.count(eqn.params["jaxpr"])

    def _pallas_call(self, eqn: Any) -> float:
        estimate = eqn.params.get("cost_estimate")
        if estimate is not None:
            return float(estimate.flops)
        grid = eqn.params["grid_mapping"].grid
        if not all(isinstance(size, int) for size in grid):
            self.problems.add(f"Pallas kernel {eqn.params.get('name')}: its grid is not static")
            return 0.0
        return math.prod(grid) * self.count(eqn.params["jaxpr"])


def _dot_general(eqn: Any) -> float:
    contract = eqn.params["dimension_numbers"][0][0]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)


def _convolution(eqn: Any) -> float:
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    per_output = math.prod(size for i, size in enumerate(kernel) if i != spec[0])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Every program among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                yield item
