"""The one table of parameter names and layouts, read in both directions.

A `Rule` pairs a torch key with a path in our parameter dict and says how the axes move, in the
manner of einops: ``"(s n h) d -> d s n h"`` splits the torch tensor's first axis into three and
moves the input axis to the front.  Splits, moves and merges are invertible, so a rule cannot lose
anything; `check_bijection` makes sure that the table as a whole does not either.

Torch keys here carry no outer prefix (`st4vla.py` and `qwen2_5_vl.py` add those).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from st4vla_jax.config import BridgeConfig, DinoConfig, DitConfig, TextConfig, VisionConfig

Sizes = Mapping[str, int]


class ConversionError(ValueError):
    """Weights that do not fit; lists every missing, extra and misshapen key."""


def _parse(side: str) -> list[list[str]]:
    """'(s n h) d' -> [['s','n','h'], ['d']]; '1' is an axis of size one."""
    groups = re.findall(r"\(([^)]*)\)|(\S+)", side)
    return [inner.split() if inner else [single] for inner, single in groups]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter.

    Attributes:
      torch: torch key; ``{i}`` stands for the layer number of a stacked parameter.
      jax: path in the parameter dict, joined by "/".
      layout: axes in torch -> axes here; axes named 1 have size one and exist on one side only.
      sizes: size of every named axis.
      layers: number of layers if stacked (leading axis here, ``{i}`` in the torch key), else None.
    """

    torch: str
    jax: str
    layout: str
    sizes: tuple[tuple[str, int], ...]
    layers: int | None = None

    @property
    def torch_keys(self) -> list[str]:
        if self.layers is None:
            return [self.torch]
        return [self.torch.format(i=i) for i in range(self.layers)]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one torch tensor (of one layer)."""
        return self._shape(0)

    @property
    def jax_shape(self) -> tuple[int, ...]:
        """Shape of the parameter here, with the layer axis if stacked."""
        stacked = () if self.layers is None else (self.layers,)
        return stacked + self._shape(1)

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """One torch tensor to its layout here (a view where possible)."""
        return self._move(tensor, 0, 1)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_jax`; ``array`` is one layer's slice if stacked."""
        return self._move(array, 1, 0)

    def _sides(self) -> list[list[list[str]]]:
        return [_parse(side) for side in self.layout.split("->")]

    def _shape(self, side: int) -> tuple[int, ...]:
        size = dict(self.sizes) | {"1": 1}
        return tuple(math.prod(size[a] for a in group) for group in self._sides()[side])

    def _move(self, x: np.ndarray, source: int, target: int) -> np.ndarray:
        size = dict(self.sizes)
        sides = [[a for group in side for a in group if a != "1"] for side in self._sides()]
        split = x.reshape([size[a] for a in sides[source]])
        return split.transpose([sides[source].index(a) for a in sides[target]]).reshape(
            self._shape(target)
        )


def _make(sizes: Sizes, rows: Iterable[tuple], layers: int | None = None) -> list[Rule]:
    """Rules from rows (torch key, jax path, layout); sizes are narrowed to each layout's axes."""
    rules = []
    for torch, jax, layout in rows:
        axes = sorted(set(re.findall(r"[a-z]\w*", layout)))
        rules.append(Rule(torch, jax, layout, tuple((a, sizes[a]) for a in axes), layers))
    return rules


def _linear(torch: str, jax: str, layout: str, bias: str | None) -> list[tuple[str, str, str]]:
    rows = [(f"{torch}.weight", f"{jax}/kernel", layout)]
    return rows + ([(f"{torch}.bias", f"{jax}/bias", bias)] if bias else [])


def _norm(torch: str, jax: str, axis: str = "d", bias: bool = False) -> list[tuple[str, str, str]]:
    rows = [(f"{torch}.weight", f"{jax}/scale", f"{axis} -> {axis}")]
    return rows + ([(f"{torch}.bias", f"{jax}/bias", f"{axis} -> {axis}")] if bias else [])


_FUSED_QKV = ("(s n h) d -> d s n h", "(s n h) -> s n h")
_OUT_PROJ = ("d (n h) -> n h d", "d -> d")
_UP = ("f d -> d f", "f -> f")
_DOWN = ("d f -> f d", "d -> d")


def vision_rules(cfg: VisionConfig) -> list[Rule]:
    """Qwen2.5-VL vision tower: torch keys below `visual.`, paths below vlm/."""
    sizes = {
        "d": cfg.hidden_size, "s": 3, "n": cfg.num_heads, "h": cfg.head_dim,
        "f": cfg.intermediate_size, "m": cfg.merged_size, "o": cfg.out_hidden_size,
        "c": cfg.in_channels, "t": cfg.temporal_patch_size, "y": cfg.patch_size,
        "x": cfg.patch_size, "k": cfg.merged_size,
    }  # fmt: skip
    block = [
        *_norm("norm1", "norm1"),
        *_norm("norm2", "norm2"),
        *_linear("attn.qkv", "attn/qkv", *_FUSED_QKV),
        *_linear("attn.proj", "attn/proj", *_OUT_PROJ),
        *_linear("mlp.gate_proj", "mlp/gate_proj", *_UP),
        *_linear("mlp.up_proj", "mlp/up_proj", *_UP),
        *_linear("mlp.down_proj", "mlp/down_proj", *_DOWN),
    ]
    top = [
        ("visual.patch_embed.proj.weight", "visual/patch_embed/proj/kernel",
         "d c t y x -> t (c y x) d"),
        *_norm("visual.merger.ln_q", "visual/merger/ln_q"),
        *_linear("visual.merger.mlp.0", "visual/merger/mlp_0", "k m -> m k", "k -> k"),
        *_linear("visual.merger.mlp.2", "visual/merger/mlp_2", "o k -> k o", "o -> o"),
    ]  # fmt: skip
    return _make(sizes, top) + _stacked(
        sizes, "visual.blocks.{i}.", "visual/blocks/", block, cfg.depth
    )


def text_rules(cfg: TextConfig) -> list[Rule]:
    """Qwen2.5 decoder: torch keys `language_model.*` and `lm_head.*`, paths below vlm/."""
    sizes = {
        "d": cfg.hidden_size, "n": cfg.num_attention_heads, "g": cfg.num_key_value_heads,
        "h": cfg.head_dim, "f": cfg.intermediate_size, "v": cfg.vocab_size,
    }  # fmt: skip
    block = [
        *_norm("input_layernorm", "input_layernorm"),
        *_norm("post_attention_layernorm", "post_attention_layernorm"),
        *_linear("self_attn.q_proj", "self_attn/q_proj", "(n h) d -> d n h", "(n h) -> n h"),
        *_linear("self_attn.k_proj", "self_attn/k_proj", "(g h) d -> d g h", "(g h) -> g h"),
        *_linear("self_attn.v_proj", "self_attn/v_proj", "(g h) d -> d g h", "(g h) -> g h"),
        *_linear("self_attn.o_proj", "self_attn/o_proj", "d (n h) -> n h d", None),
        *_linear("mlp.gate_proj", "mlp/gate_proj", "f d -> d f", None),
        *_linear("mlp.up_proj", "mlp/up_proj", "f d -> d f", None),
        *_linear("mlp.down_proj", "mlp/down_proj", "d f -> f d", None),
    ]
    top = [
        ("language_model.embed_tokens.weight", "language_model/embed_tokens/embedding",
         "v d -> v d"),
        *_norm("language_model.norm", "language_model/norm"),
    ]  # fmt: skip
    if not cfg.tie_word_embeddings:
        top.append(("lm_head.weight", "lm_head/embedding", "v d -> v d"))
    layers = cfg.num_hidden_layers
    return _make(sizes, top) + _stacked(
        sizes, "language_model.layers.{i}.", "language_model/blocks/", block, layers
    )


def dino_rules(cfg: DinoConfig) -> list[Rule]:
    """torch.hub DINOv2 keys (mask_token is passed through, not a parameter here)."""
    sizes = {
        "d": cfg.hidden_size, "s": 3, "n": cfg.num_heads, "h": cfg.hidden_size // cfg.num_heads,
        "f": cfg.mlp_size, "p": 1 + (cfg.pretrain_size // cfg.patch_size) ** 2, "c": 3,
        "y": cfg.patch_size, "x": cfg.patch_size, "w": 2,
    }  # fmt: skip
    if cfg.swiglu:
        mlp = [
            *_linear("mlp.w12", "mlp/w12", "(w f) d -> d w f", "(w f) -> w f"),
            *_linear("mlp.w3", "mlp/w3", *_DOWN),
        ]
    else:
        mlp = [*_linear("mlp.fc1", "mlp/fc1", *_UP), *_linear("mlp.fc2", "mlp/fc2", *_DOWN)]
    block = [
        *_norm("norm1", "norm1", bias=True),
        *_norm("norm2", "norm2", bias=True),
        *_linear("attn.qkv", "attn/qkv", *_FUSED_QKV),
        *_linear("attn.proj", "attn/proj", *_OUT_PROJ),
        ("ls1.gamma", "ls1/gamma", "d -> d"),
        ("ls2.gamma", "ls2/gamma", "d -> d"),
        *mlp,
    ]
    top = [
        ("cls_token", "cls_token", "1 1 d -> d"),
        ("pos_embed", "pos_embed", "1 p d -> p d"),
        *_linear("patch_embed.proj", "patch_embed/proj", "d c y x -> (c y x) d", "d -> d"),
        *_norm("norm", "norm", bias=True),
    ]
    return _make(sizes, top) + _stacked(sizes, "blocks.{i}.", "blocks/", block, cfg.depth)


def bridge_rules(cfg: BridgeConfig, vlm_size: int, dino_size: int) -> list[Rule]:
    """`dino_pro.*` and `layer_qformer.*`; the state encoder, of our own, beside them."""
    sizes = {
        "d": cfg.hidden_size, "e": vlm_size, "b": dino_size, "q": cfg.num_queries, "s": 3,
        "n": cfg.num_heads, "h": cfg.hidden_size // cfg.num_heads,
        "f": cfg.mlp_ratio * cfg.hidden_size, "a": cfg.state_dim, "k": cfg.state_hidden_size,
    }  # fmt: skip
    block = [
        *_norm("norm1", "norm1", bias=True),
        *_norm("norm2", "norm2", bias=True),
        ("cross_attn.in_proj_weight", "cross_attn/in_proj/kernel", _FUSED_QKV[0]),
        ("cross_attn.in_proj_bias", "cross_attn/in_proj/bias", _FUSED_QKV[1]),
        *_linear("cross_attn.out_proj", "cross_attn/out_proj", *_OUT_PROJ),
        *_linear("mlp.0", "mlp_0", *_UP),
        *_linear("mlp.2", "mlp_2", *_DOWN),
    ]
    top = [
        *_linear("dino_pro", "dino_proj", "e b -> b e", "e -> e"),
        *_linear("layer_qformer.proj", "proj", "d e -> e d", "d -> d"),
        ("layer_qformer.query_tokens", "query_tokens", "q d -> q d"),
    ]
    if cfg.state_dim:
        top += [
            *_linear("state_encoder.fc1", "state_encoder/fc1", "k a -> a k", "k -> k"),
            *_linear("state_encoder.fc2", "state_encoder/fc2", "d k -> k d", "d -> d"),
        ]
    return _make(sizes, top) + _stacked(
        sizes, "layer_qformer.layers.{i}.", "blocks/", block, cfg.num_layers
    )


def dit_rules(cfg: DitConfig) -> list[Rule]:
    """`action_model.net.*` (history_embedder is passed through, not a parameter here)."""
    sizes = {
        "d": cfg.hidden_size, "s": 3, "n": cfg.num_heads, "h": cfg.hidden_size // cfg.num_heads,
        "f": cfg.mlp_ratio * cfg.hidden_size, "q": cfg.num_condition_tokens, "a": cfg.action_dim,
        "p": cfg.num_condition_tokens + cfg.chunk, "w": cfg.frequency_size, "k": cfg.hidden_size,
    }  # fmt: skip
    block = [
        *_linear("attn.qkv", "attn/qkv", *_FUSED_QKV),
        *_linear("attn.proj", "attn/proj", *_OUT_PROJ),
        *_linear("mlp.fc1", "mlp/fc1", *_UP),
        *_linear("mlp.fc2", "mlp/fc2", *_DOWN),
    ]
    top = [
        ("positional_embedding", "positional_embedding", "p d -> p d"),
        *_linear("x_embedder.linear", "x_embedder", "d a -> a d", "d -> d"),
        *_linear("t_embedder.mlp.0", "t_embedder/mlp_0", "d w -> w d", "d -> d"),
        *_linear("t_embedder.mlp.2", "t_embedder/mlp_2", "k d -> d k", "k -> k"),
        ("z_embedder.uncondition", "z_embedder/uncondition", "q d -> q d"),
        *_linear("z_embedder.linear", "z_embedder/linear", "k d -> d k", "k -> k"),
        *_linear("final_layer.linear", "final_layer/linear", "a d -> d a", "a -> a"),
    ]
    return _make(sizes, top) + _stacked(sizes, "blocks.{i}.", "blocks/", block, cfg.depth)


def _stacked(sizes: Sizes, torch: str, jax: str, rows: list, layers: int) -> list[Rule]:
    return _make(sizes, [(torch + t, jax + j, layout) for t, j, layout in rows], layers)


def prefixed(rules: Iterable[Rule], torch: str, jax: str) -> list[Rule]:
    """The same rules below an outer torch prefix and an outer path."""
    return [dataclasses.replace(r, torch=torch + r.torch, jax=jax + r.jax) for r in rules]


def check_bijection(rules: list[Rule]) -> None:
    """Raises ConversionError if two rules name the same torch key or the same parameter."""
    for side in (lambda r: r.torch_keys, lambda r: [r.jax]):
        names = [name for rule in rules for name in side(rule)]
        twice = (
            sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        )
        if twice:
            raise ConversionError(f"named by two rules: {twice}")


def check_keys(rules: list[Rule], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Checks torch keys and shapes against the table.

    Raises:
      ConversionError: one message with all missing, extra and misshapen keys of ``where``.
    """
    want = {key: rule.torch_shape for rule in rules for key in rule.torch_keys}
    problems = [f"missing: {k} {want[k]}" for k in want if k not in shapes]
    problems += [f"not expected: {k} {tuple(s)}" for k, s in shapes.items() if k not in want]
    problems += [
        f"wrong shape: {k} is {tuple(shapes[k])}, the model needs {want[k]}"
        for k in want
        if k in shapes and tuple(shapes[k]) != want[k]
    ]
    if problems:
        raise ConversionError(f"{where}: {len(problems)} problems\n  " + "\n  ".join(problems))


def leaves_from_torch(
    rules: list[Rule], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) one parameter at a time; ``read`` gives the tensor of a torch key."""
    for rule in rules:
        if rule.layers is None:
            yield rule.jax, rule.to_jax(read(rule.torch))
            continue
        out = None
        for i, key in enumerate(rule.torch_keys):
            part = rule.to_jax(read(key))
            out = np.empty(rule.jax_shape, part.dtype) if out is None else out
            out[i] = part
        yield rule.jax, out


def tensors_to_torch(rule: Rule, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (torch key, contiguous tensor) of one parameter, layer by layer."""
    parts = [array] if rule.layers is None else array
    for key, part in zip(rule.torch_keys, parts, strict=True):
        yield key, np.ascontiguousarray(rule.to_torch(part))
