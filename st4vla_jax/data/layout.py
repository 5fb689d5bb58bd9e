"""Places for samples in the packed sequences of one window, laid out once for a whole run.

The layout holds the largest window that can occur, so every window fits by construction.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from st4vla_jax.data.dealing import deal
from st4vla_jax.data.shuffle import Lattice

DIMENSIONS = ("tokens", "slots", "targets", "robot")  # T, P, M, K, as in packing.Capacity

# What one unit of each dimension costs beside a token, in FLOPs of a training step of Qwen2.5-VL 3B
# (decoder; vision tower; vocabulary projection) and DiT-B with 8 noise draws a robot sample.
COSTS = np.array([1, 0.2, 0.1, 30])

TOKEN_UNIT = 128  # of T: blocks of attention kernels on TPU
_WORTH = 0.98  # of the tokens of a step: a shorter T must save more than this leaves


class LayoutError(ValueError):
    """Samples that do not fit the sequences; says which capacity would."""


def first_fit_decreasing(sizes: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """First-fit-decreasing vector packing.

    Args:
      sizes: i64[n,d]; no item exceeds the capacity.
      capacity: i64[d].

    Returns:
      i64[n] row of each item; rows are opened as needed.
    """
    rows = np.empty(len(sizes), np.int64)
    free = np.tile(capacity, (len(sizes), 1))
    opened = 0
    for item in _decreasing(sizes, capacity):
        fits = (free[: opened + 1] >= sizes[item]).all(axis=1)
        row = int(fits.argmax())
        opened = max(opened, row + 1)
        free[row] -= sizes[item]
        rows[item] = row
    return rows


def even_fit(sizes: np.ndarray, capacity: np.ndarray, num_rows: int) -> np.ndarray | None:
    """Packs into a fixed number of rows, each item into the emptiest one (worst fit, decreasing).

    It spreads every kind of sample over all rows, where first fit puts equal ones side by side.

    Returns:
      i64[n] row of each item, or None if this way finds no room.
    """
    rows = np.empty(len(sizes), np.int64)
    used = np.zeros((num_rows, sizes.shape[1]), np.int64)
    scale = np.maximum(capacity, 1)
    for item in _decreasing(sizes, capacity):
        after = used + sizes[item]
        load = (after / scale).max(axis=1)
        load[(after > capacity).any(axis=1)] = np.inf
        row = int(load.argmin())
        if np.isinf(load[row]):
            return None
        used[row] = after[row]
        rows[item] = row
    return rows


def fullest_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Packs one dimension row by row, each with the subset that fills it best (bin slack).

    Each row takes the longest item left, then the best filling by a bounded subset sum, whose
    reachable sums are the bits of an integer.  Nearly optimal, but neighbouring rows are unlike.

    Args:
      sizes: i64[n], each at most ``room``.
      room: of a row.

    Returns:
      i64[n] row of each item.
    """
    left: dict[int, list[int]] = {}
    for item in np.argsort(-sizes, kind="stable").tolist():
        left.setdefault(int(sizes[item]), []).append(item)
    rows = np.empty(len(sizes), np.int64)
    number = 0
    while left:
        for size in _fullest(left, room):
            rows[left[size].pop()] = number
            if not left[size]:
                del left[size]
        number += 1
    return rows


def _fullest(left: dict[int, list[int]], room: int) -> list[int]:
    """Sizes of one row: the largest left, and those that fill what remains best."""
    chosen = [max(left)]
    free = room - chosen[0]
    mask = (1 << (free + 1)) - 1
    sums, steps = 1, []
    for size in sorted((size for size in left if size <= free), reverse=True):
        for _ in range(min(len(left[size]) - (size == chosen[0]), free // max(size, 1))):
            steps.append((size, sums))
            sums |= sums << size & mask
    aim = sums.bit_length() - 1
    for size, before in reversed(steps):
        if not before >> aim & 1:
            chosen.append(size)
            aim -= size
    return chosen


def _decreasing(sizes: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Items by falling size, the largest share of any capacity; ties keep their order."""
    return np.argsort(-(sizes / np.maximum(capacity, 1)).max(axis=1), kind="stable")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places of one window.

    Attributes:
      step, row: i64[n] where each place is: step of the window, sequence of the step.
      sequences: B, sequences of a step.
      capacity: i64[4] in the order of DIMENSIONS; free ones are what the layout takes.
    """

    step: np.ndarray
    row: np.ndarray
    sequences: int
    capacity: np.ndarray


def lay_out(
    sizes: np.ndarray,
    groups: np.ndarray,
    num_steps: int,
    capacity: np.ndarray,
    *,
    multiple: int = 1,
    sequences: int = 0,
) -> Layout:
    """Packs the places of a window into the fewest sequences, and these as cheaply as it can.

    Args:
      sizes: i64[n,4] of each place.
      groups: see `deal`.
      num_steps: W.
      capacity: i64[4]; 0 = as much as needed (not for tokens).
      multiple: the number of sequences is a multiple of this (devices x accumulation).
      sequences: B, or 0 for the fewest that hold.

    Raises:
      LayoutError: the given number of sequences does not hold; names what would.
    """
    step = deal(sizes, groups, num_steps)
    return _lay_out(sizes, step, capacity, multiple, sequences)


def lay_out_best(
    sizes: np.ndarray,
    groups: np.ndarray,
    num_steps: int,
    capacity: np.ndarray,
    *,
    multiple: int = 1,
) -> Layout:
    """`lay_out` with T as given, or with a shorter T that takes clearly fewer tokens a step.

    With few sequences a step their whole number decides the efficiency: 7.1 sequences of T tokens
    take 8.  Sequences of another length may come out even.  Arguments as in `lay_out`.
    """
    step = deal(sizes, groups, num_steps)
    best = _lay_out(sizes, step, capacity, multiple)
    most = int(np.bincount(step, sizes[:, 0]).max())
    shortest = max(int(sizes[:, 0].max()), int(capacity[0]) // 2)
    longest = (int(capacity[0]) - 1) // TOKEN_UNIT * TOKEN_UNIT
    for tokens in range(longest, shortest - 1, -TOKEN_UNIT):
        aim = _WORTH * best.sequences * best.capacity[0]
        if -(-most // (tokens * multiple)) * multiple * tokens > aim:
            continue
        shorter = np.concatenate([[tokens], capacity[1:]])
        with contextlib.suppress(LayoutError):
            found = _lay_out(sizes, step, shorter, multiple)
            best = found if found.sequences * tokens <= aim else best
    return best


def _lay_out(
    sizes: np.ndarray, step: np.ndarray, capacity: np.ndarray, multiple: int, sequences: int = 0
) -> Layout:
    """`lay_out` of places that have their steps."""
    items = [np.flatnonzero(step == s) for s in range(int(step.max()) + 1)]
    steps = [sizes[own] for own in items]
    totals = np.max([own.sum(axis=0) for own in steps], axis=0)
    bound = capacity > 0
    least = int(np.ceil(totals[bound] / capacity[bound]).max())
    least = -(-least // multiple) * multiple
    counts = [sequences] if sequences else range(least, 2 * least + multiple, multiple)
    for count in counts:
        found = []
        for first in range(len(_PACKERS)):
            rows = _pack_steps(steps, capacity, count, _PACKERS[first:])
            if rows is not None:
                row = np.empty(len(sizes), np.int64)
                row[np.concatenate(items)] = np.concatenate(rows)
                found.append(_finished(sizes, step, row, count, capacity))
        if found:
            return min(found, key=lambda layout: COSTS @ layout.capacity)
    raise LayoutError(_what_would_fit(steps, capacity, counts[-1], totals))


def _pack_steps(
    steps: list[np.ndarray],
    capacity: np.ndarray,
    num_rows: int,
    packers: Sequence[Callable[[np.ndarray, np.ndarray, int], np.ndarray | None]],
) -> list[np.ndarray] | None:
    """Rows of each step's places by the first packer that finds room, or None."""
    packed: dict[bytes, np.ndarray] = {}  # steps are alike, many are equal
    for sizes in steps:
        key = sizes.tobytes()
        if key in packed:
            continue
        for packer in packers:
            if (rows := packer(sizes, capacity, num_rows)) is not None:
                break
        else:
            return None
        packed[key] = _interleaved(rows, sizes[:, 3], num_rows)
    return [packed[sizes.tobytes()] for sizes in steps]


def _evenly(sizes: np.ndarray, capacity: np.ndarray, num_rows: int) -> np.ndarray | None:
    """`even_fit`; a free capacity counts in the loads too, so that it comes out even."""
    return even_fit(sizes, _soft(sizes, capacity, num_rows), num_rows)


def _first(sizes: np.ndarray, capacity: np.ndarray, num_rows: int) -> np.ndarray | None:
    rows = first_fit_decreasing(sizes, _soft(sizes, capacity, num_rows))
    return rows if rows.max() < num_rows else None


def _fullest_rows(sizes: np.ndarray, capacity: np.ndarray, num_rows: int) -> np.ndarray | None:
    rows = fullest_fit(sizes[:, 0], int(capacity[0]))
    if rows.max() >= num_rows:
        return None
    used = np.zeros((num_rows, len(DIMENSIONS)), np.int64)
    np.add.at(used, rows, sizes)
    return rows if (used <= np.where(capacity > 0, capacity, used)).all() else None


_PACKERS = (_evenly, _first, _fullest_rows)


def _soft(sizes: np.ndarray, capacity: np.ndarray, num_rows: int) -> np.ndarray:
    """The capacity; a free one is twice what even rows would take."""
    aim = np.maximum(-(-sizes.sum(axis=0) // num_rows), sizes.max(axis=0))
    return np.where(capacity > 0, capacity, 2 * np.maximum(aim, 1))


def _interleaved(rows: np.ndarray, robot: np.ndarray, num_rows: int) -> np.ndarray:
    """Renumbers rows so that any stretch of them, a host's block, has its share of the robots."""
    by_robots = np.argsort(np.bincount(rows, robot, num_rows), kind="stable")
    number = np.empty(num_rows, np.int64)
    number[by_robots[Lattice(num_rows)(np.arange(num_rows))]] = np.arange(num_rows)
    return number[rows]


def _finished(
    sizes: np.ndarray, step: np.ndarray, row: np.ndarray, count: int, capacity: np.ndarray
) -> Layout:
    used = np.zeros((int(step.max()) + 1, count, len(DIMENSIONS)), np.int64)
    np.add.at(used, (step, row), sizes)
    capacity = np.where(capacity > 0, capacity, used.max(axis=(0, 1)))
    assert (used <= capacity).all(), "layout: a sequence is over its capacity"
    return Layout(step, row, count, capacity)


def _what_would_fit(
    steps: list[np.ndarray], capacity: np.ndarray, num_rows: int, totals: np.ndarray
) -> str:
    """Names every single change that would make the window fit."""
    ways = []
    for d in np.flatnonzero(capacity):
        unit = 64 if DIMENSIONS[d] in ("tokens", "slots") else 1
        least = max(int(capacity[d]), int(totals[d]) // num_rows) // unit * unit + unit
        for room in range(least, 2 * least, unit):
            wider = np.where(np.arange(len(DIMENSIONS)) == d, room, capacity)
            if (totals > num_rows * wider)[wider > 0].any():
                break  # another capacity is too small as well
            if _pack_steps(steps, wider, num_rows, _PACKERS) is not None:
                ways.append(f"{DIMENSIONS[d]} {room} instead of {capacity[d]}")
                break
    given = ", ".join(f"{n} {c}" for n, c in zip(DIMENSIONS, capacity, strict=True) if c)
    advice = f"it would fit with {', or '.join(ways)}" if ways else "no single capacity would help"
    return (
        f"{num_rows} sequences a step with capacity {given} do not hold the samples asked for; "
        f"{advice}; or set sequences to 0 to get as many as it takes"
    )
