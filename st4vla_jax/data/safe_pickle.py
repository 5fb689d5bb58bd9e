"""Reads pickles that hold plain data and NumPy arrays, and refuses everything else.

Two kinds of published data are pickles: RefCOCO's reference lists and the annotation columns of
LeRobot sets from simulators.  A pickle can run any code, so nothing named in it is ever imported:
the few NumPy names that arrays need are answered with stand-ins, which build arrays by the checked
public ways (NumPy's own ``__setstate__`` trusts offsets and lengths).
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import numpy as np

_PLAIN_DTYPE = re.compile(r"[biufcSUV]\d+")  # no objects, whose bytes would be pointers
_MAX_DEPTH = 50  # of nested containers


class UnsafePickleError(ValueError):
    """A pickle that is broken or holds more than plain data; says which name it asked for."""


def load(data: bytes, name: str = "pickle") -> Any:
    """Unpickles None, bool, numbers, text, bytes, containers and arrays of plain dtypes.

    Args:
      data: the pickle, written by Python 2 or 3.
      name: what error messages call it.

    Raises:
      UnsafePickleError: it names a function or class that plain data does not need, or is broken.
    """
    unpickler = _Unpickler(io.BytesIO(data), encoding="utf-8", errors="replace")
    try:
        return _arrays(unpickler.load(), {}, 0)
    except UnsafePickleError as e:
        raise UnsafePickleError(f"{name}: {e}") from None
    # What a broken or hostile stream raises is not bounded by pickle's documentation.
    except Exception as e:
        raise UnsafePickleError(f"{name}: not a pickle of plain data ({e!r})") from e


class _Dtype:
    """Stands for ``numpy.dtype`` of one plain type or a structure of them."""

    __slots__ = ("fields", "order", "size", "spec")

    def __init__(self, spec: Any) -> None:
        if not isinstance(spec, str) or not _PLAIN_DTYPE.fullmatch(spec):
            raise UnsafePickleError(f"dtype {spec!r} is not allowed")
        self.spec, self.order, self.fields, self.size = spec, "", None, None

    def __setstate__(self, state: tuple) -> None:
        _, order, subdtype, names, fields, size = state[:6]
        if subdtype is not None or order not in ("<", ">", "|", "="):
            raise UnsafePickleError("dtypes of sub-arrays are not allowed")
        self.order, self.size = order, size
        if names is not None:
            self.fields = [(name, fields[name][0].dtype(), fields[name][1]) for name in names]

    def dtype(self) -> np.dtype:
        if self.fields is None:
            return np.dtype(self.order + self.spec)
        names, formats, offsets = zip(*self.fields, strict=True)
        structure = {"names": names, "formats": formats, "offsets": offsets, "itemsize": self.size}
        return np.dtype(structure)


class _Array:
    """Stands for an array until the whole pickle is read."""

    __slots__ = ("value",)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


# Instances without a dictionary: a pickle can neither set attributes on them nor subclass them.
class _MakeDtype:
    __slots__ = ()

    def __call__(self, spec: Any, *_: Any) -> _Dtype:
        return _Dtype(spec)


class _MakeArray:
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _MakeScalar:
    __slots__ = ()

    def __call__(self, dtype: _Dtype, data: bytes | str) -> np.generic:
        return _array(data, dtype, (1,), "C")[0]


class _FromBuffer:
    __slots__ = ()

    def __call__(self, data: bytes, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
        return _array(data, dtype, shape, order)


class _ArrayType:
    __slots__ = ()


# Protocols 0 to 2 of Python 3 write bytes as latin-1 text, and sets as calls.
class _MakeBytes:
    __slots__ = ()

    def __call__(self, text: str = "", encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise UnsafePickleError(f"bytes in encoding {encoding!r} are not allowed")
        return str.encode(text, "latin1")


class _MakeSet:
    __slots__ = ()

    def __call__(self, entries: list) -> frozenset:
        return frozenset(list.__iter__(entries))


_STAND_INS = {
    "numpy.dtype": _MakeDtype(),
    "numpy.ndarray": _ArrayType(),
    "numpy._core.multiarray._reconstruct": _MakeArray(),
    "numpy._core.multiarray.scalar": _MakeScalar(),
    "numpy._core.numeric._frombuffer": _FromBuffer(),
    "_codecs.encode": _MakeBytes(),
    "builtins.bytes": _MakeBytes(),
    "builtins.set": _MakeSet(),
    "builtins.frozenset": _MakeSet(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        full = full.replace("__builtin__.", "builtins.")
        if full not in _STAND_INS:
            raise UnsafePickleError(
                f"it asks for {module}.{name}, which plain data does not need: loading it could "
                "run code; it was refused"
            )
        return _STAND_INS[full]


def _array(data: bytes | str, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(data, dtype.dtype()).reshape(shape, order=order)


def _arrays(value: Any, done: dict[int, Any], depth: int) -> Any:
    """Replaces stand-ins within containers, each shared object once."""
    if depth > _MAX_DEPTH:
        raise UnsafePickleError("its containers are nested too deeply")
    if isinstance(value, _Array):
        return value.value
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        if isinstance(value, (_Dtype, *map(type, _STAND_INS.values()))):
            raise UnsafePickleError("it holds a type or function instead of data")
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            new = {
                _arrays(k, done, depth + 1): _arrays(v, done, depth + 1) for k, v in value.items()
            }
        else:
            new = type(value)(_arrays(v, done, depth + 1) for v in value)
        done[id(value)] = new
    return done[id(value)]
