"""Parameters of a checkpoint with its LoRA adapters folded into their kernels."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from st4vla_jax import checkpoint
from st4vla_jax.models.lora import LORA_A, LORA_B, merged_kernel


def param_shapes(directory: Path | str) -> dict[str, jax.ShapeDtypeStruct]:
    """`checkpoint.param_shapes` without the adapters."""
    shapes = checkpoint.param_shapes(directory)
    return {path: leaf for path, leaf in shapes.items() if not path.endswith((LORA_A, LORA_B))}


def read_leaf(directory: Path | str, path: str) -> np.ndarray:
    """`checkpoint.read_leaf`; a kernel comes with its adapter, if it has one."""
    leaf = checkpoint.read_leaf(directory, path)
    module, _, name = path.rpartition("/")
    pair = [f"{module}/{LORA_A}", f"{module}/{LORA_B}"]
    if name != "kernel" or pair[0] not in checkpoint.param_shapes(directory):
        return leaf
    return merged_kernel(leaf, *(checkpoint.read_leaf(directory, other) for other in pair))
