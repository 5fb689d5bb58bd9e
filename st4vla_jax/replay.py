"""Runs one update of a run again, exactly: its batch, picture, samples and metrics.

Step S is the update that follows S updates, whose metrics the run logged as step S + 1.
"""

from __future__ import annotations

import json

import jax
import numpy as np
from PIL import Image

from st4vla_jax.metrics import METRICS_FILE, read_metrics
from st4vla_jax.train_checkpoints import complete_steps
from st4vla_jax.train_lib import picture_of, sample_ids
from st4vla_jax.train_setup import Setup
from st4vla_jax.train_start import compile_step, first_state
from st4vla_jax.train_step import by_group


def replay(setup: Setup, step: int) -> int:
    """Goes from the nearest checkpoint at or before ``step`` to it and runs it; saves no state.

    Writes WORKDIR/replay/STEP/: batch.png, samples.json, metrics.json; prints where the metrics
    differ from those that the run logged for that step.

    Returns:
      the exit status: 0 if nothing differs from what was logged, or nothing was.
    """
    folder = setup.workdir / "replay" / str(step)
    before = [s for s in complete_steps(setup.checkpoints.folder) if s <= step]
    setup.resume_step = before[-1] if before else None
    try:
        with jax.set_mesh(setup.mesh):
            metrics, picture = _run(setup, step)
    finally:
        setup.checkpoints.close()
    if jax.process_index():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / "batch.png")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    samples = sample_ids(setup, step)
    (folder / "samples.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
    print(f"step {step}: {folder}")
    for name, value in metrics.items():
        print(f"  {name:<32}{value:.8g}")
    return _compared(setup, step, metrics)


def _run(setup: Setup, step: int) -> tuple[dict[str, float], Image.Image]:
    """Metrics of the step, and the picture of its batch."""
    say = print if jax.process_index() == 0 else lambda _: None
    state = first_state(setup, say)
    start = setup.resume_step or 0
    overfit = setup.flags.overfit_one_batch
    batches = setup.pipeline.batches(0 if overfit else start)
    compiled = None
    for number in range(start, step + 1):
        if compiled is None or not overfit:
            batch = next(batches)
        if compiled is None:
            compiled = compile_step(setup, batch)
        state, metrics = compiled(state, setup.to_device(batch))
        say(f"  ran step {number}")
    batches.close()
    values = jax.device_get(metrics)
    groups = by_group(values, setup.groups)
    named = {name: float(value) for name, value in values.items()} | groups
    return named, picture_of(setup, batch)


def _compared(setup: Setup, step: int, metrics: dict[str, float]) -> int:
    """Compares with the line that the run wrote after this step, if it did."""
    written = (setup.workdir / METRICS_FILE).exists()
    logged = read_metrics(setup.workdir) if written else []
    lines = [line for line in logged if line["step"] == step + 1 and "loss/total" in line]
    line = next(iter(lines), None)
    if line is None:
        print(f"the run logged no metrics after step {step} (log.every)")
        return 0
    shared = [name for name in metrics if name in line]
    differing = [n for n in shared if not np.array_equal(line[n], metrics[n], equal_nan=True)]
    for name in differing:
        print(f"differs: {name} was {line[name]:.8g}, is {metrics[name]:.8g}")
    if not differing:
        print(f"equal to what the run logged, all {len(shared)} numbers")
    return int(bool(differing))
