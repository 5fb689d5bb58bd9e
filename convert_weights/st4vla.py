"""The whole policy under upstream's keys: rules, run folders, sizes from shapes.

Upstream's state dict is the common namespace of the converters: every source is brought to its
keys (in-memory VLM convention), and one list of rules leads from there to our parameters and back.
Facts: spec/upstream.md section 2.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert_weights.dinov2 import MASK_TOKEN, check_dino
from convert_weights.dinov2 import config_from_shapes as dino_config_from_shapes
from convert_weights.qwen2_5_vl import (
    VlmFolder,
    canonical,
    check_vlm,
    count_layers,
    vlm_rules,
)
from convert_weights.rules import (
    ConversionError,
    Rule,
    bridge_rules,
    check_bijection,
    check_keys,
    dino_rules,
    dit_rules,
    prefixed,
)
from convert_weights.safetensors_io import LazyTensor, Tensors, open_weights, shapes
from st4vla_jax.config import (
    DIT_PRESETS,
    OWN_PRESETS,
    BridgeConfig,
    ConfigError,
    DitConfig,
    ModelConfig,
)

VLM = "qwen_vl_interface.model."
DINO = "dino_encoder.body."
DIT = "action_model.net."
HISTORY = ("history_embedder.linear.weight", "history_embedder.linear.bias")
UPSTREAM_CONFIG = "upstream_config.yaml"  # in meta: the source's config.yaml, to build on
# What config.yaml of an export calls a DINOv2 or DiT that upstream has no name for.
CUSTOM_DINO, CUSTOM_DIT = "custom", "DiT-CUSTOM"
CHECKPOINT_NAME = re.compile(r"steps_(\d+)_(pytorch_)?model\.(pt|safetensors)|pytorch_model\.pt")


def policy_rules(cfg: ModelConfig) -> list[Rule]:
    """Every parameter of the policy: upstream key <-> path in our parameter dict."""
    rules = prefixed(vlm_rules(cfg.vision, cfg.text), VLM, "")
    if cfg.has_action:
        rules += prefixed(dino_rules(cfg.dino), DINO, "dino/")
        bridge = bridge_rules(cfg.bridge, cfg.text.hidden_size, cfg.dino.hidden_size)
        rules += prefixed(bridge, "", "bridge/")
        rules += prefixed(dit_rules(cfg.dit), DIT, "dit/")
    check_bijection(rules)
    return rules


def check_dtypes(rules: list[Rule], tensors: Mapping[str, LazyTensor], where: str) -> None:
    """All layers of a stacked parameter must have one dtype, or stacking would round.

    Raises:
      ConversionError: naming every parameter whose layers differ.
    """
    problems = []
    for rule in rules:
        kinds = {str(tensors[key].dtype) for key in rule.torch_keys if key in tensors}
        if len(kinds) > 1:
            problems.append(f"{rule.torch} has dtypes {', '.join(sorted(kinds))}")
    if problems:
        text = "\n  ".join(problems)
        raise ConversionError(f"{where}: layers of one stack differ in dtype\n  {text}")


_ABSENT: Any = object()
_COUNT = "an integer above 0"
# Values of config.yaml that are read, besides those that `_cross_check` compares with the tensors.
_EXPECTED = {
    "framework.qwenvl.base_vlm": (str, "text"),
    "framework.dino.num_heads": (int, _COUNT),
    "framework.layer_qformer.num_heads": (int, _COUNT),
    "framework.layer_qformer.qformer_start_layer": (int, "an integer"),
    "framework.layer_qformer.qformer_end_layer": (int, "an integer"),
    "framework.action_model.num_heads": (int, _COUNT),
    "datasets.vla_data.CoT_prompt": (str, "text"),
    "datasets.vla_data.image_size": (list, "two integers above 0, width and height"),
}
# Null where upstream, or an export of ours, writes it for "not given".
_NULLABLE = {
    "framework.qwenvl.base_vlm",
    "framework.dino.num_heads",
    "framework.layer_qformer.num_heads",
    "framework.action_model.num_heads",
    "datasets.vla_data.image_size",
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Numbers of heads, which no shape tells; None asks the config, then the preset's width."""

    dino: int | None = None
    qformer: int | None = None
    dit: int | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """Checked tensors of a whole policy.

    Attributes:
      config: sizes, from shapes.
      tensors: under upstream's keys; exactly those that `policy_rules` names.
      passthrough: under upstream's keys, what only a conversion back needs.
      stored_head: a Hugging Face folder stored a tied output head a second time (upstream's
        files always do, and Hugging Face's do not as a rule).
    """

    config: ModelConfig
    tensors: Tensors
    passthrough: dict[str, np.ndarray]
    stored_head: bool = False


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """An upstream run folder around one weight file."""

    weights: Path
    config: dict[str, Any]

    @property
    def root(self) -> Path:
        return self.weights.parents[1]

    @property
    def config_file(self) -> str:
        return str(self.root / "config.yaml")

    @property
    def step(self) -> int | None:
        match = CHECKPOINT_NAME.fullmatch(self.weights.name)
        return int(match[1]) if match and match[1] else None

    def value(self, path: str, default: Any = None) -> Any:
        """The config's value at a dotted path."""
        node: Any = self.config
        for name in path.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return default
            node = node[name]
        return node


def find_run(weights: Path | str) -> RunFolder:
    """The run folder of ``<run>/checkpoints/steps_N_*`` or ``<run>/final_model/*``.

    Raises:
      ConversionError: no such file, another name, or no readable config.yaml two levels up.
    """
    weights = Path(weights).absolute()
    if not weights.is_file():
        raise ConversionError(f"{weights}: no such file (give the weight file of a run folder)")
    if not CHECKPOINT_NAME.fullmatch(weights.name):
        raise ConversionError(
            f"{weights}: expected steps_<N>_pytorch_model.pt, steps_<N>_model.safetensors or "
            "pytorch_model.pt"
        )
    path = weights.parents[1] / "config.yaml"
    if not path.exists():
        raise ConversionError(
            f"{path}: no such file; a run folder holds config.yaml two levels above its weights"
        )
    config = read_yaml(path)
    if not isinstance(config.get("framework"), dict):
        raise ConversionError(f"{path}: no upstream config (no section `framework`)")
    run = RunFolder(weights, config)
    if problems := _wrong_types(run):
        raise ConversionError("\n  ".join([f"{path}: has values of a wrong type", *problems]))
    return run


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; raises ConversionError."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConversionError(f"{path}: not readable as YAML ({error})") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: holds no mapping of keys to values")
    return config


def _wrong_types(run: RunFolder) -> list[str]:
    """Values of config.yaml that cannot be what they are read as."""
    problems = []
    for name, (kind, text) in _EXPECTED.items():
        value = run.value(name, _ABSENT)
        if value is _ABSENT or (value is None and name in _NULLABLE):
            continue
        if type(value) is not kind or (text == _COUNT and value < 1):
            problems.append(f"{name} is {value!r}, expected {text}")
    return problems


def read_run(run: RunFolder, folder: VlmFolder, heads: Heads = Heads()) -> Policy:
    """Opens and checks a run's weights.

    Args:
      run: the run folder.
      folder: the base VLM's Hugging Face folder, for its config.
      heads: what the user said about heads.

    Raises:
      ConversionError: shapes and config.yaml or the VLM's config disagree (both values named), or
        missing, extra and misshapen keys.
    """
    where = str(run.weights)
    parts = _split_prefixes(open_weights(run.weights), where)
    vlm, _ = check_vlm(
        canonical(parts[VLM], where), folder.vision, folder.text, where, folder.config_file
    )
    dino_heads = heads.dino or run.value("framework.dino.num_heads")
    dino_cfg = dino_config_from_shapes(shapes(parts[DINO]), where, dino_heads)
    dino, mask_token = check_dino(parts[DINO], dino_cfg, where)
    rest = parts[""]
    dit_tensors = {k: t for k, t in parts[DIT].items() if k not in HISTORY}
    dit_cfg = _dit_config(shapes(dit_tensors), run, heads.dit)
    bridge_cfg = _bridge_config(shapes(rest), run, folder.text.num_hidden_layers, heads.qformer)
    try:
        cfg = ModelConfig(folder.vision, folder.text, dino_cfg, bridge_cfg, dit_cfg).check()
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from None
    _cross_check(cfg, shapes(rest), run)
    bridge = bridge_rules(bridge_cfg, cfg.text.hidden_size, dino_cfg.hidden_size)
    check_keys(bridge, shapes(rest), where)
    check_keys(dit_rules(dit_cfg), shapes(dit_tensors), where)
    passthrough = {DIT + k: parts[DIT][k].read() for k in HISTORY if k in parts[DIT]}
    if mask_token is not None:
        passthrough[DINO + MASK_TOKEN] = mask_token
    tensors = {VLM + k: t for k, t in vlm.items()} | {DINO + k: t for k, t in dino.items()}
    tensors |= rest | {DIT + k: t for k, t in dit_tensors.items()}
    check_dtypes(policy_rules(cfg), tensors, where)
    return Policy(cfg, tensors, passthrough)


def _split_prefixes(tensors: Tensors, where: str) -> dict[str, Tensors]:
    """Tensors by outer prefix, which is taken off; "" holds layer_qformer.* and dino_pro.*."""
    parts: dict[str, Tensors] = {VLM: {}, DINO: {}, DIT: {}, "": {}}
    for key, tensor in tensors.items():
        prefix = next(p for p in parts if key.startswith(p))
        parts[prefix][key.removeprefix(prefix)] = tensor
    empty = [prefix for prefix, part in parts.items() if prefix and not part]
    if empty:
        raise ConversionError(f"{where}: no upstream policy, has no keys below {', '.join(empty)}")
    return parts


# --- Sizes --------------------------------------------------------------------------------------


def _need(shape: Mapping[str, tuple], keys: dict[str, int], where: str) -> None:
    bad = [key for key, rank in keys.items() if len(shape.get(key, ())) != rank]
    if bad:
        raise ConversionError(f"{where}: lacks or misshapes {', '.join(bad)}")


def _dit_config(shape: Mapping[str, tuple], run: RunFolder, num_heads: int | None) -> DitConfig:
    where = str(run.weights)
    tell = {
        "positional_embedding": 2, "z_embedder.uncondition": 2, "x_embedder.linear.weight": 2,
        "t_embedder.mlp.0.weight": 2, "blocks.0.mlp.fc1.weight": 2,
    }  # fmt: skip
    try:
        _need(shape, tell, where)
    except ConversionError as error:
        raise ConversionError(f"{error} (below {DIT})") from None
    width, action_dim = shape["x_embedder.linear.weight"]
    queries = shape["z_embedder.uncondition"][0]
    presets = {c.hidden_size: c.num_heads for n, c in DIT_PRESETS.items() if n not in OWN_PRESETS}
    num_heads = num_heads or run.value("framework.action_model.num_heads") or presets.get(width)
    if not num_heads:
        raise ConversionError(
            f"{where}: a DiT of width {width} is none of {sorted(presets)}, so its number of heads "
            "is unknown; give --dit-heads"
        )
    return DitConfig(
        depth=count_layers(shape, "blocks."),
        hidden_size=width,
        num_heads=num_heads,
        mlp_ratio=shape["blocks.0.mlp.fc1.weight"][0] // width,
        num_condition_tokens=queries,
        chunk=shape["positional_embedding"][0] - queries,
        action_dim=action_dim,
        frequency_size=shape["t_embedder.mlp.0.weight"][1],
    )


def _bridge_config(
    shape: Mapping[str, tuple], run: RunFolder, vlm_layers: int, num_heads: int | None
) -> BridgeConfig:
    where = str(run.weights)
    need = {"layer_qformer.query_tokens": 2, "layer_qformer.layers.0.mlp.0.weight": 2}
    _need(shape, need, where)
    layers = count_layers(shape, "layer_qformer.layers.")
    start = run.value("framework.layer_qformer.qformer_start_layer", vlm_layers)
    end = run.value("framework.layer_qformer.qformer_end_layer", start + layers)
    if end - start != layers:
        raise ConversionError(
            f"{where}: framework.layer_qformer reads layers {start} to {end} in {run.config_file} "
            f"but the tensors hold {layers} Q-Former layers"
        )
    queries, width = shape["layer_qformer.query_tokens"]
    state = {}
    if len(fc1 := shape.get("state_encoder.fc1.weight", ())) == 2:  # of an export of ours
        state = {"state_hidden_size": fc1[0], "state_dim": fc1[1]}
    return BridgeConfig(
        start_layer=start,
        end_layer=end,
        num_queries=queries,
        hidden_size=width,
        num_heads=num_heads or run.value("framework.layer_qformer.num_heads") or 8,
        mlp_ratio=shape["layer_qformer.layers.0.mlp.0.weight"][0] // width,
        **state,
    )


def _cross_check(cfg: ModelConfig, shape: Mapping[str, tuple], run: RunFolder) -> None:
    """What config.yaml says against what the shapes say; all disagreements at once."""
    dino = {384: "s", 768: "b", 1024: "l", 1536: "g"}.get(cfg.dino.hidden_size)
    dit = {c.hidden_size: n for n, c in DIT_PRESETS.items()}.get(cfg.dit.hidden_size)
    window = run.value("framework.action_model.future_action_window_size")
    seen = {
        "framework.dino.dino_backbone": f"dinov2_vit{dino}14" if dino else None,
        "framework.action_model.action_model_type": f"DiT-{dit.upper()}" if dit else None,
        "framework.action_model.action_dim": cfg.dit.action_dim,
        "framework.action_model.future_action_window_size": (
            None if window is None else cfg.dit.chunk - 1
        ),
        "framework.action_model.past_action_window_size": 0,
        "framework.action_model.action_horizon": cfg.dit.chunk,  # starVLA's name for it
        "framework.layer_qformer.num_query_tokens": cfg.bridge.num_queries,
        "framework.layer_qformer.input_dim": cfg.text.hidden_size,
        "framework.layer_qformer.ouptput_dim": cfg.bridge.hidden_size,  # upstream's spelling
    }
    problems = [
        f"{name} is {said} in {run.config_file} but {found} in the tensors"
        for name, found in seen.items()
        if (said := run.value(name)) not in (None, CUSTOM_DINO, CUSTOM_DIT)
        and found not in (None, said)
    ]
    if problems:
        raise ConversionError(f"{run.weights}: does not fit its config\n  " + "\n  ".join(problems))
