"""Compares two sets of weights, tensor by tensor and, if asked, layer by layer.

::

  python -m convert_weights.verify A B [--atol X] [--rtol X] [--layers]

A and B are each a checkpoint of this package, a Hugging Face Qwen2.5-VL folder or a weight file of
an upstream run.  Where one of them is a VLM alone, the VLM is compared.  The exit status is 1 if a
key is on one side only or a tensor (with --layers: a hidden state) is out of tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights import export, qwen2_5_vl, st4vla
from convert_weights.adapters import param_shapes, read_leaf
from convert_weights.cli import command
from convert_weights.rules import ConversionError, Rule
from convert_weights.safetensors_io import LazyTensor, Tensors, lazy, open_weights
from st4vla_jax.checkpoint import META, PASSTHROUGH, read_meta

HEAD = st4vla.VLM + qwen2_5_vl.HEAD
EMBEDDING = st4vla.VLM + qwen2_5_vl.EMBEDDING


@dataclasses.dataclass(frozen=True)
class Weights:
    """One side of the comparison.

    Attributes:
      path: as given.
      kind: "checkpoint", "hf" or "upstream".
      tensors: under upstream's keys.
    """

    path: Path
    kind: str
    tensors: Tensors


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest errors of one tensor: absolute, and relative to B's largest entry."""

    absolute: float
    relative: float
    within: bool


def open_any(path: Path) -> Weights:
    """Opens whatever weights are at ``path``.

    Raises:
      ConversionError, CheckpointError: nothing that can be read there.
    """
    if (path / META).exists():
        return Weights(path, "checkpoint", _checkpoint_tensors(path))
    opened = open_weights(path)
    if path.is_dir():
        vlm = qwen2_5_vl.canonical(opened, str(path))
        return Weights(path, "hf", {st4vla.VLM + key: tensor for key, tensor in vlm.items()})
    vlm = {k.removeprefix(st4vla.VLM): t for k, t in opened.items() if k.startswith(st4vla.VLM)}
    if not vlm:
        raise ConversionError(f"{path}: no upstream weights, has no keys below {st4vla.VLM}")
    tensors = {k: t for k, t in opened.items() if not k.startswith(st4vla.VLM)}
    vlm = qwen2_5_vl.canonical(vlm, str(path))
    return Weights(path, "upstream", {st4vla.VLM + k: t for k, t in vlm.items()} | tensors)


def _checkpoint_tensors(path: Path) -> Tensors:
    cfg = read_meta(path).model
    stored = param_shapes(path)
    # Layers of one stack are asked for one after the other.
    leaf = functools.lru_cache(maxsize=1)(functools.partial(read_leaf, path))
    tensors: Tensors = {}
    for rule in st4vla.policy_rules(cfg):
        if rule.jax in stored:
            dtype = np.dtype(stored[rule.jax].dtype)
            for i, key in enumerate(rule.torch_keys):
                tensors[key] = LazyTensor(rule.torch_shape, dtype, _reader(leaf, rule, i))
    file = path / "meta" / PASSTHROUGH
    kept = open_weights(file) if file.is_file() else {}
    if cfg.has_action:
        dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
        arrays = {key: tensor.read() for key, tensor in kept.items()}
        extra = export.passthrough_tensors(cfg, dtypes, arrays)
        kept = {key: lazy(array) for key, array in extra.items()}
    return tensors | kept


def _reader(leaf: Callable[[str], np.ndarray], rule: Rule, i: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = leaf(rule.jax)
        return rule.to_torch(array if rule.layers is None else array[i])

    return read


def difference(a: np.ndarray, b: np.ndarray, atol: float, rtol: float) -> Difference:
    """Errors of ``a`` against ``b``.

    NaN and the infinities agree only with themselves; anything else there is an infinite error.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if np.array_equal(a, b, equal_nan=True):
        return Difference(0.0, 0.0, True)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore"):  # inf - inf, where ``equal`` or ``finite`` decides
        error = np.where(equal, 0, np.where(finite, np.abs(a - b), np.inf))
    largest = float(error.max())
    scale = float(np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max())
    within = bool(np.all(error[finite] <= atol + rtol * np.abs(b[finite])))
    within = within and bool(np.all(equal | finite))
    return Difference(largest, largest / scale if scale else float("inf"), within)


def compare(
    a: Weights, b: Weights, atol: float, rtol: float, report: Callable = print
) -> list[str]:
    """Compares all tensors; returns the problems, first ones first."""
    ours, theirs = dict(a.tensors), dict(b.tensors)
    if "hf" in (a.kind, b.kind) or not all(_has_action(x) for x in (ours, theirs)):
        ours, theirs = _vlm_only(ours), _vlm_only(theirs)
    for side, other in ((ours, theirs), (theirs, ours)):
        if HEAD in other and HEAD not in side and EMBEDDING in side:
            side[HEAD] = side[EMBEDDING]  # a tied head that this side does not store
    problems = [f"{key}: only in {a.path}" for key in ours if key not in theirs]
    problems += [f"{key}: only in {b.path}" for key in theirs if key not in ours]
    # A checkpoint is read in its own order, one parameter at a time.
    order = theirs if b.kind == "checkpoint" else ours
    for key in [k for k in order if k in ours and k in theirs]:
        x, y = ours[key], theirs[key]
        if x.shape != y.shape:
            problems.append(f"{key}: shape {x.shape} in {a.path}, {y.shape} in {b.path}")
            continue
        found = difference(x.read(), y.read(), atol, rtol)
        mark = "" if found.within else "  OUT OF TOLERANCE"
        report(f"{found.absolute:.3e} {found.relative:.3e}  {key}{mark}")
        if not found.within:
            problems.append(f"{key}: max abs error {found.absolute:.3e}, rel {found.relative:.3e}")
    return problems


def _has_action(tensors: Tensors) -> bool:
    return any(key.startswith(st4vla.DIT) for key in tensors)


def _vlm_only(tensors: Tensors) -> dict[str, Any]:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(st4vla.VLM)}


@command
def main(argv: list[str] | None = None) -> int:
    """Compares and reports; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convert_weights.verify", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--atol", type=float, default=0.0, help="absolute, default 0: equal values")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative to B's entry")
    parser.add_argument("--layers", action="store_true", help="also run both VLMs (needs torch)")
    parser.add_argument(
        "--layers-atol", type=float, default=1e-4, help="of a hidden state, relative to its largest"
    )
    args = parser.parse_args(argv)
    a, b = open_any(args.a), open_any(args.b)
    print("max abs   max rel")
    problems = compare(a, b, args.atol, args.rtol)
    if args.layers:
        from convert_weights.verify_layers import compare_layers  # alone needs torch

        problems += compare_layers(a, b, args.layers_atol)
    if problems:
        print(f"{len(problems)} differences; first: {problems[0]}")
        return 1
    print("equal within tolerance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
