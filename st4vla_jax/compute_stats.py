"""Normalisation statistics of standardised actions and state, by embodiment, without images.

python -m st4vla_jax.compute_stats --data DIR --spec NAME_OR_JSON --out dataset_statistics.json
    [--data DIR --spec NAME_OR_JSON ...] [--split train] [--holdout SHARE] [--max-bad-records N]
    [--index-dir DIR]

DIR is a tfds-format (RLDS) or a LeRobot folder.  Data sets with one embodiment are taken together:
the result is that of one pass over all of their steps, whatever the order (data/stats.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from st4vla_jax.data.holdout import is_held_out
from st4vla_jax.data.normalize import EmbodimentStatistics, Statistics
from st4vla_jax.data.oxe import robot_spec
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import RobotSpec, StandardEpisode
from st4vla_jax.data.source import BadRecordError
from st4vla_jax.data.source_files import check_problems
from st4vla_jax.data.stats import EmbodimentAccumulator, accumulate


def standard_episodes(
    root: Path,
    spec: RobotSpec,
    split: str,
    max_bad_records: int,
    index_dir: Path | None = None,
    holdout: float = 0.0,
) -> Iterator[StandardEpisode]:
    """Yields the standardised episodes of a data set; no image is decoded.

    Args:
      root: tfds-format or LeRobot folder.
      spec: what its columns mean.
      split: of an RLDS set; LeRobot folders have one.
      max_bad_records: episodes that may be left out, named in the log.
      index_dir: where an RLDS set's index is kept; default: see `RldsSource`.
      holdout: share of the episodes that training does not see (`data.holdout`).

    Raises:
      ValueError, OSError: data or a spec that cannot be used, naming files and records.
    """
    if (root / "meta" / "info.json").is_file():
        yield from _lerobot_episodes(root, spec, max_bad_records, holdout)
        return
    view = next(iter(spec.images))
    source = RldsSource(
        root, spec, split, views=(view,), holdout=holdout, max_bad_records=max_bad_records,
        index_dir=index_dir,
    )  # fmt: skip
    yield from source.standard_episodes()


def compute(
    accumulators: Sequence[EmbodimentAccumulator],
) -> Statistics:
    """Merges data sets by embodiment; raises StatisticsError where they do not go together."""
    merged: dict[str, EmbodimentAccumulator] = {}
    for one in accumulators:
        name = one.spec.embodiment
        merged.setdefault(name, EmbodimentAccumulator(one.spec)).merge(one)
    return Statistics({name: one.result() for name, one in merged.items()})


def doubts(entry: EmbodimentStatistics, spec: RobotSpec) -> list[str]:
    """What is odd about an embodiment's actions: most often a wrong column, sign or unit."""
    action, found = entry.action, []
    for dim, name in enumerate(spec.names):
        low, high = action.min[dim], action.max[dim]
        if dim in spec.gripper and (low < 0 or high > 1):
            found.append(f"gripper {name!r} spans {low:g}..{high:g}, not 0 = closed .. 1 = open")
        elif low == high:
            found.append(f"{name!r} is always {low:g}")
    return found


def report(statistics: Statistics, specs: dict[str, RobotSpec]) -> str:
    """A table for the terminal."""
    lines = []
    for name, entry in statistics.items():
        spec = specs[name]
        lines.append(
            f"{name}: {entry.num_trajectories} episodes, {entry.num_transitions} steps"
            f"{', with state' if entry.state else ''}"
        )
        for dim, (label, unit) in enumerate(zip(spec.names, spec.units, strict=True)):
            moments = ("mean", "std", "min", "q01", "q99", "max")
            values = "  ".join(f"{m} {getattr(entry.action, m)[dim]:+.4g}" for m in moments)
            lines.append(f"  {label:<8} {values}  [{unit}]")
        lines += [f"  look at this: {doubt}" for doubt in doubts(entry, spec)]
    return "\n".join(lines)


def _lerobot_episodes(
    root: Path, spec: RobotSpec, allowed: int, holdout: float
) -> Iterator[StandardEpisode]:
    # pyarrow is an extra that RLDS users need not have.
    from st4vla_jax.data.lerobot_folder import LeRobotFolder, column_array
    from st4vla_jax.data.lerobot_index import episode_content

    folder, bad = LeRobotFolder(root), []
    chosen = folder.select(None)
    if holdout:
        columns = [*folder.numbers, "task_index"]
        tables = folder.tables(chosen, columns)
        content = np.array([episode_content(folder, table) for _, table in tables], np.uint64)
        held_out = is_held_out(content, holdout)
        chosen = [one for one, left_out in zip(chosen, held_out, strict=True) if not left_out]
    for episode, table in folder.tables(chosen, spec.columns):
        try:
            yield spec.standardize({c: column_array(table[c], c) for c in spec.columns})
        except BadRecordError as e:
            bad.append(f"{root}: episode {episode.index}: {e}")
    check_problems(str(root), bad, allowed)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.compute_stats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, action="append", required=True, help="repeat for more")
    parser.add_argument(
        "--spec", action="append", required=True, help="for each --data, in order; or one for all"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="train", help="of RLDS sets; 'all' takes every split")
    parser.add_argument(
        "--holdout", type=float, default=0.0, help="share of episodes that training does not see"
    )
    parser.add_argument("--max-bad-records", type=int, default=0, help="for each data set")
    parser.add_argument("--index-dir", type=Path, help="where RLDS indices are kept")
    args = parser.parse_args(argv)
    if len(args.spec) == 1:
        args.spec *= len(args.data)
    if len(args.spec) != len(args.data):
        parser.error(f"{len(args.data)} --data for {len(args.spec)} --spec")
    return args


def run(args: argparse.Namespace) -> None:
    """Computes, prints and writes the statistics."""
    specs = [robot_spec(name) for name in args.spec]
    accumulators = []
    for root, spec in zip(args.data, specs, strict=True):
        episodes = standard_episodes(
            root, spec, args.split, args.max_bad_records, args.index_dir, args.holdout
        )
        accumulators.append(accumulate(spec, episodes))
    statistics = compute(accumulators)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: never half a file.
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    statistics.save(temporary)
    temporary.replace(args.out)
    print(report(statistics, {spec.embodiment: spec for spec in specs}))
    print(f"{args.out}: statistics of {', '.join(statistics)}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; bad input gives one message on stderr and exit code 1."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(args)
    except (ValueError, OSError) as error:  # every error class of this package is a ValueError
        print(f"compute_stats: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
