"""Held-out parts of a data set: whole episodes (or records), by a hash of what they are.

Never by a split's name: Bridge's two splits hold the same episodes (../shared/data/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from st4vla_jax.data.index_folder import build_once, digest, open_array, write_array
from st4vla_jax.data.robot_spec import nearest
from st4vla_jax.data.source_files import SourceError

PARTS = ("train", "held_out")


def is_held_out(content: np.ndarray, share: float) -> np.ndarray:
    """The rule: of the distinct contents, those with the lowest hashes.

    Copies fall on the same side whatever their split, order or image encoding, the number of
    distinct contents held out is ``share`` of all to rounding (at least one), a larger share holds
    out those of a smaller one too, and new episodes change the side only of those near the cut.

    Args:
      content: u64[E] content hashes, which must be spread evenly (blake2b).
      share: of the distinct contents, 0..1.

    Returns:
      bool[E].
    """
    if not share:
        return np.zeros(len(content), bool)
    distinct = np.unique(content)
    count = max(1, math.floor(share * len(distinct) + 0.5))
    return content <= distinct[count - 1]


def part_problems(share: float, part: str) -> list[str]:
    """What is wrong with these settings of a source."""
    problems = []
    if not 0 <= share <= 1:
        problems.append(f"holdout: the share {share} must lie in 0..1")
    if part not in PARTS:
        problems.append(f"part: {part!r}{nearest(part, PARTS)}")
    elif part == "held_out" and not share:
        problems.append("part: nothing is held out; set holdout to a share of the episodes")
    return problems


def check_part(share: float, part: str, what: str) -> None:
    """Raises SourceError if `part_problems` finds something; ``what`` names the data."""
    if problems := part_problems(share, part):
        raise SourceError(f"{what}: " + "; ".join(problems))


class Part(NamedTuple):
    """Rows of an index that a source uses.

    Attributes:
      folder: where they are kept; digest: sha256 of them.
      rows: i64[K], or range(N) where all are used, which takes no memory.
      left_out: how many others each reason leaves out.
    """

    folder: Path
    digest: str
    rows: np.ndarray | range
    left_out: dict[str, int]


def open_part(
    index: Path, settings: list[Any], count: int, reasons: Callable[[], dict[str, np.ndarray]]
) -> Part:
    """Opens the rows of an index that are left when reasons are applied, choosing them first.

    Args:
      index: folder of the index; the choice is kept in it.
      settings: all that decides the choice, beside the index.
      count: N rows of the index.
      reasons: bool[N] of the rows to leave out, by reason; the first that holds counts.

    Raises:
      SourceError: nothing is left.
    """

    def build(work: Path) -> dict[str, Any]:
        keep, left_out = np.ones(count, bool), {}
        for reason, holds in reasons().items():
            left_out[reason] = int((holds & keep).sum())
            keep &= ~holds
        if not keep.any():
            raise SourceError(f"{index}: none of {count} samples is kept: {left_out}")
        if keep.all():
            return {"left_out": left_out, "digest": digest(count)}
        rows = np.flatnonzero(keep)
        write_array(work / "rows.npy", rows)
        return {"left_out": left_out, "digest": digest(rows)}

    folder = index / f"part-{digest(settings)[:16]}"
    manifest = build_once(folder, build)
    path = folder / "rows.npy"
    rows = open_array(path) if path.exists() else range(count)
    return Part(folder, manifest["digest"], rows, manifest["left_out"])


def other_part(content: np.ndarray, share: float, part: str) -> dict[str, np.ndarray]:
    """The reason to leave out rows of the other part: bool[N] by its name.

    Args:
      content: u64[N] of each row; rows of one episode have one.
      share: see `is_held_out`; 0 = no reason.
      part: "train" or "held_out".
    """
    if not share:
        return {}
    held_out = is_held_out(content, share)
    return {"held out": held_out} if part == "train" else {"training": ~held_out}
