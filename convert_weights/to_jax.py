"""Torch weights to a checkpoint of this package.

::

  # a Hugging Face Qwen2.5-VL folder, alone or with DINOv2 and a fresh bridge and DiT
  python -m convert_weights.to_jax --out DIR --vlm FOLDER [--dino FILE --dit b]
  # a weight file in an upstream run folder
  python -m convert_weights.to_jax --out DIR --st4vla FILE [--base-vlm FOLDER]

Weights keep the source's dtype; fresh parts are float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert_weights import dinov2, qwen2_5_vl, st4vla
from convert_weights.cli import command, positive
from convert_weights.rules import ConversionError, leaves_from_torch
from convert_weights.safetensors_io import sha256, weight_files, write_safetensors
from st4vla_jax.checkpoint import (
    META,
    PASSTHROUGH,
    STATISTICS,
    Meta,
    check_target,
    git_revision,
    write_checkpoint,
)
from st4vla_jax.config import DIT_PRESETS, BridgeConfig, ModelConfig, TextConfig
from st4vla_jax.data.image import ImageConfig, ImageError
from st4vla_jax.data.normalize import ActionSpec, Statistics
from st4vla_jax.data.prompts import TEMPLATES, PromptConfig
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.sharding import unbox

# Options of `parse` that describe fresh parts -> their defaults.
FRESH = {"dit": "b", "chunk": 16, "action_dim": 7, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Source:
    """All that a checkpoint is made of.

    Attributes:
      policy: sizes and tensors; tensors lack the fresh parts.
      files: name in our meta folder -> file.
      weights: files to hash.
      prompt, image: for meta.
      fresh: top-level names of parameters to initialise.
      step: training step, if known.
    """

    policy: st4vla.Policy
    files: dict[str, Path]
    weights: list[Path]
    prompt: PromptConfig
    image: ImageConfig
    fresh: tuple[str, ...] = ()
    step: int | None = None


def from_folder(args: argparse.Namespace) -> Source:
    """A Hugging Face folder, with or without DINOv2 and fresh parts."""
    folder = qwen2_5_vl.read_folder(args.vlm)
    vlm, stored_head = qwen2_5_vl.read_weights(folder)
    tensors = {st4vla.VLM + key: tensor for key, tensor in vlm.items()}
    passthrough = {}
    weights = weight_files(folder.path)
    cfg = ModelConfig(folder.vision, folder.text, None, None, None)
    if args.dino:
        dino_cfg, dino, mask_token = dinov2.read_file(args.dino, args.dino_heads)
        tensors |= {st4vla.DINO + key: tensor for key, tensor in dino.items()}
        if mask_token is not None:
            passthrough[st4vla.DINO + dinov2.MASK_TOKEN] = mask_token
        weights += weight_files(args.dino)
        dit = dataclasses.replace(
            DIT_PRESETS[args.dit], chunk=args.chunk, action_dim=args.action_dim
        )
        last = folder.text.num_hidden_layers
        bridge = BridgeConfig(
            start_layer=last,
            end_layer=last + 1,
            num_queries=dit.num_condition_tokens,
            hidden_size=dit.hidden_size,
        )
        cfg = ModelConfig(folder.vision, folder.text, dino_cfg, bridge, dit)
    st4vla.check_dtypes(st4vla.policy_rules(cfg.check()), tensors, str(folder.path))
    return Source(
        policy=st4vla.Policy(cfg, tensors, passthrough, stored_head),
        files=dict(folder.files),
        weights=weights,
        prompt=PromptConfig(_template(args.prompt or "paper")),
        image=ImageConfig(),
        fresh=("bridge", "dit") if args.dino else (),
    )


def from_run(args: argparse.Namespace) -> Source:
    """A weight file in an upstream run folder."""
    run = st4vla.find_run(args.st4vla)
    base = args.base_vlm or run.value("framework.qwenvl.base_vlm")
    if base is None or not Path(base).is_dir():
        raise ConversionError(
            f"{run.config_file}: framework.qwenvl.base_vlm is {base!r}, which is no folder here; "
            "give --base-vlm, a Hugging Face folder of that model (its config and tokenizer are "
            "read, not its weights)"
        )
    folder = qwen2_5_vl.read_folder(base)
    heads = st4vla.Heads(args.dino_heads, args.qformer_heads, args.dit_heads)
    files = dict(folder.files)
    statistics = run.root / STATISTICS
    if not statistics.is_file() and not args.statistics:
        raise ConversionError(f"{statistics}: no such file; give --statistics")
    if statistics.is_file():
        files[STATISTICS] = statistics
    files[st4vla.UPSTREAM_CONFIG] = run.root / "config.yaml"
    prompt = _run_prompt(run)
    if args.prompt:
        prompt = dataclasses.replace(prompt, template=_template(args.prompt))
    return Source(
        policy=st4vla.read_run(run, folder, heads),
        files=files,
        weights=[run.weights],
        prompt=prompt,
        image=_run_image(run),
        step=run.step,
    )


def _run_prompt(run: st4vla.RunFolder) -> PromptConfig:
    """The run's template, lower-casing as upstream does at inference (spec 1.10)."""
    # Without the key upstream uses the instruction as it is (spec 1.2).
    template = run.value("datasets.vla_data.CoT_prompt", TEMPLATES["none"])
    return PromptConfig(template, lower_case=True)


def _run_image(run: st4vla.RunFolder) -> ImageConfig:
    size = run.value("datasets.vla_data.image_size")
    try:
        # Turned round from PIL's order: upstream hands it to Image.resize.
        return ImageConfig(size=None if size is None else tuple(size[::-1]))
    except ImageError as error:
        raise ConversionError(
            f"{run.config_file}: datasets.vla_data.image_size is {size!r}, expected two integers "
            f"above 0, width and height ({error})"
        ) from None


def _template(name: str) -> str:
    return TEMPLATES.get(name, name)


def _check_tokenizer(files: Mapping[str, Path], text: TextConfig) -> None:
    """Raises an error unless every id of the tokenizer has a row in the embedding."""
    path = files["tokenizer/tokenizer.json"]
    vocabulary = Tokenizer.load(path.parent).bpe()["vocab"].values()
    largest = max(*vocabulary, *qwen2_5_vl.added_token_ids(path).values())
    if largest >= text.vocab_size:
        raise ConversionError(
            f"{path}: its largest token id is {largest}, but vocab_size is {text.vocab_size} in "
            f"{files[qwen2_5_vl.HF_CONFIG]}; this is another model's tokenizer"
        )


def _action_spec(cfg: ModelConfig, statistics: Mapping[str, Any]) -> ActionSpec | None:
    """Bridge's spec if it fits, else numbered dimensions; checked against the statistics."""
    if not cfg.has_action:
        return None
    size, spec = cfg.dit.action_dim, ActionSpec()
    gripper = {tuple(np.flatnonzero(~s.action.mask).tolist()) for s in statistics.values()}
    if size != len(spec.names) or gripper - {spec.gripper}:
        binary = gripper.pop() if len(gripper) == 1 else ()
        names = tuple(f"action_{i}" for i in range(size))
        units = tuple("1 = open, 0 = closed" if i in binary else "unknown" for i in range(size))
        spec = ActionSpec(names, units, gripper=binary)
    for embodiment in statistics:
        spec.check(statistics[embodiment].action, embodiment)
    return spec


def fresh_parts(cfg: ModelConfig, names: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Freshly initialised parts of the policy, drawn as the whole model draws them, in f32."""
    if not names:
        return {}
    key = jax.random.key(seed)

    def init(key: jax.Array) -> dict[str, Any]:
        return unbox(ST4VLA(cfg).init(key, names))

    # Runs once: XLA's optimisation would take 20 s and save 10 at full size.
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.device_get(jax.jit(init).lower(key).compile(fast)(key))


def leaves(source: Source, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every parameter: converted ones by the rules, then the fresh ones."""
    policy = source.policy
    converted = [
        rule
        for rule in st4vla.policy_rules(policy.config)
        if rule.jax.split("/")[0] not in source.fresh
    ]
    yield from leaves_from_torch(converted, lambda key: policy.tensors[key].read())
    fresh = fresh_parts(policy.config, source.fresh, seed)
    for path, array in jax.tree_util.tree_flatten_with_path(fresh)[0]:
        yield "/".join(entry.key for entry in path), array


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the conversion; returns what `main` reports."""
    check_target(args.out, META, args.overwrite)
    source = from_run(args) if args.st4vla else from_folder(args)
    files: dict[str, bytes | Path] = dict(source.files)
    if args.statistics:
        files[STATISTICS] = Path(args.statistics)
    statistics = Statistics.load(files[STATISTICS]) if STATISTICS in files else {}
    _check_tokenizer(source.files, source.policy.config.text)
    meta = Meta(
        model=source.policy.config,
        prompt=source.prompt,
        image=source.image,
        action=_action_spec(source.policy.config, statistics),
        source={str(path): sha256(path) for path in source.weights},
        notes={"fresh": ", ".join(source.fresh), "seed": str(args.seed)} if source.fresh else {},
        stored_head=source.policy.stored_head,
        step=source.step,
        git_revision=git_revision(),
    )
    counts: dict[tuple[str, str], int] = {}

    def counted() -> Iterator[tuple[str, np.ndarray]]:
        for path, array in leaves(source, args.seed):
            key = path.split("/")[0], str(array.dtype)
            counts[key] = counts.get(key, 0) + array.size
            yield path, array

    with tempfile.TemporaryDirectory() as folder:
        if source.policy.passthrough:
            files[PASSTHROUGH] = Path(folder) / PASSTHROUGH
            write_safetensors(files[PASSTHROUGH], source.policy.passthrough)
        write_checkpoint(args.out, counted(), meta, files, args.overwrite)
    return {"counts": counts, "fresh": source.fresh, "files": sorted(files)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; ends the process on options that do not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m convert_weights.to_jax", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, help="checkpoint folder to make")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vlm", type=Path, help="Hugging Face Qwen2.5-VL folder")
    source.add_argument("--st4vla", type=Path, help="weight file in an upstream run folder")
    add("--base-vlm", type=Path, help="with --st4vla: folder with the VLM's config and tokenizer")
    add("--dino", type=Path, help="with --vlm: torch.hub .pth or Hugging Face Dinov2 safetensors")
    fresh = "with --dino, default {}: {} of the fresh DiT"
    add("--dit", choices=sorted(DIT_PRESETS), help=fresh.format(FRESH["dit"], "size"))
    add("--chunk", type=positive, help=fresh.format(FRESH["chunk"], "action chunk"))
    add("--action-dim", type=positive, help=fresh.format(FRESH["action_dim"], "action dimensions"))
    add("--seed", type=int, help="with --dino, default 0: of fresh parts")
    add("--dino-heads", type=positive, help="heads of a DINOv2 of unusual width")
    add("--qformer-heads", type=positive, help="with --st4vla: heads of the Q-Former, if not 8")
    add("--dit-heads", type=positive, help="with --st4vla: heads of a DiT of unusual width")
    add("--statistics", type=Path, help="dataset_statistics.json to put into the checkpoint")
    add("--prompt", help=f"{', '.join(TEMPLATES)}, or a template with {{instruction}}")
    add("--overwrite", action="store_true", help="replace a checkpoint that is there")
    args = parser.parse_args(argv)
    if problems := _useless_options(args):
        parser.error("; ".join(problems))
    for name, default in FRESH.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def _useless_options(args: argparse.Namespace) -> list[str]:
    """Options that the kind of source would ignore."""
    groups = [
        (("dino",), args.vlm, "goes with --vlm; an upstream run holds its own DINOv2"),
        (("base_vlm", "qformer_heads", "dit_heads"), args.st4vla, "goes with --st4vla"),
        (("dino_heads",), args.dino or args.st4vla, "goes with --dino or --st4vla"),
        (FRESH, args.dino, "goes with --dino: nothing is fresh without it"),
    ]
    return [
        f"--{name.replace('_', '-')} {text}"
        for names, useful, text in groups
        for name in names
        if getattr(args, name) is not None and not useful
    ]


@command
def main(argv: list[str] | None = None) -> int:
    """Converts and reports; returns the exit status."""
    args, start = parse(argv), time.perf_counter()
    report = convert(args)
    print(f"wrote {args.out}")
    for (part, dtype), count in report["counts"].items():
        state = "fresh" if part in report["fresh"] else "converted"
        print(f"  {part:<8}{count:>15,d} parameters  {dtype:<10}{state}")
    print(f"  meta: meta.json, {', '.join(report['files'])}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"  {time.perf_counter() - start:.1f} s, peak memory {peak:.2f} GiB "
        "(counts pages of the mapped source files)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
