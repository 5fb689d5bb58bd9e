"""Qwen2.5-VL: key conventions, Hugging Face config and folders.

Keys are brought to the in-memory convention of transformers >= 4.52, ``model.visual.*``,
``model.language_model.*`` and ``lm_head.weight``.  On disk Hugging Face folders use the older
``visual.*``, ``model.*``, ``lm_head.weight``; both are accepted, and the older one is written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.rules import (
    ConversionError,
    Rule,
    check_keys,
    tensors_to_torch,
    text_rules,
    vision_rules,
)
from convert_weights.safetensors_io import Tensors, open_weights, shapes
from st4vla_jax.checkpoint import HF_CONFIG
from st4vla_jax.config import ModelConfig, TextConfig, VisionConfig

HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"

# What Qwen2.5-VL computes: config.json's name of a choice -> the values that mean it.
_SUPPORTED = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "vision_config.hidden_act": ("silu",),
}
_ROPE_TYPES = ("default", "mrope")

# config.json's name of a token id -> token.
SPECIAL_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}

# Files of a Hugging Face folder that travel along, when there are any.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def canonical_key(key: str) -> str:
    """A key of either convention in the in-memory one."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith("model.") and not key.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{key.removeprefix('model.')}"
    return key


def disk_key(key: str) -> str:
    """A canonical key as Hugging Face folders store it."""
    if key.startswith("model.visual."):
        return key.removeprefix("model.")
    return key.replace("model.language_model.", "model.", 1)


def canonical(tensors: Tensors, where: str) -> Tensors:
    """The same tensors under canonical keys.

    Raises:
      ConversionError: two keys of ``where`` mean the same tensor.
    """
    renamed: Tensors = {}
    twice = []
    for key, tensor in tensors.items():
        name = canonical_key(key)
        if name in renamed:
            twice.append(f"{key} (is {name})")
        renamed[name] = tensor
    if twice:
        raise ConversionError(f"{where}: tensors stored in both conventions: {', '.join(twice)}")
    return renamed


def vlm_rules(vision: VisionConfig, text: TextConfig) -> list[Rule]:
    """Rules from canonical keys to paths below vlm/."""
    rules = vision_rules(vision) + text_rules(text)
    return [
        dataclasses.replace(
            rule,
            torch=rule.torch if rule.torch == HEAD else f"model.{rule.torch}",
            jax=f"vlm/{rule.jax}",
        )
        for rule in rules
    ]


# --- Config -------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConversionError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds no JSON object")
    return value


def config_from_hf(hf: Mapping[str, Any], where: str) -> tuple[VisionConfig, TextConfig]:
    """Reads HF's config.json: flat (as the hub has it) or nested text_config, old or new rope keys.

    Raises:
      ConversionError: another architecture, keys missing, values of a wrong type, or choices that
        this package does not compute; the message names ``where``.
    """
    if hf.get("model_type") not in ("qwen2_5_vl", None):
        raise ConversionError(f"{where}: model_type {hf['model_type']!r} is not 'qwen2_5_vl'")
    text_part = hf | dict(hf.get("text_config") or {})
    vision_part = dict(hf.get("vision_config") or {})
    # Stock configs omit what equals the class default, which for these is no Qwen2.5-VL's size.
    missing = [f"vision_config.{k}" for k in ("hidden_size",) if k not in vision_part]
    need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    missing += [k for k in (*need, "num_attention_heads") if k not in text_part]
    rope = text_part.get("rope_parameters") or text_part.get("rope_scaling") or {}
    if "mrope_section" not in rope:
        missing.append("rope_scaling.mrope_section (or rope_parameters.mrope_section)")
    if missing:
        raise ConversionError(f"{where}: lacks {', '.join(missing)}")
    if problems := _config_problems(text_part, vision_part, rope):
        raise ConversionError("\n  ".join([f"{where}: cannot be used", *problems]))
    fields = {f.name for f in dataclasses.fields(VisionConfig)} - {"rms_norm_eps", "rope_theta"}
    vision = {k: vision_part[k] for k in fields if k in vision_part}
    vision["fullatt_block_indexes"] = tuple(
        vision_part.get("fullatt_block_indexes", (7, 15, 23, 31))
    )
    vision.setdefault("out_hidden_size", text_part["hidden_size"])
    return VisionConfig(**vision), _text_config(hf, text_part, rope)


def _config_problems(text: Mapping, vision: Mapping, rope: Mapping) -> list[str]:
    """Choices that change the numbers, and sizes that are no integers above 0."""
    named = {f"vision_config.{k}": v for k, v in vision.items()} | dict(text)
    problems = [
        f"{name} is {named[name]!r}, supported: {', '.join(map(repr, values))}"
        for name, values in _SUPPORTED.items()
        if name in named and named[name] not in values
    ]
    if type(vision.get("from_scratch", False)) is not bool:
        problems.append("vision_config.from_scratch is neither true nor false")
    for name in ("type", "rope_type"):
        if rope.get(name, "default") not in _ROPE_TYPES:
            problems.append(
                f"{name} {rope[name]!r} of the rotary embedding (rope_scaling or rope_parameters) "
                f"is not supported, only {', '.join(_ROPE_TYPES)}"
            )
    if "sliding_attention" in (text.get("layer_types") or ()):
        problems.append("layer_types asks for sliding_attention, supported: full_attention")
    sizes = {f.name for f in dataclasses.fields(TextConfig) if f.type == "int"}
    # These two may be null, which means: as derived from the others.
    sizes -= {n for n in ("head_dim", "num_key_value_heads") if text.get(n) is None}
    fields = [f.name for f in dataclasses.fields(VisionConfig) if f.type == "int"]
    sizes |= {f"vision_config.{name}" for name in fields}
    problems += [
        f"{name} is {named[name]!r}, expected an integer above 0"
        for name in sorted(sizes & named.keys())
        if type(named[name]) is not int or named[name] < 1
    ]
    return problems


def _text_config(hf: Mapping, part: Mapping, rope: Mapping) -> TextConfig:
    heads = part["num_attention_heads"]
    # transformers 5 keeps the tie at the top level only; older nested files repeat it below.
    tie = hf.get("tie_word_embeddings", part.get("tie_word_embeddings", False))
    return TextConfig(
        vocab_size=part["vocab_size"],
        hidden_size=part["hidden_size"],
        intermediate_size=part["intermediate_size"],
        num_hidden_layers=part["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=part.get("num_key_value_heads") or heads,
        head_dim=part.get("head_dim") or part["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta", part.get("rope_theta", 1e6))),
        mrope_section=tuple(rope["mrope_section"]),
        rms_norm_eps=part.get("rms_norm_eps", 1e-5),  # the default of HF's config class
        tie_word_embeddings=bool(tie),
    )


def hf_config(
    vision: VisionConfig, text: TextConfig, ids: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """A Hugging Face config.json (flat form, as the hub has it) for a VLM that has none.

    Args:
      vision: sizes.
      text: sizes.
      ids: {special token: id} of the tokenizer.
    """
    vision_part = dataclasses.asdict(vision)
    for name in ("rms_norm_eps", "rope_theta"):  # fixed in HF's code
        del vision_part[name]
    if not vision.from_scratch:  # a choice that stock Qwen2.5-VL does not know
        del vision_part["from_scratch"]
    flat = dataclasses.asdict(text)
    section = flat.pop("mrope_section")
    del flat["head_dim"]
    found = {name: ids[token] for name, token in SPECIAL_IDS.items() if token in (ids or {})}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        **flat,
        **found,
        "rope_scaling": {"type": "mrope", "mrope_section": list(section)},
        "max_position_embeddings": 128_000,
        "vision_config": {"model_type": "qwen2_5_vl", "hidden_act": "silu", **vision_part},
    }


# --- Checks -------------------------------------------------------------------------------------


def check_vlm(
    tensors: Tensors, vision: VisionConfig, text: TextConfig, where: str, config: str
) -> tuple[Tensors, bool]:
    """Checks canonical tensors against a config.

    Returns:
      (the tensors the rules name, whether a tied output head was stored as well).

    Raises:
      ConversionError: sizes that disagree with the config (both named), or missing, extra and
        misshapen keys, or a stored head of a tied model that differs from the embedding.
    """
    problems = [
        f"{name} is {have} in {config} but {seen} in the tensors"
        for name, have, seen in _sizes(shapes(tensors), vision, text)
        if have != seen
    ]
    if problems:
        raise ConversionError(f"{where}: does not fit its config\n  " + "\n  ".join(problems))
    stored_head = text.tie_word_embeddings and HEAD in tensors and EMBEDDING in tensors
    if stored_head:
        tensors = dict(tensors)
        if not same_bytes(tensors.pop(HEAD).read(), tensors[EMBEDDING].read()):
            raise ConversionError(
                f"{where}: {HEAD} differs from {EMBEDDING}, though {config} says "
                "tie_word_embeddings; correct tie_word_embeddings there if the head is its own"
            )
    check_keys(vlm_rules(vision, text), shapes(tensors), where)
    return tensors, stored_head


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in shape, dtype and every bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    bits = f"u{a.dtype.itemsize}"
    return bool(np.array_equal(a.reshape(-1).view(bits), b.reshape(-1).view(bits)))


def _sizes(
    shape: Mapping[str, tuple[int, ...]], vision: VisionConfig, text: TextConfig
) -> list[tuple[str, int, int]]:
    """(name, in the config, in the tensors) of what the tensors that are there tell."""
    language, tower = "model.language_model.layers.", "model.visual.blocks."
    probes: list[tuple[str, int, str, int]] = [
        ("vocab_size", text.vocab_size, EMBEDDING, 0),
        ("hidden_size", text.hidden_size, EMBEDDING, 1),
        ("intermediate_size", text.intermediate_size, f"{language}0.mlp.gate_proj.weight", 0),
        ("num_attention_heads * head_dim", text.num_attention_heads * text.head_dim,
         f"{language}0.self_attn.q_proj.weight", 0),
        ("num_key_value_heads * head_dim", text.num_key_value_heads * text.head_dim,
         f"{language}0.self_attn.k_proj.weight", 0),
        ("vision_config.hidden_size", vision.hidden_size, f"{tower}0.norm1.weight", 0),
        ("vision_config.intermediate_size", vision.intermediate_size,
         f"{tower}0.mlp.gate_proj.weight", 0),
        ("vision_config.out_hidden_size", vision.out_hidden_size,
         "model.visual.merger.mlp.2.weight", 0),
    ]  # fmt: skip
    found = [(n, have, shape[key][axis]) for n, have, key, axis in probes if key in shape]
    for name, have, prefix in (
        ("num_hidden_layers", text.num_hidden_layers, language),
        ("vision_config.depth", vision.depth, tower),
    ):
        found.append((name, have, count_layers(shape, prefix)))
    return found


def count_layers(keys: Iterable[str], prefix: str) -> int:
    """Number of layers whose keys start with ``prefix`` and a number."""
    tails = [key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)]
    return 1 + max((int(tail) for tail in tails if tail.isdigit()), default=-1)


# --- Folders ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VlmFolder:
    """A Hugging Face Qwen2.5-VL folder without its weights."""

    path: Path
    vision: VisionConfig
    text: TextConfig
    files: dict[str, Path]  # name in our meta folder -> file

    @property
    def config_file(self) -> str:
        return str(self.path / "config.json")


def read_folder(path: Path | str) -> VlmFolder:
    """Reads config.json and notes the tokenizer and processor files.

    Raises:
      ConversionError: no such folder, no config.json, no tokenizer, or an unsuitable config.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConversionError(f"{path}: no such folder")
    vision, text = config_from_hf(read_json(path / "config.json"), str(path / "config.json"))
    files = {HF_CONFIG: path / "config.json"}
    files |= {name: path / name for name in OTHER_FILES if (path / name).is_file()}
    files |= {f"tokenizer/{n}": path / n for n in TOKENIZER_FILES if (path / n).is_file()}
    if "tokenizer/tokenizer.json" not in files:
        raise ConversionError(
            f"{path}: holds no tokenizer.json; make one with `python -m convert_weights.tokenizer`"
        )
    return VlmFolder(path, vision, text, files)


def added_token_ids(path: Path) -> dict[str, int]:
    """{added token: id} of a tokenizer.json."""
    return {token["content"]: token["id"] for token in read_json(path).get("added_tokens", [])}


def read_weights(folder: VlmFolder) -> tuple[Tensors, bool]:
    """Opens and checks the folder's weights: see `check_vlm`."""
    where = str(folder.path)
    tensors = canonical(open_weights(folder.path), where)
    return check_vlm(tensors, folder.vision, folder.text, where, folder.config_file)


def torch_model(cfg: ModelConfig, params: Mapping[str, Any]) -> Any:
    """Qwen2_5_VLForConditionalGeneration of transformers in f32 with our parameters (needs torch).

    Args:
      cfg: sizes.
      params: the nested dict params["vlm"].
    """
    # Real token ids where the vocabulary has them, else its last ids.
    ids = {"<|video_pad|>": 151_656, "<|image_pad|>": 151_655,
           "<|vision_end|>": 151_653, "<|vision_start|>": 151_652}  # fmt: skip
    if cfg.text.vocab_size <= 151_656:
        ids = {token: cfg.text.vocab_size - 1 - i for i, token in enumerate(ids)}
    state = {}
    for rule in vlm_rules(cfg.vision, cfg.text):
        array = params
        for name in rule.jax.split("/")[1:]:
            array = array[name]
        state |= dict(tensors_to_torch(rule, np.asarray(array, np.float32)))
    return build_torch(hf_config(cfg.vision, cfg.text, ids), state)


def build_torch(hf: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Any:
    """The same from a config.json and f32 tensors under canonical keys."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**hf)).eval().float()
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in state.items()}
    if hf["tie_word_embeddings"]:
        tensors[HEAD] = tensors[EMBEDDING]
    model.load_state_dict(tensors)
    return model
