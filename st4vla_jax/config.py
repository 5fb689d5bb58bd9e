"""Model configs: frozen dataclasses with presets, checked before anything is built.

Sizes are presets in code (`model_config(vlm="3b", dino="s", dit="b")`); a checkpoint's sizes are
read from its shapes by convert_weights.  How to compute is not here but in runtime.py, whose names
are importable from here too.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from st4vla_jax.batch import VISION_BIN
from st4vla_jax.runtime import FLOAT32 as FLOAT32
from st4vla_jax.runtime import DTypes as DTypes
from st4vla_jax.runtime import Runtime as Runtime


class ConfigError(ValueError):
    """A config that cannot be built; lists every problem found."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Qwen2.5-VL vision tower (HF Qwen2_5_VLVisionConfig; names as there).

    Attributes:
      from_scratch: differs: for towers that learn from nothing (`qwen_vision.from_scratch_stem`);
        no Qwen2.5-VL is built so.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    out_hidden_size: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    from_scratch: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merged_size(self) -> int:
        return self.hidden_size * self.spatial_merge_size**2

    def problems(self) -> list[str]:
        window = (self.window_size // self.patch_size) ** 2
        outside = any(not 0 <= i < self.depth for i in self.fullatt_block_indexes)
        checks = {
            f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}": (
                self.hidden_size % self.num_heads
            ),
            f"head_dim {self.head_dim} is not a multiple of 4 (2-D rotary)": self.head_dim % 4,
            f"fullatt_block_indexes {self.fullatt_block_indexes} reach past depth {self.depth}": (
                outside
            ),
            f"a window of {window} patches is not one bin of {VISION_BIN}": window != VISION_BIN,
            "spatial_merge_size must be 2": self.spatial_merge_size != 2,
            f"from_scratch: hidden_size {self.hidden_size} is no multiple of 4": (
                self.from_scratch and self.hidden_size % 4
            ),
        }
        return [f"vision: {text}" for text, bad in checks.items() if bad]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Qwen2.5 decoder (HF Qwen2_5_VLTextConfig; names as there)."""

    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 11_008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    def problems(self) -> list[str]:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        checks = {
            f"{heads} heads are not a multiple of {groups} key/value heads": heads % groups,
            f"mrope_section {self.mrope_section} does not sum to head_dim {self.head_dim} / 2": (
                2 * sum(self.mrope_section) != self.head_dim
            ),
        }
        return [f"text: {text}" for text, bad in checks.items() if bad]


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """DINOv2 (torch.hub facebookresearch/dinov2, no registers).

    Attributes:
      pretrain_size: side of the images that the position embedding was learned on.
      image_size: side of the images given to it here.
      from_scratch: differs: patches centred on their image, fixed positions and kernels of unit
        gain, as in `VisionConfig`; no DINOv2 is built so.
    """

    depth: int = 12
    hidden_size: int = 384
    num_heads: int = 6
    mlp_size: int = 1536
    swiglu: bool = False  # the g model's feed-forward
    patch_size: int = 14
    pretrain_size: int = 518
    image_size: int = 224
    norm_eps: float = 1e-6
    from_scratch: bool = False

    @property
    def tokens_per_view(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def problems(self) -> list[str]:
        sizes = (self.pretrain_size, self.image_size)
        checks = {
            f"sizes {sizes} are not multiples of patch_size {self.patch_size}": (
                any(s % self.patch_size for s in sizes)
            ),
            f"hidden_size {self.hidden_size} is not a multiple of {self.num_heads} heads": (
                self.hidden_size % self.num_heads
            ),
            f"from_scratch: hidden_size {self.hidden_size} is no multiple of 4": (
                self.from_scratch and self.hidden_size % 4
            ),
        }
        return [f"dino: {text}" for text, bad in checks.items() if bad]


@dataclasses.dataclass(frozen=True)
class BridgeConfig:
    """Gradient decay and layer-wise Querying Transformer (upstream QFormer.py).

    Attributes:
      start_layer, end_layer: half-open range of hidden-state ids (0 = embeddings, last = after
        the final norm) that the Q-Former's blocks read, one block for each.
      gradient_scale: factor on the action loss's gradient into the VLM (paper 0.5; 1.0 is none).
      mask_padding: False attends to padded slots too, as upstream does.
      state_dim: proprioception dimensions; 0 turns the state encoder off.
    """

    start_layer: int = 36
    end_layer: int = 37
    num_queries: int = 64
    hidden_size: int = 768
    num_heads: int = 8
    mlp_ratio: int = 4
    dropout: float = 0.1
    gradient_scale: float = 0.5
    mask_padding: bool = True
    state_dim: int = 0
    state_hidden_size: int = 512

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.start_layer

    def problems(self) -> list[str]:
        checks = {
            f"layers {self.start_layer}..{self.end_layer} (half open) are empty": (
                self.num_layers < 1 or self.start_layer < 0
            ),
            f"hidden_size {self.hidden_size} is not a multiple of {self.num_heads} heads": (
                self.hidden_size % self.num_heads
            ),
            f"dropout {self.dropout} is not in [0, 1)": not 0 <= self.dropout < 1,
            f"gradient_scale {self.gradient_scale} is negative": self.gradient_scale < 0,
        }
        return [f"bridge: {text}" for text, bad in checks.items() if bad]


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """Diffusion Transformer and its 100-step diffusion (upstream DiT_modules)."""

    depth: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    mlp_ratio: int = 4
    num_condition_tokens: int = 64
    chunk: int = 16
    action_dim: int = 7
    condition_dropout: float = 0.1
    frequency_size: int = 256
    norm_eps: float = 1e-6
    diffusion_steps: int = 100

    def problems(self) -> list[str]:
        checks = {
            f"hidden_size {self.hidden_size} is not a multiple of {self.num_heads} heads": (
                self.hidden_size % self.num_heads
            ),
            f"chunk {self.chunk} and action_dim {self.action_dim} must be at least 1": (
                min(self.chunk, self.action_dim) < 1
            ),
        }
        return [f"dit: {text}" for text, bad in checks.items() if bad]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole policy; ``dino``, ``bridge`` and ``dit`` are None for a VLM alone (stage 1)."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    dino: DinoConfig | None = DinoConfig()
    bridge: BridgeConfig | None = BridgeConfig()
    dit: DitConfig | None = DitConfig()

    @property
    def has_action(self) -> bool:
        return self.dit is not None

    def check(self) -> ModelConfig:
        """Returns self, or raises ConfigError with every inconsistency."""
        parts = [p for p in (self.vision, self.text, self.dino, self.bridge, self.dit) if p]
        problems = [text for part in parts for text in part.problems()]
        if self.vision.out_hidden_size != self.text.hidden_size:
            problems.append(
                f"vision.out_hidden_size {self.vision.out_hidden_size} is not text.hidden_size "
                f"{self.text.hidden_size}"
            )
        action = (self.dino, self.bridge, self.dit)
        if any(action) and not all(action):
            problems.append("dino, bridge and dit must be given together or all be None")
        elif all(action):
            problems += self._action_problems()
        if problems:
            raise ConfigError("model config:\n  " + "\n  ".join(problems))
        return self

    def _action_problems(self) -> list[str]:
        last = self.text.num_hidden_layers + 1
        checks = {
            f"bridge.end_layer {self.bridge.end_layer} is past the last hidden state "
            f"({last} of them, ids 0..{last - 1})": self.bridge.end_layer > last,
            f"bridge.hidden_size {self.bridge.hidden_size} is not dit.hidden_size "
            f"{self.dit.hidden_size}": self.bridge.hidden_size != self.dit.hidden_size,
            f"bridge.num_queries {self.bridge.num_queries} is not dit.num_condition_tokens "
            f"{self.dit.num_condition_tokens}": (
                self.bridge.num_queries != self.dit.num_condition_tokens
            ),
        }
        return [text for text, bad in checks.items() if bad]


OWN_PRESETS = ("tiny", "tabletop")  # of no released model
_VISION_LARGE = VisionConfig(intermediate_size=3456)
_BIG_TEXT = TextConfig(vocab_size=152_064, tie_word_embeddings=False)

VLM_PRESETS: dict[str, tuple[VisionConfig, TextConfig]] = {
    "3b": (VisionConfig(), TextConfig()),
    "7b": (
        VisionConfig(out_hidden_size=3584),
        dataclasses.replace(
            _BIG_TEXT, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4,
        ),
    ),
    "32b": (
        dataclasses.replace(_VISION_LARGE, out_hidden_size=5120),
        dataclasses.replace(
            _BIG_TEXT, hidden_size=5120, intermediate_size=27_648, num_hidden_layers=64,
            num_attention_heads=40, num_key_value_heads=8,
        ),
    ),
    "72b": (
        dataclasses.replace(_VISION_LARGE, out_hidden_size=8192),
        dataclasses.replace(
            _BIG_TEXT, hidden_size=8192, intermediate_size=29_568, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8,
        ),
    ),
    # Byte-level tokenizer (data/tokenizer.py): 256 bytes + 22 special tokens, rounded up.
    "tiny": (
        VisionConfig(
            depth=4, hidden_size=64, intermediate_size=128, num_heads=4,
            fullatt_block_indexes=(1, 3), out_hidden_size=128,
        ),
        TextConfig(
            vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, mrope_section=(4, 6, 6),
        ),
    ),
    # The built-in tabletop: learns to see from scratch, with tabletop/words.py's tokenizer.
    "tabletop": (
        VisionConfig(
            depth=2, hidden_size=96, intermediate_size=192, num_heads=4,
            fullatt_block_indexes=(1,), out_hidden_size=128, from_scratch=True,
        ),
        TextConfig(
            vocab_size=768, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, head_dim=32, mrope_section=(4, 6, 6),
        ),
    ),
}  # fmt: skip

DINO_PRESETS: dict[str, DinoConfig] = {
    "s": DinoConfig(),
    "b": DinoConfig(hidden_size=768, num_heads=12, mlp_size=3072),
    "l": DinoConfig(depth=24, hidden_size=1024, num_heads=16, mlp_size=4096),
    "g": DinoConfig(depth=40, hidden_size=1536, num_heads=24, mlp_size=4096, swiglu=True),
    "tiny": DinoConfig(
        depth=2, hidden_size=64, num_heads=4, mlp_size=128, pretrain_size=112, image_size=56
    ),
    "tabletop": DinoConfig(
        depth=2,
        hidden_size=96,
        num_heads=4,
        mlp_size=192,
        pretrain_size=112,
        image_size=112,
        from_scratch=True,
    ),
}

DIT_PRESETS: dict[str, DitConfig] = {
    "s": DitConfig(depth=6, hidden_size=384, num_heads=4),
    "b": DitConfig(),
    "l": DitConfig(depth=24, hidden_size=1024, num_heads=16),
    "tiny": DitConfig(depth=2, hidden_size=64, num_heads=4, num_condition_tokens=16, chunk=8),
    "tabletop": DitConfig(depth=3, hidden_size=128, num_heads=4, num_condition_tokens=16, chunk=8),
}


def _pick(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown {what} preset {name!r}{hint} (there are {', '.join(table)})")
    return table[name]


def model_config(
    vlm: str = "3b",
    dino: str | None = "s",
    dit: str | None = "b",
    *,
    bridge: dict[str, Any] | None = None,
    action: dict[str, Any] | None = None,
) -> ModelConfig:
    """Builds a checked config from presets; any combination fits together.

    Args:
      vlm: name in VLM_PRESETS.
      dino: name in DINO_PRESETS, or None together with ``dit`` for the VLM alone.
      dit: name in DIT_PRESETS.
      bridge: overrides of BridgeConfig fields (default: reads the VLM's last hidden state, as
        wide as the DiT).
      action: overrides of DitConfig fields, e.g. ``{"chunk": 8, "action_dim": 8}``.

    Raises:
      ConfigError: an unknown preset, or every inconsistency of the result.
    """
    vision, text = _pick(VLM_PRESETS, vlm, "vlm")
    if dino is None and dit is None:
        return ModelConfig(vision, text, None, None, None).check()
    if None in (dino, dit):
        raise ConfigError("dino and dit must be given together or both be None")
    dit_cfg = dataclasses.replace(_pick(DIT_PRESETS, dit, "dit"), **(action or {}))
    last = text.num_hidden_layers
    fields = {
        "start_layer": last,
        "end_layer": last + 1,
        "hidden_size": dit_cfg.hidden_size,
        "num_queries": dit_cfg.num_condition_tokens,
    }
    bridge_cfg = BridgeConfig(**(fields | (bridge or {})))
    return ModelConfig(vision, text, _pick(DINO_PRESETS, dino, "dino"), bridge_cfg, dit_cfg).check()


_PARTS = {
    "vision": VisionConfig, "text": TextConfig, "dino": DinoConfig, "bridge": BridgeConfig,
    "dit": DitConfig,
}  # fmt: skip
# Checkpoints written before these were there say nothing of them, and mean the default.
_LATER = {"vision.from_scratch", "dino.from_scratch"}


def to_dict(cfg: ModelConfig) -> dict[str, Any]:
    """JSON-able dict of a config, as stored in a checkpoint's meta."""
    return dataclasses.asdict(cfg)


def from_dict(tree: dict[str, Any]) -> ModelConfig:
    """Inverse of `to_dict`; unknown or missing keys raise ConfigError, all listed.

    Flags that older checkpoints do not know may be missing.
    """
    problems, parts = [f"unknown section {k!r}" for k in tree if k not in _PARTS], {}
    for part, cls in _PARTS.items():
        if part not in tree:
            problems.append(f"missing section {part!r}")
            continue
        if (values := tree[part]) is None:
            parts[part] = None
            continue
        names = {f.name for f in dataclasses.fields(cls)}
        problems += [f"unknown key {part}.{k}" for k in values if k not in names]
        missing = {f"{part}.{k}" for k in names if k not in values} - _LATER
        problems += [f"missing key {key}" for key in sorted(missing)]
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        parts[part] = cls(**known)
    if problems:
        raise ConfigError("model config:\n  " + "\n  ".join(problems))
    return ModelConfig(**parts).check()
