"""The data sets of a schedule: their length tables, and which of their samples can be drawn."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from st4vla_jax.data.encoder import UNUSABLE
from st4vla_jax.data.layout import DIMENSIONS
from st4vla_jax.data.source import Lengths

if TYPE_CHECKING:
    from st4vla_jax.data.schedule import ScheduleConfig

_LOG = logging.getLogger(__name__)
_NAMED = 5  # dropped samples that are named one by one


class ScheduleError(ValueError):
    """A mixture that cannot be scheduled; lists every problem."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One data set of a mixture.

    Attributes:
      name: for messages and metrics.
      lengths: one table for each paraphrase; they differ in tokens only.
      weight: share among the robot, or among the grounding, data sets.
    """

    name: str
    lengths: tuple[Lengths, ...]
    weight: float = 1.0

    @property
    def is_robot(self) -> bool:
        return bool(self.lengths[0].robot.any())


def member_problems(config: ScheduleConfig, members: Sequence[Member]) -> Iterator[str]:
    """Yields what keeps these data sets from giving what an update holds."""
    for robot, count in ((True, config.robot_samples), (False, config.grounding_samples)):
        name = "robot" if robot else "grounding"
        own = [m for m in members if m.is_robot == robot]
        if count and not own:
            yield f"{name}_samples is {count}, but no data set has {name} samples"
        if own and not count:
            yield f"{name}_samples is 0, but {', '.join(m.name for m in own)} would give some"
    for member in members:
        if not member.weight > 0:
            yield f"{member.name}: weight {member.weight} is not positive; leave the set out"
        if not len(member.lengths[0].tokens):
            yield f"{member.name}: it has no samples"
        elif member.is_robot and not member.lengths[0].robot.all():
            yield f"{member.name}: robot and grounding samples in one data set; split it"
        first = member.lengths[0]
        for other in member.lengths[1:]:
            same = all(
                np.array_equal(getattr(other, name), getattr(first, name))
                for name in ("slots", "targets", "robot")
            )
            if not same:
                yield f"{member.name}: paraphrases may change the number of tokens only"


def fits(member: Member, config: ScheduleConfig) -> np.ndarray:
    """bool[n] True for samples that fit a sequence in every paraphrase."""
    fits = np.ones(len(member.lengths[0].tokens), bool)
    for lengths in member.lengths:
        for name in DIMENSIONS:
            limit = getattr(config, name)
            fits &= getattr(lengths, name) <= (limit or UNUSABLE - 1)
    return fits


def report_dropped(
    members: Sequence[Member],
    dropped: Sequence[np.ndarray],
    kept: Sequence[np.ndarray],
    config: ScheduleConfig,
) -> None:
    """Counts and names what fits no sequence; a data set of which nothing is left is an error."""
    for member, lost in zip(members, dropped, strict=True):
        if not len(lost):
            continue
        worst = np.max([lengths.tokens[lost] for lengths in member.lengths], axis=0)
        named = ", ".join(
            f"[{i}] ({'unusable' if t == UNUSABLE else f'{t} tokens'})"
            for i, t in zip(lost[:_NAMED], worst, strict=False)
        )
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        _LOG.warning(
            "%s: %d of %d samples fit no sequence and are left out: %s%s",
            member.name, len(lost), len(member.lengths[0].tokens), named, more,
        )  # fmt: skip
    empty = [m.name for m, k in zip(members, kept, strict=True) if not len(k)]
    if empty:
        raise ScheduleError(
            f"schedule: no sample of {', '.join(empty)} fits a sequence of {config.tokens} tokens; "
            "raise tokens (or slots, targets)"
        )
