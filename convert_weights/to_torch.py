"""A checkpoint of this package to PyTorch: an upstream run folder, a Hugging Face folder, or both.

::

  python -m convert_weights.to_torch --checkpoint DIR --out DIR --format upstream|hf|both

``both`` makes OUT/upstream and OUT/hf.  The run folder passes upstream's strict load; the Hugging
Face folder loads with Qwen2_5_VLForConditionalGeneration.from_pretrained.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert_weights import export, qwen2_5_vl, st4vla
from convert_weights.adapters import param_shapes, read_leaf
from convert_weights.cli import command
from convert_weights.rules import ConversionError, tensors_to_torch
from convert_weights.safetensors_io import SafetensorsWriter, open_weights
from convert_weights.torch_io import write_torch
from st4vla_jax.checkpoint import (
    HF_CONFIG,
    PASSTHROUGH,
    STATISTICS,
    Meta,
    new_folder,
    read_meta,
)
from st4vla_jax.data.image import IMAGE_MEAN, IMAGE_STD
from st4vla_jax.resume import find_checkpoint

MARKER = "export.json"  # tells a folder written here, which --overwrite may replace
MAX_SHARD = 4 << 30
HF_HEAD = st4vla.VLM + qwen2_5_vl.HEAD
EMBEDDING = st4vla.VLM + qwen2_5_vl.EMBEDDING


def upstream_tensors(
    directory: Path, meta: Meta
) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], Iterator[tuple[str, np.ndarray]]]:
    """The checkpoint's parameters under upstream's keys.

    Returns:
      ({key: (shape, dtype)}, a stream of (key, tensor) that holds one parameter at a time).
    """
    rules = st4vla.policy_rules(meta.model)
    stored = param_shapes(directory)
    problems = [f"missing: {r.jax}" for r in rules if r.jax not in stored]
    problems += [f"not expected: {p}" for p in stored if p not in {r.jax for r in rules}]
    problems += [
        f"wrong shape: {r.jax} is {stored[r.jax].shape}, the model needs {r.jax_shape}"
        for r in rules
        if r.jax in stored and tuple(stored[r.jax].shape) != r.jax_shape
    ]
    if problems:
        raise ConversionError(
            f"{directory}: does not fit its meta.json\n  " + "\n  ".join(problems)
        )
    plan = {
        key: (rule.torch_shape, np.dtype(stored[rule.jax].dtype))
        for rule in rules
        for key in rule.torch_keys
    }

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for rule in rules:
            yield from tensors_to_torch(rule, read_leaf(directory, rule.jax))

    return plan, stream()


def natural(key: str) -> tuple:
    """Sort key that puts layer 2 before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key))


class Export:
    """Writes the wanted formats in one pass over the parameters.

    Args:
      directory: the checkpoint.
      meta: its meta.
      upstream: run folder to fill, or None.
      hf: Hugging Face folder to fill, or None.
      safetensors: leave the run folder's weights as safetensors instead of .pt.
    """

    def __init__(
        self, directory: Path, meta: Meta, upstream: Path | None, hf: Path | None, safetensors: bool
    ):
        self.directory, self.meta, self.safetensors = directory, meta, safetensors
        self.upstream, self.hf = upstream, hf
        self.plan, self.stream = upstream_tensors(directory, meta)
        self.tied = meta.model.text.tie_word_embeddings

    def weights(self) -> None:
        """Writes all tensors."""
        writers = []
        if self.upstream:
            writers.append((self._upstream_writer(), lambda key: key))
        if self.hf:
            writers.append((self._hf_writer(), self._hf_key))
        for key, tensor in self.stream:
            names = [key, HF_HEAD] if self.tied and key == EMBEDDING else [key]
            for writer, rename in writers:
                for name in names:
                    target = rename(name)
                    if target in writer:
                        writer.write(target, tensor)
        for writer, _ in writers:
            writer.close()
        if self.upstream and not self.safetensors:
            source = self._upstream_file()
            write_torch(
                source.with_name(f"steps_{self.step}_pytorch_model.pt"), open_weights(source)
            )
            source.unlink()

    @property
    def step(self) -> int:
        return self.meta.step or 0

    def _upstream_file(self) -> Path:
        return self.upstream / "checkpoints" / f"steps_{self.step}_model.safetensors"

    def _upstream_writer(self) -> SafetensorsWriter:
        stored = self.directory / "meta" / PASSTHROUGH
        passthrough = open_weights(stored) if stored.is_file() else {}
        extra = export.passthrough_tensors(
            self.meta.model,
            {key: dtype for key, (_, dtype) in self.plan.items()},
            {key: tensor.read() for key, tensor in passthrough.items()},
        )
        plan = dict(self.plan)
        if self.tied:
            plan[HF_HEAD] = plan[EMBEDDING]
        plan |= {key: (array.shape, array.dtype) for key, array in extra.items()}
        file = self._upstream_file()
        file.parent.mkdir(parents=True)
        writer = SafetensorsWriter(file.parent, _ordered(plan), name=file.name)
        for key, array in extra.items():
            writer.write(key, array)
        return writer

    @staticmethod
    def _hf_key(key: str) -> str:
        return qwen2_5_vl.disk_key(key.removeprefix(st4vla.VLM))

    def _hf_writer(self) -> SafetensorsWriter:
        plan = {self._hf_key(k): v for k, v in self.plan.items() if k.startswith(st4vla.VLM)}
        if self.tied and self.meta.stored_head:
            plan[qwen2_5_vl.HEAD] = plan[self._hf_key(EMBEDDING)]
        self.hf.mkdir(exist_ok=True)
        return SafetensorsWriter(self.hf, _ordered(plan), MAX_SHARD)

    def upstream_files(self, base_vlm: str | None) -> None:
        """Writes the run folder's config, statistics and save log."""
        meta = self.directory / "meta"
        kept = meta / st4vla.UPSTREAM_CONFIG
        source = st4vla.read_yaml(kept) if kept.is_file() else {}
        notes = export.behaviour_notes(self.meta)
        config = export.config_yaml(self.meta, base_vlm, source, notes)
        (self.upstream / "config.yaml").write_text(
            yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000), "utf-8"
        )
        (self.upstream / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (self.upstream / "summary.jsonl").write_text(json.dumps({"steps": self.step}) + "\n")
        statistics = meta / STATISTICS
        text = statistics.read_bytes() if statistics.is_file() else b"{}\n"
        (self.upstream / STATISTICS).write_bytes(text)

    def hf_files(self) -> None:
        """Writes the Hugging Face folder's config, tokenizer and processor files."""
        meta = self.directory / "meta"
        stored = meta / HF_CONFIG
        if stored.is_file():
            config = qwen2_5_vl.read_json(stored)
        else:
            ids = qwen2_5_vl.added_token_ids(meta / "tokenizer" / "tokenizer.json")
            config = qwen2_5_vl.hf_config(self.meta.model.vision, self.meta.model.text, ids)
        config["dtype" if "dtype" in config else "torch_dtype"] = str(self.plan[EMBEDDING][1])
        (self.hf / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for name in qwen2_5_vl.OTHER_FILES:
            if (meta / name).is_file():
                shutil.copyfile(meta / name, self.hf / name)
        for file in (meta / "tokenizer").iterdir():
            shutil.copyfile(file, self.hf / file.name)
        if not (self.hf / "preprocessor_config.json").is_file():
            text = json.dumps(self._preprocessor(), indent=2)
            (self.hf / "preprocessor_config.json").write_text(text + "\n", "utf-8")

    def _preprocessor(self) -> dict[str, Any]:
        vision, image = self.meta.model.vision, self.meta.image
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": image.min_pixels,
            "max_pixels": image.max_pixels,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            "image_mean": np.ravel(IMAGE_MEAN).tolist(),
            "image_std": np.ravel(IMAGE_STD).tolist(),
        }


def _ordered(plan: dict) -> list[tuple[str, tuple[int, ...], np.dtype]]:
    return [(key, *plan[key]) for key in sorted(plan, key=natural)]


def convert(args: argparse.Namespace) -> list[str]:
    """Runs the export; returns notes for the user."""
    args.checkpoint = find_checkpoint(args.checkpoint)
    meta = read_meta(args.checkpoint)
    wants_upstream, wants_hf = args.format != "hf", args.format != "upstream"
    _check(args, meta, wants_upstream)
    notes = [
        f"stock transformers cannot run it: {text}" for text in export.vlm_problems(meta.model)
    ]
    with new_folder(args.out, MARKER, args.overwrite) as work:
        both = args.format == "both"
        upstream = (work / "upstream" if both else work) if wants_upstream else None
        hf = (work / "hf" if both else work) if wants_hf else None
        writing = Export(args.checkpoint, meta, upstream, hf, args.safetensors)
        writing.weights()
        if upstream:
            base = args.base_vlm or (str(args.out.absolute() / "hf") if both else None)
            writing.upstream_files(base)
            notes += _upstream_notes(args, meta, base)
        if hf:
            writing.hf_files()
        record = {"checkpoint": str(args.checkpoint), "format": args.format, "step": meta.step}
        (work / MARKER).write_text(json.dumps(record) + "\n")
    return notes


def _check(args: argparse.Namespace, meta: Meta, upstream: bool) -> None:
    """Raises ConversionError with every reason why transformers or upstream could not run it."""
    cfg, problems = meta.model, []
    custom = export.vlm_problems(cfg)
    if upstream:
        problems += export.structural_problems(cfg)
        custom += export.size_problems(cfg)
    if custom and not args.allow_custom_sizes:
        who = "upstream" if upstream else "transformers"
        problems += [*custom, f"--allow-custom-sizes exports it for a changed {who}"]
    if upstream and not args.safetensors and importlib.util.find_spec("torch") is None:
        problems.append("writing .pt needs torch; install it or give --safetensors")
    if problems:
        target = "upstream" if upstream else "Hugging Face"
        raise ConversionError("\n  ".join([f"{args.checkpoint}: no export to {target}", *problems]))


def _upstream_notes(args: argparse.Namespace, meta: Meta, base: str | None) -> list[str]:
    notes = export.behaviour_notes(meta)
    if args.allow_custom_sizes:
        notes += [
            f"stock upstream cannot run it: {text}" for text in export.size_problems(meta.model)
        ]
    if meta.step is None:
        notes.append("the checkpoint does not say its training step: the files claim step 0")
    if not (args.checkpoint / "meta" / STATISTICS).is_file():
        notes.append(
            "the checkpoint has no normalisation statistics: dataset_statistics.json is {}"
        )
    if base is None:
        notes.append(
            "config.yaml keeps the source's framework.qwenvl.base_vlm; upstream needs a Hugging "
            "Face folder there (--base-vlm sets it)"
        )
    return notes


@command
def main(argv: list[str] | None = None) -> int:
    """Exports and reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convert_weights.to_torch", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="checkpoint of this package, or a workdir")
    add("--out", required=True, type=Path, help="folder to make")
    add("--format", required=True, choices=("upstream", "hf", "both"))
    add("--safetensors", action="store_true", help="run folder with steps_N_model.safetensors")
    add(
        "--allow-custom-sizes",
        action="store_true",
        help="export what upstream or transformers cannot run as it is",
    )
    add("--base-vlm", help="what config.yaml names as the base VLM's folder")
    add("--overwrite", action="store_true", help="replace a folder written by this command")
    args, start = parser.parse_args(argv), time.perf_counter()
    notes = convert(args)
    print(f"wrote {args.out} in {time.perf_counter() - start:.1f} s")
    for file in sorted(p for p in args.out.rglob("*") if p.is_file()):
        print(f"  {file.relative_to(args.out)}  {file.stat().st_size:,d} bytes")
    for note in notes:
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
