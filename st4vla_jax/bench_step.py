"""``bench step``: one whole stage-2 update, ours against the reference's in PyTorch.

python -m st4vla_jax.bench step                             ~100 M parameters, f32, this CPU
python -m st4vla_jax.bench step --preset gpu-3b --out DIR   3B + DINOv2-S + DiT-B, bf16, one GPU

Synthetic samples with the real mixture's lengths (bench_mixture.py); the same robot and grounding
samples for both sides.  A job is a side with options, as ``torch:robot=32,grounding=8`` or
``jax:robot=32,grounding=8,remat=dots`` (bench_torch_step.py and bench_jax_step.py, StepOptions).

On a CPU all jobs live in one process and take turns.  On a GPU, whose memory holds one state only
(or with --alternate), each side has a process at a time: the first turn times every job, the second
once more the best of each side.  Every result is written to DIR/step.jsonl at once.

XLA options worth a try on a GPU, one job each (``xla=name=value+name=value``):
xla_gpu_enable_triton_gemm=false (cuBLAS only, compiles faster), xla_gpu_triton_gemm_any=true,
xla_gpu_enable_command_buffer= (off), xla_gpu_autotune_level=4, and on several GPUs
xla_gpu_enable_latency_hiding_scheduler=true.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st4vla_jax.bench_jobs import Job, JobError, parse_jobs, presets
from st4vla_jax.bench_rows import best_of, read_rows, say, summary, table
from st4vla_jax.bench_worker import take_turns, worker


def register(commands: Any) -> None:
    """Adds ``step`` to the benchmark's commands."""
    sub = commands.add_parser("step", help="a whole training step against the reference in torch")
    sub.add_argument("--preset", default="cpu-100m", choices=sorted(presets()))
    sub.add_argument("--job", action="append", help="side:name=value,...; repeat for more")
    sub.add_argument("--repeats", type=int, default=5, help="timed steps of a job")
    sub.add_argument("--seed", type=int, default=0, help="of the samples")
    sub.add_argument("--json", type=Path, help="also write the rows here")
    sub.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bench_step",
                     help="GPU: folder of step.jsonl")  # fmt: skip
    sub.add_argument("--budget", type=float, default=390, help="GPU: seconds for everything")
    sub.add_argument("--seconds", type=float, default=4, help="GPU: time a job at least so long")
    sub.add_argument("--second-turn", type=float, default=110, help="GPU: seconds kept for it")
    sub.add_argument("--alternate", action="store_true", help="a process for each side, in turn")
    sub.add_argument("--reserve", type=float, default=45, help="GPU: start no job with less left")
    sub.add_argument("--memory-gib", type=float, default=130, help="GPU: skip what needs more")
    for name, kind in (("results", Path), ("turn", int), ("deadline", float)):
        sub.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    sub.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    sub.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """What ``step`` does."""
    preset = presets()[args.preset]
    try:
        jobs = parse_jobs(args.job or preset.jobs)
    except JobError as error:
        raise SystemExit(str(error)) from None
    if args.worker:
        worker(preset, jobs, args)
        return
    apart = args.alternate or preset.device != "cpu"
    rows = alternate(args, jobs) if apart else take_turns(preset, jobs, args.repeats, args.seed)
    result = {"machine": platform.machine(), "rows": rows, "summary": summary(rows)}
    print(table(rows))
    for name, found in result["summary"].items():
        text = f"{name}: {found['jax']} / {found['torch']} = {found['ratio']:.2f}"
        print(text + (f"; by CPU time {found['cpu_ratio']:.2f}" if "cpu_ratio" in found else ""))
    for path in ([args.json] if args.json else []) + ([args.out / "step.json"] if apart else []):
        path.write_text(json.dumps(result, indent=2))


def alternate(args: argparse.Namespace, jobs: Sequence[Job]) -> list[dict]:
    """Each side in its own process, one at a time; two turns, the second of the best jobs only."""
    last = time.time() + args.budget
    results = args.out / "step.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    sides = list(dict.fromkeys(job.side for job in jobs))
    for turn in (1, 2):
        deadline = last - args.second_turn * (turn == 1)
        for side in sides:
            own = [job.text for job in jobs if job.side == side]
            if turn == 2:
                best = best_of(read_rows(results), side, 1)
                own = [best["job"]] if best else []
            if own and deadline - time.time() > args.reserve:
                _run_worker(args, side, own, results, turn, deadline)
    return read_rows(results)


def _run_worker(args, side: str, jobs: list[str], results: Path, turn: int, deadline: float):
    command = [
        sys.executable, "-m", "st4vla_jax.bench", "step", "--preset", args.preset, "--worker",
        "--results", str(results), "--turn", str(turn), "--deadline", str(deadline),
        "--repeats", str(args.repeats), "--seconds", str(args.seconds), "--seed", str(args.seed),
        "--reserve", str(args.reserve), "--memory-gib", str(args.memory_gib),
    ]  # fmt: skip
    for job in jobs:
        command += ["--job", job]
    cache = Path(tempfile.gettempdir()) / "bench_step_jaxcache"
    env = {"JAX_COMPILATION_CACHE_DIR": str(cache), **os.environ}
    env |= {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if side == "torch":
        env["JAX_PLATFORMS"] = "cpu"  # the card is torch's
    left = deadline - time.time()
    say(f"turn {turn}: {side}, {len(jobs)} jobs, {left:.0f} s left")
    try:
        done = subprocess.run(command, env=env, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        say(f"{side}: stopped at the deadline")
        return
    if done.returncode:
        say(f"{side}: ended with exit status {done.returncode}")
