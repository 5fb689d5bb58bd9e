"""Which samples sit where in step s: a pure function of (config, lengths, seed, s).

The unit is a window of W steps.  It draws a fixed number of samples of each data set and puts them
into the places of a layout (data/layout.py) that was packed once, for the largest window that can
occur.  What can occur is bounded exactly: samples are ranked by length, and a low-discrepancy
sequence decides from which class of lengths each draw comes, so all windows have nearly the same
lengths, while a keyed permutation, another one in each epoch, decides which sample of the class.

differs: DESIGN.md D6 packs each window anew.  Then nothing can be proved at start but by packing
every window of the run, and samples of one episode, which are equally long, end up side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np

from st4vla_jax.batch import VISION_BIN
from st4vla_jax.data.classes import Classes, classify
from st4vla_jax.data.layout import DIMENSIONS, Layout, lay_out, lay_out_best
from st4vla_jax.data.members import (
    Member,
    ScheduleError,
    fits,
    member_problems,
    report_dropped,
)
from st4vla_jax.data.packing import Capacity
from st4vla_jax.data.shuffle import Lattice, mixed, permuted
from st4vla_jax.data.source import Lengths

_LOG = logging.getLogger(__name__)
_WEIGHT_BITS = 40
_EFFICIENT = 0.9  # a lower efficiency is worth a warning


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """What an update holds and how it is drawn.

    Attributes:
      robot_samples, grounding_samples: of one update (the paper: 256 and 64).
      tokens: T, at most: a shorter multiple of 128 is taken where it packs clearly better, unless
        ``sequences`` is given.  Longer samples are left out.
      slots: P, targets: M, robot: K, each 0 = what the layout takes.
      sequences: B, or 0 = the fewest that hold.
      multiple: B is a multiple of this (devices on data and fsdp x accumulation).
      views: V.
      window: W steps.
      seed: of order, paraphrases and augmentation.
    """

    robot_samples: int = 256
    grounding_samples: int = 64
    tokens: int = 1024
    slots: int = 0
    targets: int = 0
    robot: int = 0
    sequences: int = 0
    multiple: int = 1
    views: int = 1
    window: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "robot_samples and grounding_samples are both 0, or one is negative": (
                min(self.robot_samples, self.grounding_samples) < 0
                or not self.robot_samples + self.grounding_samples
            ),
            f"tokens {self.tokens}, window {self.window} and multiple {self.multiple} must be at "
            "least 1": min(self.tokens, self.window, self.multiple) < 1,
            f"slots {self.slots} is not a multiple of {VISION_BIN}": self.slots % VISION_BIN,
            f"sequences {self.sequences} is not a multiple of {self.multiple}": (
                self.sequences % self.multiple
            ),
        }
        if problems := [text for text, bad in checks.items() if bad]:
            raise ScheduleError("schedule: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Draw:
    """A sample in its place; ``epoch`` counts from 0, ``paraphrase`` numbers the encoder."""

    member: int
    index: int
    epoch: int
    paraphrase: int


@dataclasses.dataclass(frozen=True)
class _Stream:
    """The endless order in which one data set is drawn, and its places in the layout.

    Attributes:
      number: of the member.
      classes, lattice: see those.
      share: (low, high) cumulative weights among its kin, in units of 2**-40.
      per_window: robot or grounding samples of a window, of all its kin.
      places: i32[p] class of each place, ascending; first: number of its first place.
    """

    number: int
    classes: Classes
    lattice: Lattice
    share: tuple[int, int]
    per_window: int
    places: np.ndarray
    first: int

    def drawn(self, window: int) -> int:
        """Samples drawn before a window."""
        low, high = (self.per_window * window * c >> _WEIGHT_BITS for c in self.share)
        return high - low


class Schedule:
    """The batch schedule.

    Attributes:
      config: as given.
      capacity: of one sequence, complete.
      sequences: B.
      mean_tokens: of a step's samples.
      dropped: for each member the samples that fit no sequence, i64[n].
    """

    def __init__(self, config: ScheduleConfig, members: Sequence[Member]) -> None:
        """Builds the layout and so proves that every window fits.

        Raises:
          ScheduleError: a mixture without the samples asked for; lists every problem.
          LayoutError: given ``sequences`` do not hold; names what would.
        """
        self.config, self.members = config, tuple(members)
        if problems := list(member_problems(config, self.members)):
            raise ScheduleError("schedule:\n  " + "\n  ".join(problems))
        fitting = [fits(member, config) for member in self.members]
        kept = [np.flatnonzero(mask) for mask in fitting]
        self.dropped = [np.flatnonzero(~mask) for mask in fitting]
        report_dropped(self.members, self.dropped, kept, config)
        self._streams = _streams(config, self.members, kept)
        sizes = np.concatenate([_sizes(s, self.members[s.number]) for s in self._streams])
        groups = np.concatenate([s.classes.kinds[s.places] for s in self._streams])
        starts = np.repeat([s.first for s in self._streams], [len(s.places) for s in self._streams])
        given = np.array([getattr(config, name) for name in DIMENSIONS], np.int64)
        self._places = sizes, starts + groups, config.window, given
        self._layout: Layout = (
            lay_out(*self._places, multiple=config.multiple, sequences=config.sequences)
            if config.sequences
            else lay_out_best(*self._places, multiple=config.multiple)
        )
        self.sequences = self._layout.sequences
        self.capacity = _capacity(config, self._layout, sizes)
        window_tokens = (_mean_tokens(s, self.members[s.number]) for s in self._streams)
        self.mean_tokens = sum(window_tokens) / config.window
        _report_efficiency(self)
        self.window = functools.lru_cache(maxsize=4)(self._window)

    @property
    def efficiency(self) -> float:
        """Share of the tokens of a step that samples use, on average."""
        return self.mean_tokens / (self.sequences * self.capacity.tokens)

    @property
    def bound(self) -> float:
        """The efficiency if only the whole number of sequences cost something."""
        tokens, multiple = self.capacity.tokens, self.config.multiple
        least = -(-self.mean_tokens // (tokens * multiple)) * multiple
        return self.mean_tokens / (least * tokens)

    def sequences_of(self, tokens: int) -> int:
        """How many sequences of another T hold the same steps; raises LayoutError if none do."""
        *places, given = self._places
        given = np.concatenate([[tokens], given[1:]])
        return lay_out(*places, given, multiple=self.config.multiple).sequences

    def plan(self, step: int) -> tuple[tuple[Draw, ...], ...]:
        """The samples of each of the B sequences of a step, in order."""
        window, number = divmod(step, self.config.window)
        return self.window(window)[number]

    def _window(self, window: int) -> tuple[tuple[tuple[Draw, ...], ...], ...]:
        """Draws of a window, by step and sequence."""
        rows = [[[] for _ in range(self.sequences)] for _ in range(self.config.window)]
        # The layout is the same in each window; which step gets which part of it is not.
        rng = np.random.default_rng([self.config.seed, window])
        turn = rng.permutation(self.config.window)
        for stream in self._streams:
            for place, *draw in zip(*self._draws(stream, window), strict=True):
                step, row = turn[self._layout.step[place]], self._layout.row[place]
                rows[step][row].append(Draw(stream.number, *draw))
        return tuple(tuple(tuple(row) for row in step) for step in rows)

    def _draws(self, stream: _Stream, window: int) -> tuple[list[int], ...]:
        """Place, sample, epoch and paraphrase of each draw of a data set in a window."""
        classes, seed = stream.classes, self.config.seed
        begin, end = stream.drawn(window), stream.drawn(window + 1)
        positions = np.arange(begin, end, dtype=np.int64)
        epoch = positions // stream.lattice.size
        rank = stream.lattice(positions)
        by_rank = np.argsort(rank, kind="stable")
        rank, epoch = rank[by_rank], epoch[by_rank]
        own = np.searchsorted(classes.starts, rank, side="right") - 1
        start, size = classes.starts[own], np.diff(classes.starts)[own]
        key = mixed(seed, stream.number, epoch, own)
        rank = start + permuted(rank - start, size, key)
        phase = epoch % len(classes.order)
        index = classes.order[phase, rank]
        place = _place(classes, stream.places, own)
        assert (stream.places[place] <= own).all(), "schedule: a sample is over its place"
        paraphrase = (_offsets(seed, stream.number, index, len(classes.order)) + phase) % len(
            classes.order
        )
        return tuple(x.tolist() for x in (place + stream.first, index, epoch, paraphrase))


def _mean_tokens(stream: _Stream, member: Member) -> float:
    """Of what a data set gives to a window."""
    kept = stream.classes.order[0]
    mean = np.mean([lengths.tokens[kept].mean() for lengths in member.lengths])
    low, high = stream.share
    return float(mean) * stream.per_window * (high - low) / 2**_WEIGHT_BITS


def _report_efficiency(schedule: Schedule) -> None:
    if schedule.efficiency < _EFFICIENT:
        _LOG.warning(
            "packing efficiency is %.1f %%: %d sequences of %d tokens for %.0f tokens of samples a "
            "step; a whole multiple of %d sequences allows %.1f %% at most. python -m "
            "st4vla_jax.data.preview lists values of schedule.tokens that pack better",
            100 * schedule.efficiency, schedule.sequences, schedule.capacity.tokens,
            schedule.mean_tokens, schedule.config.multiple, 100 * schedule.bound,
        )  # fmt: skip


def _place(classes: Classes, places: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The place of each draw: the k-th longest of a kind takes the kind's k-th place.

    Args:
      classes: of the data set.
      places: class of each place, ascending.
      own: class of each draw, ascending.
    """
    kinds, place_kinds = classes.kinds[own], classes.kinds[places]
    return np.arange(len(own)) - np.searchsorted(kinds, kinds) + np.searchsorted(place_kinds, kinds)


def _offsets(seed: int, member: int, index: np.ndarray, count: int) -> np.ndarray:
    """Paraphrase of each sample in phase 0; it takes the next one in each epoch."""
    return (mixed(seed, member, index, 1) % np.uint64(count)).astype(np.int64)


def _streams(
    config: ScheduleConfig, members: Sequence[Member], kept: Sequence[np.ndarray]
) -> list[_Stream]:
    streams, first = [], 0
    for robot, count in ((True, config.robot_samples), (False, config.grounding_samples)):
        numbers = [i for i, m in enumerate(members) if m.is_robot == robot]
        total = sum(members[i].weight for i in numbers)
        cumulative, low = 0.0, 0
        for i in numbers:
            cumulative += members[i].weight
            high = round(cumulative / total * 2**_WEIGHT_BITS)
            if i == numbers[-1]:
                high = 2**_WEIGHT_BITS
            per_window = count * config.window
            # The largest difference of two floors that advance by these amounts a window.
            most = -(-per_window * high >> _WEIGHT_BITS) - (per_window * low >> _WEIGHT_BITS)
            phases = _phases(config.seed, i, members[i].lengths)
            classes = classify(phases, kept[i], max(most, 1))
            lattice = Lattice(len(kept[i]))
            places = _places(classes, lattice, most)
            streams.append(_Stream(i, classes, lattice, (low, high), per_window, places, first))
            low, first = high, first + len(places)
    return streams


def _phases(seed: int, member: int, lengths: tuple[Lengths, ...]) -> list[Lengths]:
    """Lengths in each phase: which paraphrase a sample has rotates from epoch to epoch."""
    if len(lengths) == 1:
        return list(lengths)
    samples = np.arange(len(lengths[0].tokens))
    tokens = np.stack([x.tokens for x in lengths])
    offsets = _offsets(seed, member, samples, len(lengths))
    return [
        dataclasses.replace(lengths[0], tokens=tokens[(offsets + p) % len(lengths), samples])
        for p in range(len(lengths))
    ]


def _places(classes: Classes, lattice: Lattice, most: int) -> np.ndarray:
    """i32[p] the class of each place that a window of up to ``most`` draws can need.

    Of each kind there are as many places as draws can hit it, and of these as many for its k
    longest classes as draws can hit those: ranks of both are intervals.
    """
    places = []
    for kind in range(int(classes.kinds[-1]) + 1):
        own = np.flatnonzero(classes.kinds == kind)
        widths = classes.starts[own + 1] - classes.starts[own[0]]
        reach = lattice.most(most, widths)
        places.append(np.repeat(own, np.diff(reach, prepend=0)))
    return np.concatenate(places).astype(np.int32)


def _sizes(stream: _Stream, member: Member) -> np.ndarray:
    """i64[p,4] size of each place, in the order of DIMENSIONS."""
    boxes = stream.classes.boxes[stream.places].astype(np.int64)
    return np.concatenate([boxes, np.full((len(boxes), 1), int(member.is_robot))], axis=1)


def _capacity(config: ScheduleConfig, layout: Layout, sizes: np.ndarray) -> Capacity:
    robot = sizes[sizes[:, 3] > 0]
    tokens, slots, targets, count = (int(c) for c in layout.capacity)
    return Capacity(
        tokens=tokens,
        slots=-(-slots // VISION_BIN) * VISION_BIN,
        targets=targets,
        robot=count,
        sample_tokens=int(robot[:, 0].max(initial=0)),
        views=config.views if count else 0,
    )
