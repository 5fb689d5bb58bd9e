"""Samples of one data set sorted into classes of nearly equal length.

A class is a box (tokens, slots, targets) that holds each of its members.  Classes that share the
last two make a kind; within a kind they form a chain, so a place for a longer class takes a
shorter sample too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from st4vla_jax.data.layout import COSTS
from st4vla_jax.data.source import Lengths

MAX_LEVELS = 64  # token classes of one kind
MIN_MEMBERS = 32  # of a class on average, so that the order within it stays random
_MAX_VALUES = 256  # distinct lengths that the search for levels looks at

_EXTRA_PLACES = (
    3  # places, at most, that one more kind adds to a window (data/shuffle.py, Lattice.most)
)


@dataclasses.dataclass(frozen=True)
class Classes:
    """Classes of one data set, in the order that its samples are ranked in.

    Attributes:
      order: i32[V,n] sample at each rank, for each phase (paraphrase in turn).
      starts: i64[C+1] first rank of each class, then n.
      kinds: i32[C] kind of each class, ascending; tokens descend within a kind.
      boxes: i32[C,3] tokens, slots, targets that a place for this class offers.
    """

    order: np.ndarray
    starts: np.ndarray
    kinds: np.ndarray
    boxes: np.ndarray


def classify(
    phases: list[Lengths], kept: np.ndarray, per_window: int, max_levels: int = MAX_LEVELS
) -> Classes:
    """Builds the classes.

    Args:
      phases: lengths of every sample in each phase; only tokens differ between phases.
      kept: i64[n] samples to use.
      per_window: samples that a window draws: with few of them, few kinds pay off.
      max_levels: token classes of one kind.
    """
    first = phases[0]
    # i32 throughout: for a set of millions of samples these arrays are the peak of memory.
    tokens, slots, targets = (x[kept] for x in (first.tokens, first.slots, first.targets))
    kinds = _kinds(tokens, slots, targets, per_window)
    level = np.empty(len(kept), np.int32)
    for kind in range(kinds.max() + 1):
        members = np.flatnonzero(kinds == kind)
        count = min(max_levels, max(1, len(members) // MIN_MEMBERS))
        level[members] = _levels(tokens[members], count)
    ranked = np.lexsort((-tokens, kinds))
    change = (np.diff(kinds[ranked]) != 0) | (np.diff(level[ranked]) != 0)
    starts = np.concatenate([[0], np.flatnonzero(change) + 1, [len(kept)]])
    class_kinds = kinds[ranked][starts[:-1]]

    orders, boxes = [], []
    for phase in phases:
        table = np.stack([phase.tokens[kept], phase.slots[kept], phase.targets[kept]], 1)
        # Sorted anew, since another paraphrase changes the tokens; ranks of classes stay.
        ranked = np.lexsort((-table[:, 0], kinds))
        orders.append(kept[ranked].astype(np.int32))
        boxes.append(np.maximum.reduceat(table[ranked], starts[:-1], axis=0))
    box = np.max(boxes, axis=0)
    for i in range(len(box) - 2, -1, -1):  # a chain: each box holds the ones after it
        if class_kinds[i] == class_kinds[i + 1]:
            box[i] = np.maximum(box[i], box[i + 1])
    return Classes(np.stack(orders), starts, class_kinds.astype(np.int32), box.astype(np.int32))


def _levels(values: np.ndarray, count: int) -> np.ndarray:
    """Splits values into at most ``count`` levels so that rounding up to a level's top costs least.

    Exact dynamic programme over the distinct values (at most _MAX_VALUES quantiles of them).

    Returns:
      i64[n] level of each value, ascending.
    """
    distinct, counts = np.unique(values, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    step = -(-len(distinct) // _MAX_VALUES)
    ends = np.unique(np.append(np.arange(step, len(distinct) + 1, step), len(distinct)))
    tops, below = distinct[ends - 1], below[ends]
    # cost[j] = least cost of the values up to tops[j] with the levels so far; back: its last cut.
    cost = below * tops.astype(np.float64)
    backs = []
    for _ in range(min(count, len(tops)) - 1):
        # [j, i]: the last level reaches from after tops[i] to tops[j].
        through = cost[None, :] + (below[:, None] - below[None, :]) * tops[:, None]
        through[np.triu_indices(len(tops))] = np.inf
        back = through.argmin(axis=1)
        better = through[np.arange(len(tops)), back] < cost
        backs.append(np.where(better, back, -1))
        cost = np.where(better, through[np.arange(len(tops)), back], cost)
    cuts, at = [], len(tops) - 1
    for back in reversed(backs):
        if back[at] >= 0:
            at = back[at]
            cuts.append(tops[at])
    return np.searchsorted(np.array(sorted(cuts), np.int64), values, side="left")


def _kinds(
    tokens: np.ndarray, slots: np.ndarray, targets: np.ndarray, per_window: int
) -> np.ndarray:
    """Splits samples by slots and targets as long as a split saves more than its extra places.

    Returns:
      i32[n] kind of each sample, from 0.
    """
    code = slots.astype(np.int64) << 32 | targets
    codes, counts = np.unique(code, return_counts=True)
    pairs = np.stack([codes >> 32, codes & 0xFFFFFFFF], 1)
    share = per_window / len(tokens)
    # Of an extra place: what an average sample costs.
    price = COSTS[:3] @ [tokens.mean(), slots.mean(), targets.mean()]
    kind_of_pair = np.zeros(len(pairs), np.int32)
    pending, number = [np.arange(len(pairs))], 0
    while pending:
        members = pending.pop()
        halves = _best_split(pairs[members], counts[members] * share, _EXTRA_PLACES * price)
        if halves is None:
            kind_of_pair[members] = number
            number += 1
        else:
            pending += [members[half] for half in halves]
    return kind_of_pair[np.searchsorted(codes, code)]


def _best_split(
    pairs: np.ndarray, counts: np.ndarray, price: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """The cut along one axis that saves most, as two index arrays; None if none saves ``price``.

    Args:
      pairs: i64[n,2] distinct (slots, targets).
      counts: f64[n] samples of each in a window.
      price: what a cut must save at least, in tokens of a window.
    """
    scaled = pairs * COSTS[1:3]
    whole = counts.sum() * scaled.max(axis=0).sum()
    best, saved = None, price
    for axis in range(2):
        order = np.argsort(pairs[:, axis], kind="stable")
        sums = np.cumsum(counts[order])
        low = np.maximum.accumulate(scaled[order], axis=0).sum(axis=1) * sums
        high = np.maximum.accumulate(scaled[order][::-1], axis=0)[::-1].sum(axis=1)
        high = high * (sums[-1] - sums + counts[order])
        gain = whole - low[:-1] - high[1:]
        gain[np.diff(pairs[order, axis]) == 0] = -np.inf
        if len(gain) and gain.max() > saved:
            cut, saved = gain.argmax() + 1, gain.max()
            best = order[:cut], order[cut:]
    return best
