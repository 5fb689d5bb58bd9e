"""Held-out evaluation and gradient diagnostics while a run trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax

from st4vla_jax.batch import Batch
from st4vla_jax.eval.actions import HeldOut, mean_chunk
from st4vla_jax.eval.pss import Probe, alignment
from st4vla_jax.state import TrainState, merge
from st4vla_jax.train_setup import Setup, open_held_out_part
from st4vla_jax.train_step import make_loss_norms

MEAN_BATCHES = 8  # training batches that the per-horizon mean is taken over


class Evaluation:
    """What is measured on fixed batches, beside the training step; compiles at its first use."""

    def __init__(self, setup: Setup, say: Callable[[str], None]) -> None:
        """Reads the batches, so that what does not fit is told before the first step.

        Raises:
          HeldOutError, ProbeError: batches or a model that cannot be scored.
          ScheduleError, SettingsError: the held-out part of the data cannot be read.
        """
        self._setup, self._say = setup, say
        config = setup.config.evaluation
        scored = config.every or setup.flags.overfit_one_batch
        # By the area that their metrics get.
        self._scores: dict[str, HeldOut] = self._open() if scored else {}
        self._diagnostics = Diagnostics(setup) if config.diagnostics else None

    def due(self, step: int) -> bool:
        """Whether anything is measured after ``step`` updates."""
        return self.scores_due(step) or self._diagnostics_due(step)

    def scores_due(self, step: int) -> bool:
        """Whether held-out scores are taken, of which the best checkpoint may be kept."""
        config = self._setup.config
        every = config.evaluation.every
        overfit = self._setup.flags.overfit_one_batch and step == config.steps
        return overfit or bool(every) and (step % every == 0 or step == config.steps)

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Metrics of a state: eval/*, fit/* (training batches), eval_ema/*, and `Diagnostics`'."""
        metrics = {}
        if self.scores_due(step):
            for area, scores in self._scores.items():
                found = scores(state.all_params, self._setup.to_device)
                metrics |= {name.replace("eval", area, 1): v for name, v in found.items()}
            if state.ema is not None and "eval" in self._scores:
                averaged = merge(state.ema, state.frozen)
                found = self._scores["eval"](averaged, self._setup.to_device)
                metrics |= {name.replace("eval", "eval_ema", 1): v for name, v in found.items()}
        if self._diagnostics_due(step):
            metrics |= self._diagnostics(state)
        return metrics

    def _diagnostics_due(self, step: int) -> bool:
        every = self._setup.config.evaluation.diagnostics
        return bool(every) and step % every == 0

    def _open(self) -> dict[str, HeldOut]:
        """Scores on held-out and on training batches; overfit_one_batch has the latter alone."""
        setup, config = self._setup, self._setup.config.evaluation
        batches = {}
        if not setup.flags.overfit_one_batch:
            pipeline = open_held_out_part(setup)
            stream = pipeline.batches(0)
            batches["eval"] = list(itertools.islice(stream, config.batches))
            stream.close()
            names = ", ".join(d.source.name for d in pipeline.data_sets)
            self._say(f"held out: {len(batches['eval'])} batches of {names}")
        count = 1 if setup.flags.overfit_one_batch else config.train_batches
        if count:
            batches["fit"] = first_batches(setup, count)
        mean, names = None, ()
        if setup.config.model.has_action:
            mean = mean_chunk(first_batches(setup, MEAN_BATCHES, whole=True))
            names = action_names(setup)
        return {
            area: HeldOut(
                setup.model, own, mean, names, setup.config.seed, config.samples, setup.groups
            )
            for area, own in batches.items()
        }


class Diagnostics:
    """How the two losses pull at the VLM, on the first training batch with fixed draws.

    align/* of the last layer's query projection (eval/pss.py), and grad/vlm_* of the whole VLM,
    which cost about three updates together.
    """

    def __init__(self, setup: Setup) -> None:
        """Reads the batch."""
        config = setup.config
        self._setup, batches = setup, first_batches(setup, 1)
        self._probe = Probe(setup.model, batches, config.seed, config.loss.repeats)
        self._batch, self._key = batches[0], jax.random.key(config.seed)
        self._norms = jax.jit(make_loss_norms(setup.model, setup.step_config))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Metrics of a state."""
        params, to_device = state.all_params, self._setup.to_device
        norms = jax.device_get(self._norms(params, to_device(self._batch), self._key))
        named = {name: float(value) for name, value in norms.items()}
        return alignment(self._probe(params, to_device)) | named


def first_batches(setup: Setup, count: int, whole: bool = False) -> list[Batch]:
    """The first training batches: this process's part, or ``whole`` on every process."""
    pipeline = setup.pipeline.whole() if whole else setup.pipeline
    stream = pipeline.batches(0)
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def action_names(setup: Setup) -> tuple[str, ...]:
    """Names of the model's action dimensions, by the first embodiment; the rest are numbered."""
    specs = setup.pipeline.data_sets[0].encoders[0].embodiments
    names = tuple(next(iter(specs.values())).names) if len(specs) == 1 else ()
    size = setup.config.model.dit.action_dim
    return (*names, *(f"action_{i}" for i in range(len(names), size)))
