"""The paper's ablation in miniature, on the built-in tabletop.

python -m st4vla_jax.ablation --out DIR --budget smoke|small|medium [--rows NAME ...]
    [--decay 1.0 0.5 0.1 0.0] [--ratio 1 5 10 20]
    [--updates STAGE0 STAGE1 ROW] [--data EPISODES GROUNDING GENERIC] [--curve N]
    [--rollouts N] [--records N] [--tasks TASK ...] [--stage0 CHECKPOINT] [--jobs N]

Stage 0, once: a tiny VLM on generic scenes; it stands in for Qwen2.5-VL.  Then each row at equal
action updates and seeds: vanilla_vla (actions alone), cotrain (and grounding), prompt (and the
spatial prompt), decay (and the gradient decay), full (and stage 1 on robot scenes before), frozen
(the VLM of stage 1, never updated).  ``--decay`` and ``--ratio`` add rows that are ``full`` but for
one value.

Everything is the project's own commands; their output is in DIR/logs.  The same command goes on
where it stopped, and with more rows it adds them.  DIR gets table.md, table.json and report.html.
``small`` is 20 minutes a row on 2 cores, ``medium`` is for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from st4vla_jax.ablation_rows import BUDGETS, ROWS, AblationError, Budget, Plan, chosen_rows
from st4vla_jax.ablation_run import StoppedError, claim, run_chains, run_jobs
from st4vla_jax.ablation_table import REPORT, write_results
from st4vla_jax.distributed import RESTART_EXIT_CODE
from st4vla_jax.resume import find_checkpoint
from st4vla_jax.signals import orderly_end
from st4vla_jax.tabletop.tasks import TASKS


def ablation(args: argparse.Namespace) -> None:
    """Runs what is missing and writes the table.

    Raises:
      AblationError: settings that make no sense, or a job that failed.
      CheckpointError: ``--stage0`` is no checkpoint.
      StoppedError: told to stop.
    """
    rows = chosen_rows(args.rows, args.decay, args.ratio)
    if args.jobs < 1:
        raise AblationError(f"--jobs {args.jobs}: at least 1")
    budget = chosen_budget(args)
    stage0 = find_checkpoint(args.stage0).absolute() if args.stage0 else None
    out = args.out.absolute()
    settings: dict[str, Any] = {"budget": args.budget, **dataclasses.asdict(budget)}
    settings["stage0_checkpoint"] = str(stage0) if stage0 else None
    claim(out, settings)
    plan = Plan(out, budget, stage0)
    run_jobs(out, plan.shared(rows))
    run_chains(out, plan.chains(rows), args.jobs)
    for line in write_results(plan, rows, settings):
        print(line)
    print(out / REPORT)


def chosen_budget(args: argparse.Namespace) -> Budget:
    """The named budget with the flags' changes."""
    changes: dict[str, Any] = {k: getattr(args, k) for k in ("rollouts", "records", "curve")}
    if args.updates:
        changes |= dict(zip(("stage0", "stage1", "row"), args.updates, strict=True))
    if args.data:
        changes |= dict(zip(("episodes", "grounding", "generic"), args.data, strict=True))
    if args.tasks:
        changes["tasks"] = tuple(args.tasks)
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(BUDGETS[args.budget], **given)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m st4vla_jax.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of everything")
    add("--budget", choices=list(BUDGETS), required=True)
    add("--rows", nargs="+", default=[], metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    add("--decay", nargs="+", type=float, default=[], help="more rows: full with this decay")
    add("--ratio", nargs="+", type=float, default=[], help="more rows: full, action : text loss")
    add("--updates", nargs=3, type=int, metavar=("STAGE0", "STAGE1", "ROW"))
    add("--data", nargs=3, type=int, metavar=("EPISODES", "GROUNDING", "GENERIC"))
    add("--curve", type=int, help="checkpoints of a row that are asked for boxes")
    add("--rollouts", type=int, help="closed-loop episodes of each task")
    add("--records", type=int, help="test questions of each domain")
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="of the closed loop")
    add("--jobs", type=int, default=1, help="rows side by side (on one GPU too)")
    add("--stage0", type=Path, help="checkpoint in place of stage 0")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; bad input gives one message on stderr and exit code 1."""
    args = parse_args(argv)
    try:
        with orderly_end(RESTART_EXIT_CODE):  # the running jobs save their state
            ablation(args)
    except StoppedError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return RESTART_EXIT_CODE
    except (AblationError, ValueError, OSError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
