"""Prepares and times jobs of ``bench step`` in this process."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from st4vla_jax.bench_jobs import Job, Preset
from st4vla_jax.bench_rows import brief, finished, line, say

GIB = 2**30


@dataclasses.dataclass
class Prepared:
    """A job ready to run, with what is known before it does."""

    job: Job
    run: Callable[[], float]
    facts: dict[str, Any]


class Bench:
    """Prepares jobs of one model; each side's model and optimizer are made once."""

    def __init__(self, preset: Preset, seed: int):
        self.preset, self.seed = preset, seed
        self.sides: dict[str, Any] = {}

    def side(self, name: str) -> Any:
        """TorchStep or JaxStep."""
        if name in self.sides:
            return self.sides[name]
        start = time.perf_counter()
        cfg = self.preset.cfg
        if name == "torch":
            from st4vla_jax import bench_torch_step

            bench_torch_step.register_varlen()
            side = bench_torch_step.TorchStep(cfg, self.preset.device)
        else:
            from st4vla_jax.bench_jax_step import JaxStep

            side = JaxStep(cfg, self.preset.runtime)
            side.initialise()
        self.sides[name] = side
        took = time.perf_counter() - start
        say(f"{side.version}: {side.num_parameters:,} parameters, {took:.1f} s")
        return side

    def prepare(self, job: Job) -> Prepared:
        """Draws the samples, builds the batch, compiles."""
        from st4vla_jax import bench_mixture
        from st4vla_jax.flops import model_flops

        side, options, cfg = self.side(job.side), job.options, self.preset.cfg
        samples = bench_mixture.Mixture(cfg, self.seed).draw(options.robot, options.grounding)
        packed = bench_mixture.packed_batch(cfg, samples)
        facts = {
            "job": job.text,
            "side": job.side,
            "version": side.version,
            "parameters": side.num_parameters,
            "samples": len(samples),
            "tokens": sum(len(sample.tokens) for sample, _ in samples),
            "model_flops": model_flops(cfg, packed, options.repeats)["total"],
        }
        if job.side == "torch":
            from st4vla_jax.bench_torch_step import padding

            robot, grounding = side.inputs(samples)
            slots = robot["input_ids"].numel() + grounding["input_ids"].numel()
            facts["padding"] = {
                "tokens": 1 - facts["tokens"] / slots,
                "robot_tokens": padding(robot),
                "grounding_tokens": padding(grounding),
            }
            return Prepared(job, side.make_step(options, samples), facts)
        batch, _ = options.batch(cfg, samples)
        step = side.make_step(options, samples)
        facts |= {
            "padding": bench_mixture.padding(batch),
            "shape": step.shape,
            "compile_s": step.compile_s,
            "memory_gib": step.memory_gib,
        }
        return Prepared(job, step.run, facts)


def take_turns(preset: Preset, jobs: Sequence[Job], repeats: int, seed: int) -> list[dict]:
    """All jobs in this process, interleaved after one warm-up each."""
    bench, prepared = Bench(preset, seed), []
    for job in jobs:
        one = bench.prepare(job)
        start = time.perf_counter()
        loss = one.run()
        say(f"{job.text}: first step {time.perf_counter() - start:.1f} s, loss {loss:.3f}")
        prepared.append(one)
    times: list[list[float]] = [[] for _ in jobs]
    spent: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats):
        for one, own, cpu in zip(prepared, times, spent, strict=True):
            start, used = time.perf_counter(), time.process_time()
            one.run()
            own.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        say(f"turn {turn + 1} of {repeats}: " + ", ".join(f"{own[-1]:.2f} s" for own in times))
    return [
        finished(one.facts | {"turn": 1, "cpu_s": min(cpu)}, own, one.run(), None)
        for one, own, cpu in zip(prepared, times, spent, strict=True)
    ]


def worker(preset: Preset, jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """One side's jobs on a GPU; appends a line of JSON for each to ``args.results``."""
    bench, longest = Bench(preset, args.seed), 0.0
    for job in jobs:
        start, left = time.time(), args.deadline - time.time()
        if left < max(args.reserve, longest):
            say(f"{job.text}: left out, {left:.0f} s left")
            continue
        try:
            row = _timed(bench, job, args)
        except Exception as error:  # noqa: BLE001 (one job's failure must not cost the others)
            row = {"job": job.text, "side": job.side, "turn": args.turn, "error": _short(error)}
            say(f"{job.text}: {row['error']}")
        if "error" in row:  # not above: the exception's frames hold what is to be freed
            _recover(bench, job)
        longest = max(longest, time.time() - start)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _timed(bench: Bench, job: Job, args: argparse.Namespace) -> dict:
    start = time.perf_counter()
    reset, peak_memory, kind, peak_flops = _device(job.side, bench.preset.device)
    bench.side(job.side)
    reset()
    one = bench.prepare(job)
    say(f"{job.text}: prepared in {time.perf_counter() - start:.1f} s; {brief(one.facts)}")
    need = one.facts.get("memory_gib", 0.0)
    if need > args.memory_gib:
        raise MemoryError(f"needs {need:.0f} GiB of {args.memory_gib:.0f} GiB")
    for _ in range(2):
        loss = one.run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < args.repeats or time.perf_counter() - begin < args.seconds:
        turn = time.perf_counter()
        loss = one.run()
        times.append(time.perf_counter() - turn)
    row = finished(one.facts, times, loss, peak_flops) | {"device": kind, "turn": args.turn}
    row["peak_gib"] = peak_memory()
    say(f"{job.text}: {line(row)}")
    return row


def _device(side: str, device: str) -> tuple[Callable, Callable, str, float | None]:
    """(resets the peak, peak in GiB, name of the device, its peak FLOP/s)."""
    from st4vla_jax.flops import PEAK_FLOPS

    if side == "torch" and device == "cuda":
        import torch

        kind = torch.cuda.get_device_name()
        reset = torch.cuda.reset_peak_memory_stats
        return reset, lambda: torch.cuda.max_memory_allocated() / GIB, kind, PEAK_FLOPS.get(kind)
    if side == "torch":
        return lambda: None, lambda: 0.0, device, None
    import jax

    first = jax.devices()[0]

    def peak() -> float:
        return (first.memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB

    return lambda: None, peak, first.device_kind, PEAK_FLOPS.get(first.device_kind)


def _recover(bench: Bench, job: Job) -> None:
    """Frees what a failed step held; a donated state that is gone is made anew."""
    gc.collect()
    side = bench.sides.get(job.side)
    if side is not None:
        side.recover()


def _short(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return "out of memory" if "out of memory" in text.lower() else text.splitlines()[0][:300]
