"""The reference system's numbers (golden_upstream.json): fill rule of its weights, comparison."""

import json
from pathlib import Path

import numpy as np


def load(shared: Path) -> dict:
    return json.loads((shared / "spec/golden_upstream.json").read_text())


def wave(shape, amp: float, phase: float) -> np.ndarray:
    """Inputs: amp * sin(0.1 i + phase) over the flat index, in float64, as float32."""
    values = np.arange(np.prod(shape), dtype=np.float64)
    values *= 0.1
    values += phase
    np.sin(values, out=values)
    values *= amp
    return values.astype(np.float32).reshape(shape)


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights of a module from the names and shapes of its whole state dict.

    The phase depends on a name's place among the sorted names, so names that we only pass through
    (mask_token, history_embedder) must be in ``shapes`` too.
    """
    filled = {}
    for j, name in enumerate(sorted(shapes)):
        is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("gamma")
        values = np.arange(np.prod(shapes[name]), dtype=np.float64)
        values *= 0.1
        values += 0.7 * j
        np.sin(values, out=values)
        values *= 0.05
        values += float(is_scale)
        filled[name] = values.astype(np.float32).reshape(shapes[name])
    return filled


def assert_matches(actual, entry: dict, rtol: float) -> float:
    """Compares an array with an entry {shape, sum, l2, first8, last4}; returns the worst error.

    Values are compared relative to their own size plus the array's root mean square, the sum
    relative to the l2 norm (it cancels to nearly nothing).
    """
    actual = np.asarray(actual, np.float64)
    assert list(actual.shape) == entry["shape"]
    flat, scale = actual.ravel(), entry["l2"] / np.sqrt(actual.size)
    ends = np.concatenate([flat[:8], flat[-4:]])
    want = np.concatenate([entry["first8"], entry["last4"]])
    errors = np.abs(ends - want) / (np.abs(want) + scale)
    l2_error = abs(np.sqrt(np.sum(flat**2)) / entry["l2"] - 1)
    sum_error = abs(flat.sum() - entry["sum"]) / entry["l2"]
    worst = max(errors.max(), l2_error, sum_error)
    assert worst <= rtol, f"values {errors.max():.2e}, l2 {l2_error:.2e}, sum {sum_error:.2e}"
    return worst
