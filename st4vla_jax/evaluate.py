"""Scores a checkpoint: held-out actions, grounding, closed loop on the tabletop.

python -m st4vla_jax.evaluate --checkpoint DIR --out OUT --suite tabletop --tasks reach pick
    [--splits train ...] [--episodes 50] [--executor receding --execute 4] [--against OTHER_OUT]
python -m st4vla_jax.evaluate --checkpoint DIR --out OUT --suite grounding --data TEST.jsonl
    [--prior TRAIN.jsonl] [--masks FOLDER] [--coordinates fraction] [--limit N] [--by KEY]
python -m st4vla_jax.evaluate --checkpoint WORKDIR --out OUT --suite actions

Several suites may be given at once.  ``--checkpoint`` is a training run's workdir (its latest
step), a step's folder or a converted checkpoint.  OUT gets

  summary.json          every metric, versions, checkpoint hash
  grounding_NAME.jsonl  one line an answer
  episodes.jsonl        one line an episode, written as it ends: the same command continues
  report.html           everything, with pictures, in one file

``--against`` names the OUT of another checkpoint on the same records or episodes: both are compared
pair by pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from st4vla_jax.checkpoint import STATISTICS
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.settings import DataSettings
from st4vla_jax.eval.chunk_sampler import ChunkSampler
from st4vla_jax.eval.closed_loop import Episode, LoopConfig
from st4vla_jax.eval.grounding import Prior
from st4vla_jax.eval.report import Section, write_report
from st4vla_jax.eval.runner import (
    Outcome,
    checkpoint_hash,
    run_actions,
    run_closed_loop,
    run_grounding,
    versions,
)
from st4vla_jax.metrics import METRICS_FILE, read_metrics
from st4vla_jax.policy.ensemble import (
    AdaptiveEnsemble,
    Executor,
    RecedingHorizon,
    TemporalEnsemble,
)
from st4vla_jax.policy.policy import Policy
from st4vla_jax.predict import write_json
from st4vla_jax.resume import find_checkpoint
from st4vla_jax.tabletop.environment import Tabletop
from st4vla_jax.tabletop.sampling import SPLITS, splits_of
from st4vla_jax.tabletop.tasks import TASKS
from st4vla_jax.train_checkpoints import RUN
from st4vla_jax.train_config import TrainConfig

# Plots of a run's metrics: title -> pattern of the whole name.
_CURVES = {
    "PSS": r"align/pss(_random|_top)?",
    "gradient cosine": r"align/cosine",
    "IoU@0.5": r"eval/.*iou50(_floor)?",
    "action error": r"eval/action_mse(_\w+)?",
    "held-out text loss": r"eval/text_loss",
    "training loss": r"loss/(action|text)",
}


def actions(args: argparse.Namespace, policy: Policy, checkpoint: Path, about: Any) -> Outcome:
    """Held-out chunks of the data that the checkpoint was trained on."""
    config = run_config(checkpoint)
    if config is None:
        raise ValueError(
            f"{checkpoint}: no {RUN}, so its data are not known: --suite actions needs a "
            "checkpoint that st4vla_jax.train wrote"
        )
    data: DataSettings = dataclasses.replace(
        config.data,
        tokenizer=str(checkpoint / "meta" / "tokenizer"),
        statistics=str(checkpoint / "meta" / STATISTICS),
        augment=None,
    )
    return run_actions(policy, data, batches=args.batches, samples=args.samples)


def grounding(args: argparse.Namespace, policy: Policy, checkpoint: Path, about: Any) -> Outcome:
    """Answers to the questions of a JSONL file."""
    open_source = functools.partial(
        GroundingSource, images=args.images, coordinates=args.coordinates
    )
    source = open_source(args.data, name=args.name or args.data.stem)
    prior = None
    if args.prior:
        train = open_source(args.prior, name="prior")
        prior = Prior.of((train.turns(i), train.image_sizes(i)) for i in range(len(train)))
    return run_grounding(
        policy, source, args.out, masks=args.masks, prior=prior, against=args.against,
        limit=args.limit, by=args.by, batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip


def tabletop(args: argparse.Namespace, policy: Policy, checkpoint: Path, about: Any) -> Outcome:
    """Episodes of the tabletop."""
    pairs = [(t, s) for t in args.tasks for s in args.splits if s in splits_of(t)]
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    episodes = [Episode(seed, task, split) for task, split in pairs for seed in seeds]
    views = args.views or trained_views(checkpoint)
    sampler = ChunkSampler(
        policy, views=views, batch_size=args.num_envs, embodiment=args.embodiment,
        cfg_scale=args.cfg_scale, ddim_steps=args.ddim_steps,
    )  # fmt: skip
    names = ("executor", "execute", "horizon", "decay", "alpha", "cfg_scale", "ddim_steps")
    settings = about | {name: getattr(args, name) for name in names}
    settings |= {"views": list(views), "image_size": args.image_size}
    return run_closed_loop(
        sampler, functools.partial(Tabletop, args.image_size, views), episodes, executor(args),
        args.out, settings=settings, cfg=LoopConfig(args.num_envs, timeout_s=args.timeout),
        against=args.against,
    )  # fmt: skip


SUITES = {"actions": actions, "grounding": grounding, "tabletop": tabletop}


def executor(args: argparse.Namespace) -> Callable[[], Executor]:
    """What turns chunks into actions, as the flags say."""
    return {
        "receding": functools.partial(RecedingHorizon, args.execute),
        "temporal": functools.partial(TemporalEnsemble, args.horizon, args.decay),
        "adaptive": functools.partial(AdaptiveEnsemble, args.horizon, args.alpha),
    }[args.executor]


def run_config(checkpoint: Path) -> TrainConfig | None:
    """Config of the run that wrote a checkpoint; None for a converted one."""
    path = checkpoint / RUN
    if not path.is_file():
        return None
    return TrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["run"]["config"])


def trained_views(checkpoint: Path) -> tuple[str, ...]:
    """Views of the run's first robot data set; the overhead one if the run is not known."""
    config = run_config(checkpoint)
    robots = [entry for entry in config.data.sets if entry.is_robot] if config else []
    return robots[0].views if robots else ("primary",)


def training_section(checkpoint: Path) -> list[Section]:
    """Curves of the run that a checkpoint lies in: PSS, IoU, action error, losses."""
    workdir = checkpoint.parent.parent
    if not (workdir / METRICS_FILE).is_file():
        return []
    lines = read_metrics(workdir)
    names = sorted({name for line in lines for name in line})
    curves = {
        title: {
            name: [(line["step"], line[name]) for line in lines if name in line]
            for name in names
            if re.fullmatch(pattern, name)
        }
        for title, pattern in _CURVES.items()
    }
    return [Section("Training", curves={title: found for title, found in curves.items() if found})]


def evaluate(args: argparse.Namespace) -> None:
    """Runs the suites and writes summary and report."""
    checkpoint = find_checkpoint(args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    policy = Policy.load(checkpoint)
    about = {"checkpoint_sha256": checkpoint_hash(checkpoint), "versions": versions()}
    metrics: dict[str, float] = {}
    sections = []
    for name in args.suite:
        outcome = SUITES[name](args, policy, checkpoint, about)
        metrics |= outcome.metrics
        sections.append(outcome.section)
        print_section(outcome.section)
    sections += training_section(checkpoint)
    step = policy.meta.step
    summary = about | {"checkpoint": str(checkpoint), "step": step, "metrics": finite(metrics)}
    write_json(args.out / "summary.json", summary)
    title = f"{checkpoint}" + ("" if step is None else f", step {step}")
    write_report(args.out / "report.html", title, sections)
    print(f"{args.out / 'report.html'}, {args.out / 'summary.json'}")


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: null."""
    return {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}


def print_section(section: Section) -> None:
    """The section's numbers as lines."""
    print(section.title)
    for line in (*section.lines, *("  ".join(row) for row in section.rows)):
        print(f"  {line}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True)
    add("--out", type=Path, required=True, help="folder for the results")
    add("--suite", nargs="+", choices=list(SUITES), required=True)
    add("--against", type=Path, help="--out of another checkpoint, to compare with")

    add = parser.add_argument_group("actions").add_argument
    add("--batches", type=int, default=16, help="held-out batches, at most")
    add("--samples", type=int, default=32, help="chunks sampled for each robot sample")

    add = parser.add_argument_group("grounding").add_argument
    add("--data", type=Path, help="JSON or JSONL of questions with their answers")
    add("--name", help="of the benchmark in metrics (default: the file's)")
    add("--images", type=Path, help="folder that image paths are relative to")
    add("--masks", type=Path, help="folder that mask paths are relative to (Where2Place)")
    add("--coordinates", default="none", help="frame of numbers in texts: pixels, fraction, ...")
    add("--prior", type=Path, help="training records, for the floor")
    add("--limit", type=int, help="first records only")
    add("--by", metavar="KEY", help="scores for each value of a key of the records too")
    add("--batch-size", type=int, default=8)
    add("--max-new-tokens", type=int, default=128)

    add = parser.add_argument_group("tabletop").add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    add("--splits", nargs="+", choices=SPLITS, default=["train"], metavar="SPLIT")
    add("--episodes", type=int, default=50, help="of each task and split")
    add("--first-seed", type=int, default=10**9, help="beyond those of demonstrations")
    add("--embodiment", help="key of the statistics (default: the only one)")
    add("--views", nargs="+", help="in the order of training (default: the run's)")
    add("--image-size", type=int, default=112)
    add("--num-envs", type=int, default=16)
    add("--timeout", type=float, default=60.0, help="seconds after which a step has hung")
    add("--executor", choices=("receding", "temporal", "adaptive"), default="receding")
    add("--execute", type=int, default=4, help="receding: steps of a chunk that are executed")
    add("--horizon", type=int, default=7, help="ensembles: chunks that are averaged")
    add("--decay", type=float, default=0.01, help="temporal: of the weights")
    add("--alpha", type=float, default=0.1, help="adaptive: sharpness of the weights")
    add("--cfg-scale", type=float, default=1.5)
    add("--ddim-steps", type=int, default=10)
    args = parser.parse_args(argv)
    if "grounding" in args.suite and args.data is None:
        parser.error("--suite grounding needs --data")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command; bad input gives one line on stderr and exit code 1."""
    args = parse_args(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:  # every error class of this package is a ValueError
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
