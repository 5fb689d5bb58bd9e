"""The batch that a config asks for: of its own data where they are, else of typical lengths.

Typical lengths are those of bench_mixture.py, measured on the paper's mixture with Qwen's
tokenizer, with images of the config's sizes; the schedule that lays them out is training's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from st4vla_jax.batch import Batch
from st4vla_jax.bench_mixture import GROUNDING, LEAD, ROBOT
from st4vla_jax.data.image import arrange, smart_resize
from st4vla_jax.data.members import Member
from st4vla_jax.data.packing import Capacity, RobotArrays, pack
from st4vla_jax.data.schedule import Schedule, ScheduleConfig
from st4vla_jax.data.settings import DataSettings, open_pipeline
from st4vla_jax.data.source import Lengths
from st4vla_jax.data.transforms import Encoded, of_tokens
from st4vla_jax.train_config import TrainConfig

_PADDING = 5  # ids from the vocabulary's end: special tokens, which no sample has
_UNSCALED = 8  # pixels of a camera image for each of bench_mixture's, before its resize
_Typical = tuple[Encoded, RobotArrays | None]


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One update's batch.

    Attributes:
      schedule: how training lays it out.
      batch: numpy, the first update.
      source: where its lengths are from, for people.
    """

    schedule: Schedule
    batch: Batch
    source: str


def planned_batch(config: TrainConfig, multiple: int) -> PlannedBatch:
    """The first batch in a ``multiple`` of sequences (devices along the batch x microbatches).

    Raises:
      ScheduleError, LayoutError, SettingsError, SourceError: the data do not give such a batch.
    """
    settings = config.data
    schedule = dataclasses.replace(settings.schedule, multiple=multiple)
    settings = dataclasses.replace(settings, schedule=schedule)
    if all(path.exists() for path in _paths(settings)):
        pipeline = open_pipeline(settings)
        batches = pipeline.batches(0)
        batch = next(batches)
        batches.close()
        return PlannedBatch(pipeline.schedule, batch, "the config's data sets")
    return _typical_batch(config, settings)


def _paths(settings: DataSettings) -> Iterator[Path]:
    for entry in settings.sets:
        paths = entry.path if isinstance(entry.path, tuple) else (entry.path,)
        yield from map(Path, paths)


def padded_batches(config: TrainConfig, multiple: int) -> tuple[Batch, ...]:
    """Shapes of an update's batches with one sample in a row: robot samples, grounding samples.

    Rows are padded to the longest of their batch, and to a ``multiple``.  Each row has a place for
    a target, since the usual step scores robot samples too.
    """
    schedule, batches = config.data.schedule, []
    samples = [sample for _, kind in _kinds(config, schedule) for sample in kind]
    counts = {True: schedule.robot_samples, False: schedule.grounding_samples}
    for is_robot, count in counts.items():
        rows = [[sample] for sample in samples if (sample[1] is not None) == is_robot]
        if not rows:
            continue
        capacity = Capacity.fit(rows)
        capacity = dataclasses.replace(capacity, targets=max(1, capacity.targets))
        number = -(-count // multiple) * multiple
        batches.append(
            jax.tree.map(
                lambda x, n=number: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype),
                pack(rows, capacity, pad_id=_pad_id(config)),
            )
        )
    return tuple(batches)


def _pad_id(config: TrainConfig) -> int:
    return config.model.text.vocab_size - _PADDING


def _kinds(config: TrainConfig, schedule: ScheduleConfig) -> list[tuple[float, list[_Typical]]]:
    """(share, samples) of each kind; the first are robot samples, if there are any."""
    kinds: list[tuple[float, list[_Typical]]] = []
    if schedule.robot_samples:
        kinds.append((1.0, list(_robot_samples(config))))
    if schedule.grounding_samples:
        for share, records in GROUNDING.values():
            kinds.append((share, [_grounding_sample(config, *record) for record in records]))
    return kinds


def _typical_batch(config: TrainConfig, settings: DataSettings) -> PlannedBatch:
    schedule = settings.schedule
    kinds = _kinds(config, schedule)
    members = [
        Member(f"typical {number}", (_lengths(samples),), weight)
        for number, (weight, samples) in enumerate(kinds)
    ]
    planned = Schedule(schedule, members)
    rows = [[kinds[d.member][1][d.index] for d in row] for row in planned.plan(0)]
    return PlannedBatch(
        planned, pack(rows, planned.capacity, pad_id=_pad_id(config)), "typical lengths"
    )


def _lengths(samples: list[_Typical]) -> Lengths:
    columns = zip(
        *(
            (len(s.tokens), len(s.slots.patches), len(s.targets), int(robot is not None))
            for s, robot in samples
        ),
        strict=True,
    )
    return Lengths(*(np.array(column, np.int32) for column in columns))


def _robot_samples(config: TrainConfig) -> Iterator[_Typical]:
    """As many of each length as were measured, one view of the config's for each of its views."""
    model, views = config.model, config.data.schedule.views
    image = config.data.image
    size = smart_resize(*(image.size or (480, 640)), image)
    side, shape = model.dino.image_size, (model.dit.chunk, model.dit.action_dim)
    state = model.bridge.state_dim
    robot = RobotArrays(
        dino_images=np.zeros((views, side, side, 3), np.uint8),
        view_mask=np.ones(views, bool),
        state=np.zeros(state, np.float32) if state else None,
        actions=np.zeros(shape, np.float32),
        action_mask=np.ones(shape, bool),
    )
    for text, count in ROBOT.items():
        sample = _encoded([size] * views, text + 2 * (views - 1), 0)  # each view in its two marks
        yield from [(sample, robot)] * count


def _grounding_sample(
    config: TrainConfig, height: int, width: int, text: int, targets: int
) -> _Typical:
    size = smart_resize(height * _UNSCALED, width * _UNSCALED, config.data.image)
    return _encoded([size], text, targets), None


def _encoded(sizes: list[tuple[int, int]], text: int, targets: int) -> Encoded:
    """Images of these (height, width) after LEAD tokens; the last ``targets`` are supervised."""
    slots = arrange([np.zeros((*size, 3), np.uint8) for size in sizes])
    length = text + sum(map(len, slots.cells))
    is_image, first = np.zeros(length, bool), LEAD
    for own in slots.cells:
        is_image[first : first + len(own)] = True
        first += len(own) + 2
    tokens, answer = np.zeros(length, np.int32), np.arange(length - targets, length)
    return of_tokens(tokens, is_image, slots, answer)
