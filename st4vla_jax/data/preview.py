"""What a config's data gives, before anything is trained: shares, packing, duplicates.

python -m st4vla_jax.data.preview --config=configs/data.py [--steps 1000] [--start 0]
    [--config.data.KEY=VALUE ...]

Reads no images, only indexes (which it builds if there are none).
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from st4vla_jax.data.layout import TOKEN_UNIT
from st4vla_jax.data.pipeline import Pipeline
from st4vla_jax.data.schedule import Schedule
from st4vla_jax.data.settings import DataSettings, open_pipeline

_BETTER = 0.01  # of the efficiency: less is not worth another T
_OFFERED = 3
PAPER = (256, 64)  # robot and grounding samples of an update (spec upstream.md 3)


@dataclasses.dataclass(frozen=True)
class SetPreview:
    """One data set over the steps looked at.

    Attributes:
      samples: kept; dropped: samples that fit no sequence.
      weight: as declared, over the sum of its kin's; share: of all draws of its kin.
      draws: in these steps; epochs: how often a sample is seen in them.
      duplicates: share of draws whose step holds another draw of the same episode, or None where
        the source does not know episodes.
    """

    name: str
    kind: str
    samples: int
    dropped: int
    weight: float
    share: float
    draws: int
    epochs: float
    duplicates: float | None


@dataclasses.dataclass(frozen=True)
class Preview:
    """A mixture over some steps; ``efficiency`` is used over available tokens."""

    sets: tuple[SetPreview, ...]
    steps: int
    sequences: int
    efficiency: float
    lowest_efficiency: float


def preview(pipeline: Pipeline, steps: int, start: int = 0) -> Preview:
    """Counts what the schedule gives in ``steps`` steps from ``start`` on."""
    schedule = pipeline.schedule
    members = schedule.members
    counts = np.zeros(len(members), np.int64)
    twice = np.zeros(len(members), np.int64)
    episodes = [getattr(d.source, "episodes", None) for d in pipeline.data_sets]
    episodes = [None if e is None else np.asarray(e()) for e in episodes]
    used = np.zeros(steps)
    for number in range(steps):
        drawn: list[list[int]] = [[] for _ in members]
        for row in schedule.plan(start + number):
            for d in row:
                drawn[d.member].append(d.index)
                used[number] += members[d.member].lengths[d.paraphrase].tokens[d.index]
        for i, own in enumerate(drawn):
            counts[i] += len(own)
            if episodes[i] is not None and own:
                same = np.unique(episodes[i][own], return_counts=True)[1]
                twice[i] += same[same > 1].sum()
    used /= schedule.sequences * schedule.capacity.tokens
    sets = []
    for i, member in enumerate(members):
        kin = [j for j, m in enumerate(members) if m.is_robot == member.is_robot]
        kept = len(member.lengths[0].tokens) - len(schedule.dropped[i])
        sets.append(
            SetPreview(
                name=member.name,
                kind="robot" if member.is_robot else "grounding",
                samples=kept,
                dropped=len(schedule.dropped[i]),
                weight=member.weight / sum(members[j].weight for j in kin),
                share=float(counts[i] / max(counts[kin].sum(), 1)),
                draws=int(counts[i]),
                epochs=counts[i] / kept,
                duplicates=None if episodes[i] is None else float(twice[i] / max(counts[i], 1)),
            )
        )
    return Preview(tuple(sets), steps, schedule.sequences, float(used.mean()), float(used.min()))


def longer_sequences(schedule: Schedule) -> list[tuple[int, int, float]]:
    """(T, B, efficiency) of the lengths up to twice the given one that pack better, best first.

    Shorter ones were tried by the schedule itself.
    """
    first = schedule.config.tokens // TOKEN_UNIT + 1
    found = []
    for tokens in range(first * TOKEN_UNIT, 2 * schedule.config.tokens + 1, TOKEN_UNIT):
        sequences = schedule.sequences_of(tokens)
        efficiency = schedule.mean_tokens / (sequences * tokens)
        if efficiency > schedule.efficiency + _BETTER:
            found.append((tokens, sequences, efficiency))
    return sorted(found, key=lambda one: -one[2])


def table(found: Preview, pipeline: Pipeline) -> list[str]:
    """The lines that the command prints."""
    schedule = pipeline.schedule
    config, capacity = schedule.config, schedule.capacity
    lines = [
        f"{'data set':28}{'kind':10}{'samples':>10}{'dropped':>8}{'declared':>9}{'share':>8}"
        f"{'draws':>10}{'epochs':>10}{'duplicates':>12}"
    ]
    for s in found.sets:
        duplicates = "-" if s.duplicates is None else f"{s.duplicates:.3%}"
        lines.append(
            f"{s.name[:27]:28}{s.kind:10}{s.samples:>10}{s.dropped:>8}{s.weight:>9.4f}"
            f"{s.share:>8.4f}{s.draws:>10}{s.epochs:>10.3f}{duplicates:>12}"
        )
    return [
        *lines,
        "duplicates: draws whose step holds another one of the same episode",
        f"samples an update: {config.robot_samples} robot + {config.grounding_samples} grounding "
        f"(the paper: {PAPER[0]} + {PAPER[1]})",
        f"sequences a step: {found.sequences} of tokens {capacity.tokens}, vision slots "
        f"{capacity.slots}, supervised {capacity.targets}, robot samples {capacity.robot}, tokens "
        f"of one {capacity.sample_tokens}",
        f"packing efficiency over {found.steps} steps: {found.efficiency:.1%} of the tokens, "
        f"lowest step {found.lowest_efficiency:.1%}; whole sequences, a multiple of "
        f"{config.multiple}, allow {schedule.bound:.1%}",
        *(
            f"  schedule.tokens {tokens} would take {sequences} sequences: {efficiency:.1%}"
            for tokens, sequences, efficiency in longer_sequences(schedule)[:_OFFERED]
        ),
        f"data fingerprint: {pipeline.fingerprint[:16]}",
    ]


def parse(argv: Sequence[str], **defaults: Any) -> tuple[ConfigDict, flags.FlagValues]:
    """Reads ``--config=FILE.py``, its overrides and integer flags with these defaults.

    Flags live in an own table, so that nothing global changes.
    """
    own = flags.FlagValues()
    arguments = [sys.argv[0], *argv]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=own, sys_argv=arguments)
    for name, value in defaults.items():
        flags.DEFINE_integer(name, value, "see above", flag_values=own)
    own(arguments)
    if own["config"].value is None:
        raise SystemExit(f"{sys.argv[0]}: needs --config=FILE.py\n\n{__doc__}")
    return own["config"].value, own


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config, own = parse(sys.argv[1:] if argv is None else argv, steps=1000, start=0)
    except flags.Error as error:
        raise SystemExit(f"{error}\n\n{__doc__}") from error
    pipeline = open_pipeline(DataSettings.from_dict(config.data.to_dict()))
    found = preview(pipeline, own["steps"].value, own["start"].value)
    print("\n".join(table(found, pipeline)))


if __name__ == "__main__":
    main()
