"""Reading and writing of torch files (.pt, .pth, .bin), always with weights_only=True."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert_weights.rules import ConversionError
from convert_weights.safetensors_io import DTYPES, LazyTensor, Tensors


def open_torch(path: Path) -> Tensors:
    """A .pt file, read with weights_only=True: nothing in it is ever executed."""
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"{path}: reading {path.suffix} files needs torch (pip install 'st4vla_jax[torch]'), "
            "safetensors files do not"
        ) from None
    try:
        # mmap works with the zip format of torch >= 1.6 only.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: torch.load(weights_only=True) refused it, so it is not a plain dict of "
            "tensors. It is not unpickled here, because a pickle can run any code; load it where "
            f"you trust it and save its state_dict() again. ({str(error).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConversionError(
            f"{path}: truncated or not a torch file ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(state, Mapping):
        raise ConversionError(f"{path}: holds a {type(state).__name__}, not a dict of tensors")
    others = [f"{k} ({type(v).__name__})" for k, v in state.items() if not torch.is_tensor(v)]
    if others:
        raise ConversionError(
            f"{path}: not a plain dict of tensors, it also holds {', '.join(others[:8])}; save "
            "the state_dict() alone"
        )
    return {key: _from_torch(path, key, tensor) for key, tensor in state.items()}


def _from_torch(path: Path, key: str, tensor: Any) -> LazyTensor:
    import torch

    bits = tensor.dtype == torch.bfloat16  # numpy has no bfloat16: travels as int16 bits
    dtype = (
        np.dtype(ml_dtypes.bfloat16) if bits else np.empty(0, _torch_name(path, key, tensor)).dtype
    )

    def read() -> np.ndarray:
        dense = tensor.detach().contiguous()
        return dense.view(torch.int16).numpy().view(dtype) if bits else dense.numpy()

    return LazyTensor(tuple(tensor.shape), dtype, read)


def _torch_name(path: Path, key: str, tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in {str(dtype) for dtype in DTYPES.values()}:
        raise ConversionError(f"{path}: {key} has dtype {name}, which is not supported")
    return name


def to_torch(array: np.ndarray) -> Any:
    """A torch tensor that shares the array's memory (torch must be installed)."""
    import torch

    if not array.size:
        array = array.copy()  # an empty view has its neighbour's address, which torch.save refuses
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write_torch(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Saves a dict of CPU tensors that torch.load(weights_only=True) reads.

    Memory-mapped tensors stay mapped: torch.save copies them from the page cache.
    """
    import torch

    torch.save({key: to_torch(tensor.read()) for key, tensor in tensors.items()}, path)
