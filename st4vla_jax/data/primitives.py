"""Primitives of standardisation: gripper conventions, relabelling, rotations, packed columns.

Each turns [T,d] columns of one episode into [T',d']; conventions of spec data.md section 5.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from st4vla_jax.data.source import BadRecordError

LANGUAGE_ENCODINGS = ("text", "code_points")

_OPEN, _CLOSED = 0.95, 0.05  # a stored gripper is decided above the one and below the other
_MOVES = 0.1  # a relative gripper command is an event above this size
_GIMBAL = 1 - 1e-6  # |sin pitch| from which roll and yaw turn about the same axis


def binarize(gripper: np.ndarray) -> np.ndarray:
    """Above 0.95 open (1), below 0.05 closed (0); in between, what is decided next.

    Values in between at the end of the episode take the raw last value.

    Args:
      gripper: f32[T,d], 1 = open.

    Returns:
      f32[T,d].
    """
    steps = np.arange(len(gripper))[:, None]
    decided = (gripper > _OPEN) | (gripper < _CLOSED)
    after = np.where(decided, steps, len(gripper))[::-1]
    following = np.minimum.accumulate(after)[::-1]
    value = np.concatenate([np.where(gripper > _OPEN, 1, 0), gripper[-1:]]).astype(np.float32)
    return np.take_along_axis(value, following, axis=0)


def rel2abs(gripper: np.ndarray) -> np.ndarray:
    """Relative closing commands (+ closes, - opens, up to 0.1 holds) to the state commanded.

    Before the first event it is the opposite state; without an event, open.

    Args:
      gripper: f32[T,d].

    Returns:
      f32[T,d] of 1 = open, 0 = closed.
    """
    steps = np.arange(len(gripper))[:, None]
    event = np.abs(gripper) > _MOVES
    opens = gripper < -_MOVES
    first = np.take_along_axis(opens, event.argmax(axis=0)[None], axis=0)
    initial = np.where(event.any(axis=0), ~first, True)
    latest = np.maximum.accumulate(np.where(event, steps + 1, 0), axis=0)
    return np.take_along_axis(np.concatenate([initial, opens]), latest, axis=0).astype(np.float32)


def quaternion_to_euler(quaternion: np.ndarray) -> np.ndarray:
    """Rotations about the fixed x, y and z axes, in this order: scipy's ``as_euler("xyz")``.

    Args:
      quaternion: f32[T,4] in the order x, y, z, w; normalised here, all zeros gives NaN.

    Returns:
      f32[T,3] roll, pitch, yaw in rad; yaw is 0 where the pitch is straight up or down.
    """
    wide = quaternion.astype(np.float64)
    with np.errstate(invalid="ignore"):
        x, y, z, w = (wide / np.linalg.norm(wide, axis=-1, keepdims=True)).T
    sine = 2 * (w * y - x * z)
    locked = np.abs(sine) > _GIMBAL
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    locked_roll = np.arctan2(2 * np.sign(sine) * (x * y - w * z), 1 - 2 * (x * x + z * z))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    euler = (
        np.where(locked, locked_roll, roll),
        np.arcsin(np.clip(sine, -1, 1)),
        np.where(locked, 0, yaw),
    )
    return np.stack(euler, axis=-1).astype(np.float32)


def relabel(state: np.ndarray) -> np.ndarray:
    """Movement actions as differences of consecutive states, without wrapping angles.

    Args:
      state: f32[T,d].

    Returns:
      f32[T-1,d]: the last step has no next state.
    """
    return state[1:] - state[:-1]


def unpack_zlib(column: np.ndarray) -> np.ndarray:
    """Zlib-packed little-endian floats, as in the kuka data set.

    Args:
      column: object[T] of bytes.

    Returns:
      f32[T,k].

    Raises:
      BadRecordError: bytes that do not unpack to the same number of floats each.
    """
    try:
        rows = [np.frombuffer(zlib.decompress(packed), "<f4") for packed in column]
        return np.stack(rows).astype(np.float32)
    except (zlib.error, ValueError, TypeError) as e:
        raise BadRecordError(f"not zlib-packed f32 rows of one length ({e})") from e


def decode_instruction(value: Any, encoding: str) -> str:
    """The instruction of one step; surrounding white space is removed.

    Args:
      value: bytes or str; for "code_points" (language_table) i32[n], which ends at the first 0.
      encoding: one of LANGUAGE_ENCODINGS.

    Raises:
      BadRecordError: not UTF-8, or no code points.
    """
    try:
        if encoding == "code_points":
            points = np.asarray(value).reshape(-1).tolist()
            text = "".join(map(chr, points)).partition("\0")[0]
        else:
            text = value if isinstance(value, str) else bytes(value).decode("utf-8")
    except (ValueError, TypeError, OverflowError) as e:
        raise BadRecordError(f"instruction is not {encoding} ({e})") from e
    return text.strip()


OPERATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "binarize": binarize,
    "rel2abs": rel2abs,
    "invert": lambda values: 1 - values,
    "clip": lambda values: np.clip(values, 0, 1),
    "relabel": relabel,
    "quaternion_to_euler": quaternion_to_euler,
}
