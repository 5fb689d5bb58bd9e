"""Held-out evaluation and gradient diagnostics while a run trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from st4vla_jax.batch import Batch
from st4vla_jax.distributed import global_batch
from st4vla_jax.eval.actions import HeldOut, mean_chunk
from st4vla_jax.eval.pss import Probe, alignment
from st4vla_jax.state import TrainState, merge
from st4vla_jax.train_setup import Setup, open_held_out

MEAN_BATCHES = 8  # training batches that the per-horizon mean is taken over


class Evaluation:
    """What is measured on fixed batches, beside the training step; compiles at its first use."""

    def __init__(self, setup: Setup, say: Callable[[str], None]) -> None:
        """Opens what the config asks for; batches are read at the first use."""
        self._setup, self._say = setup, say
        self._held_out: HeldOut | None = None
        self._probe: Probe | None = None

    def due(self, step: int) -> bool:
        """Whether anything is measured after ``step`` updates."""
        return self._scores_due(step) or self._diagnostics_due(step)

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Metrics of a state: eval/*, eval_ema/* where an average is kept, align/*."""
        metrics = {}
        if self._scores_due(step):
            if self._held_out is None:
                self._held_out = self._open()
            metrics |= self._held_out(state.all_params, self._to_device)
            if state.ema is not None:
                averaged = self._held_out(merge(state.ema, state.frozen), self._to_device)
                metrics |= {k.replace("eval/", "eval_ema/", 1): v for k, v in averaged.items()}
        if self._diagnostics_due(step):
            if self._probe is None:
                batch = first_batches(self._setup, 1)
                config = self._setup.config
                self._probe = Probe(self._setup.model, batch, config.seed, config.loss.repeats)
            metrics |= alignment(self._probe(state.all_params, self._to_device))
        return metrics

    def _scores_due(self, step: int) -> bool:
        config = self._setup.config
        every = config.evaluation.every
        overfit = self._setup.flags.overfit_one_batch and step == config.steps
        return overfit or bool(every) and (step % every == 0 or step == config.steps)

    def _diagnostics_due(self, step: int) -> bool:
        every = self._setup.config.evaluation.diagnostics
        return bool(every) and step % every == 0

    def _open(self) -> HeldOut:
        """Held-out batches; with overfit_one_batch the one that is trained on."""
        setup, config = self._setup, self._setup.config.evaluation
        if setup.flags.overfit_one_batch:
            batches = first_batches(setup, 1)
        else:
            pipeline = open_held_out(setup)
            stream = pipeline.batches(0)
            batches = list(itertools.islice(stream, config.batches))
            stream.close()
            names = ", ".join(d.source.name for d in pipeline.data_sets)
            self._say(f"held out: {len(batches)} batches of {names}")
        mean, names = None, ()
        if batches[0].action is not None:
            mean = mean_chunk(first_batches(setup, MEAN_BATCHES, whole=True))
            names = action_names(setup)
        return HeldOut(
            setup.model, batches, mean, names, setup.config.seed, config.samples, setup.groups
        )

    def _to_device(self, batch: Batch) -> Batch:
        return global_batch(batch, self._setup.mesh, self._setup.config.runtime.rules)


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
