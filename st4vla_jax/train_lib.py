"""The training loop: everything that is not a pure function of (state, batch).

The order of one step: take its batch, dispatch the update, look at the update before it (a gradient
that is not finite), then log, evaluate and save on the state that the update gave.  A stop request
is agreed on by all processes before the next batch is taken, so that all save the same step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from st4vla_jax.batch import Batch
from st4vla_jax.data.batch_picture import batch_picture
from st4vla_jax.distributed import RESTART_EXIT_CODE, Preemption
from st4vla_jax.flops import mfu, model_flops, trainable_shares
from st4vla_jax.goodput import Goodput, StepTimer, memory_metrics
from st4vla_jax.metrics import MetricWriter, WandbSettings
from st4vla_jax.progress import Progress
from st4vla_jax.state import TrainState, leaves_by_path
from st4vla_jax.train_evaluation import Evaluation
from st4vla_jax.train_setup import Setup
from st4vla_jax.train_start import CompiledStep, compile_step, describe, first_state
from st4vla_jax.train_step import by_group

SHOWN = (
    "loss/total", "loss/action", "loss/text", "grad/norm", "time/step", "rate/samples",
    "eval/action_mse", "eval/action_mse_mean_baseline", "eval/energy", "eval/energy_mean_baseline",
    "eval/text_loss", "fit/action_mse", "fit/action_mse_mean_baseline", "fit/text_loss",
    "align/pss", "align/cosine",
)  # fmt: skip
TRACE_FOLDER = "profile"


class TrainingError(RuntimeError):
    """A run that must not go on; says what happened and where to look."""


class Run:
    """One process's run of the loop, from a checked set-up.

    Attributes:
      setup: see `train_setup.prepare`; stop: asked before every step.
      profile: first and last step to trace, or None.
    """

    def __init__(
        self, setup: Setup, stop: Preemption, profile: tuple[int, int] | None = None
    ) -> None:
        """Opens the workdir's logs; arrays come with `train`."""
        self.setup, self.stop, self.profile = setup, stop, profile
        first = setup.resume_step or 0
        config, index = setup.config, jax.process_index()
        setup.workdir.mkdir(parents=True, exist_ok=True)
        self.goodput = Goodput(setup.workdir, process_index=index, first_step=first)
        log = config.log
        wandb = WandbSettings(project=log.wandb, mode=log.wandb_mode, config=dict(config.tree))
        self.writer = MetricWriter(
            setup.workdir, process_index=index, first_step=first,
            wandb=wandb if log.wandb else None, tensorboard=log.tensorboard,
        )  # fmt: skip
        # Other processes say nothing: a pod's log would hold every line once a host.
        sink = None if index == 0 else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.progress = Progress(first, config.steps, stream=sink)
        self.say: Callable[[str], None] = self.progress.line
        self._tracing = False
        self._compiled: CompiledStep | None = None
        self._timer: StepTimer | None = None
        self._pending: tuple[int, Any] | None = None
        self._shares = trainable_shares(
            config.model,
            _sizes(setup.abstract.params),
            _sizes(setup.abstract.frozen),
        )

    def train(self) -> int:
        """Trains to the last step or to a stop request; returns the process's exit status.

        Raises:
          TrainingError: too many updates in a row were skipped.
          CheckpointError, ReadError: state or data cannot be written or read any more.
        """
        setup, config = self.setup, self.setup.config
        with contextlib.ExitStack() as stack:
            stack.callback(setup.checkpoints.close)
            stack.callback(self.writer.close)
            stack.callback(self.progress.close)
            stack.callback(self._stop_trace)
            stack.enter_context(jax.set_mesh(setup.mesh))
            stack.callback(self.stop.close)
            with self.goodput.losing("startup"):
                for line in describe(setup):
                    self.say(line)
                state = first_state(setup, self.say)
            step = setup.resume_step or 0
            if step >= config.steps:
                self.say(f"nothing to do: step {step} of {config.steps} is done")
                return 0
            batches = self._batches(step, stack)
            evaluation = Evaluation(setup, self.say)
            status = self._loop(state, step, batches, evaluation)
        self.say(f"workdir: {setup.workdir} (checkpoints/, metrics.jsonl, images/)")
        return status

    def _loop(self, state: TrainState, step: int, batches, evaluation) -> int:
        config = self.setup.config
        while step < config.steps:
            if self.stop.reached(step):
                self._finish_pending()
                self._save(state, wait=True)
                self.say(f"stopped by a signal, saved at step {step}; the same command goes on")
                return RESTART_EXIT_CODE
            with self.goodput.losing("data"):
                batch = next(batches)
            if self._compiled is None:
                self._compile(batch, step)
            with self._traced(step):
                state, metrics = self._compiled(state, self.setup.to_device(batch))
            self._count(batch)
            self._finish_pending()
            self._pending = step, metrics
            if self.profile and step == self.profile[1]:
                self._stop_trace()
            step += 1
            self.setup.checkpoints.check()
            self.progress.advance(step)
            self._after(state, step, metrics, evaluation)
        return 0

    def _after(self, state, step: int, metrics, evaluation: Evaluation) -> None:
        """What is due after ``step`` updates."""
        config = self.setup.config
        last = step == config.steps
        if last or step % config.log.every == 0:
            self._finish_pending()
            self._log(step, metrics)
        scores = None
        if evaluation.due(step):
            with self.goodput.losing("evaluate"):
                scores = evaluation(state, step)
            self.writer.write(step, scores)
            self.progress.report({name: scores[name] for name in SHOWN if name in scores})
        if last or step % config.save_every == 0:
            self._finish_pending()
            self._save(state, scores if evaluation.scores_due(step) else None, wait=last)

    def _batches(self, step: int, stack: contextlib.ExitStack) -> Iterator[Batch]:
        """This process's batches from a step on; one batch for ever with overfit_one_batch."""
        overfit = self.setup.flags.overfit_one_batch
        batches = self.setup.pipeline.batches(0 if overfit else step)
        stack.callback(batches.close)
        return itertools.repeat(next(batches)) if overfit else batches

    def _compile(self, batch: Batch, step: int) -> None:
        """Compiles the step and shows the batch that it is compiled for."""
        setup = self.setup
        if jax.process_index() == 0:
            path = self.writer.image(step, "first_batch", picture_of(setup, batch))
            self.say(f"first batch: {path}")
        self.say("compiling the train step ...")
        with self.goodput.losing("compile"):
            self._compiled = compile_step(setup, batch)
        compiled = self._compiled
        self.say(f"lowered in {compiled.lowering_s:.1f} s, compiled in {compiled.compile_s:.1f} s")
        self._timer = StepTimer(self.goodput)

    def _count(self, batch: Batch) -> None:
        """Counts this process's part of an update as one of as many equal ones."""
        schedule = self.setup.pipeline.schedule
        parts = schedule.sequences / len(self.setup.pipeline.rows)
        flops = model_flops(self.setup.config.model, batch, self.setup.config.loss.repeats,
                            self._shares)  # fmt: skip
        self._timer.step(
            samples=schedule.config.robot_samples + schedule.config.grounding_samples,
            tokens=parts * np.count_nonzero(batch.vlm.segment_ids),
            flops=parts * flops["total"],
        )

    def _finish_pending(self) -> None:
        """Looks at the update dispatched last; waits for it."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        skipped = int(metrics["train/skipped"])
        if not skipped:
            return
        path = self._dump(step, metrics)
        self.say(f"step {step}: a gradient is not finite, update skipped ({skipped} in a row); its "
                 f"samples: {path}")  # fmt: skip
        limit = self.setup.config.optim.max_skipped
        if skipped > limit:
            raise TrainingError(
                f"{skipped} updates in a row had gradients that are not finite (optim.max_skipped "
                f"is {limit}); the samples of the last one are in {path}, and --replay={step} runs "
                "it again"
            )

    def _dump(self, step: int, metrics) -> Path:
        """Writes what an update was made of to WORKDIR/skipped/STEP.json."""
        path = self.setup.workdir / "skipped" / f"{step}.json"
        if jax.process_index() == 0:
            path.parent.mkdir(exist_ok=True)
            content = {
                "step": step,
                "metrics": {k: str(v) for k, v in jax.device_get(metrics).items() if v.ndim == 0},
                "samples": sample_ids(self.setup, step),
            }
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return path

    def _log(self, step: int, metrics) -> None:
        setup = self.setup
        values = jax.device_get(metrics)
        groups = by_group(values, setup.groups)
        timing = self._timer.report()
        flops = timing.pop("rate/flops", None)
        share = None if flops is None else mfu(flops, jax.devices())
        scalars = {name: float(value) for name, value in values.items()} | groups | timing
        if share is not None:
            scalars["rate/mfu"] = share
        scalars["data/bad_records"] = float(len(setup.pipeline.bad_records))
        self.goodput.heartbeat(step)
        self.writer.write(step, scalars | memory_metrics() | self.goodput.metrics())
        self.progress.report({name: scalars[name] for name in SHOWN if name in scalars})

    def _save(self, state: TrainState, scores: dict[str, float] | None = None, wait=False) -> None:
        with self.goodput.losing("save"):
            self.setup.checkpoints.save(state, self.setup.record, scores)
            if wait:
                self.setup.checkpoints.wait()
        self.goodput.heartbeat(int(state.step))

    @contextlib.contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        """Traces the steps of ``profile`` into WORKDIR/profile; each step carries its number."""
        if self.profile and self.profile[0] <= step <= self.profile[1] and not self._tracing:
            jax.profiler.start_trace(str(self.setup.workdir / TRACE_FOLDER))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _stop_trace(self) -> None:
        """Ends a trace that has begun; the last step of a run may come first."""
        if self._tracing:
            self._tracing = False
            self._finish_pending()
            jax.profiler.stop_trace()
            self.say(f"trace: {self.setup.workdir / TRACE_FOLDER}")


def picture_of(setup: Setup, batch: Batch) -> Image.Image:
    """What the model gets, put together again from a packed batch of numpy."""
    encoder = setup.pipeline.data_sets[0].encoders[0]
    names = [spec.names for spec in encoder.embodiments.values()]
    return batch_picture(batch, encoder.tokenizer, groups=setup.groups, action_names=names)


def sample_ids(setup: Setup, step: int) -> list[list[dict[str, Any]]]:
    """Which samples each sequence of a step holds, for people and for `--replay`."""
    step = 0 if setup.flags.overfit_one_batch else step
    return [
        [
            {"set": setup.pipeline.data_sets[draw.member].source.name, **dataclasses.asdict(draw)}
            for draw in row
        ]
        for row in setup.pipeline.schedule.plan(step)
    ]


def _sizes(tree: Any) -> dict[str, int]:
    return {path: int(np.prod(leaf.shape)) for path, leaf in leaves_by_path(tree)}
