"""Batches by step, on every host: a pure function of (config, data, seed, step).

There is no state but the step: `Pipeline.batches(step)` continues any run, on any number of hosts
and threads.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from st4vla_jax.batch import ActionInputs, Batch, VlmInputs
from st4vla_jax.data.encoder import SampleEncoder
from st4vla_jax.data.packing import RobotArrays, pack
from st4vla_jax.data.reading import BadRecords, Readers, ReadPolicy, Task, read
from st4vla_jax.data.schedule import Draw, Member, Schedule, ScheduleConfig, ScheduleError
from st4vla_jax.data.source import BadRecordError, Source
from st4vla_jax.data.transforms import Encoded

_STEPS = 2**40  # Grain wants a length; no run is longer

# Settings that move samples between sequences, never between steps: another number of devices may
# need another one.
_NOT_IN_FINGERPRINT = ("sequences", "multiple")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set of a mixture: its samples, one encoder a paraphrase, its weight."""

    source: Source
    encoders: tuple[SampleEncoder, ...]
    weight: float = 1.0


class Pipeline:
    """The data of one host.

    Attributes:
      data_sets: the mixture.
      schedule: which samples sit where.
      fingerprint: sha256 of what decides the samples of every step; a checkpoint keeps it.
      rows: sequences of this host, a contiguous block of the global batch.
    """

    def __init__(
        self,
        data_sets: Sequence[DataSet],
        config: ScheduleConfig,
        *,
        policy: ReadPolicy = ReadPolicy(),  # noqa: B008 (frozen)
        host: int = 0,
        num_hosts: int = 1,
        threads: int = 8,
    ) -> None:
        """Reads the length tables and proves that every window fits.

        Args:
          data_sets: the mixture.
          config: what an update holds.
          policy: when to give up reading.
          host: number of this process among those that share the global batch.
          num_hosts: of these.
          threads: readers; 0 reads when a batch is asked for.

        Raises:
          ScheduleError, LayoutError: see `Schedule`; or hosts do not divide the sequences.
        """
        self.data_sets, self._policy, self._threads = tuple(data_sets), policy, threads
        self.schedule = Schedule(
            config,
            [
                Member(d.source.name, tuple(d.source.lengths(e) for e in d.encoders), d.weight)
                for d in self.data_sets
            ],
        )
        self.fingerprint = _fingerprint(self.data_sets, config)
        if self.schedule.sequences % num_hosts:
            raise ScheduleError(
                f"{self.schedule.sequences} sequences do not divide among {num_hosts} hosts; make "
                f"multiple ({config.multiple}) a multiple of {num_hosts}"
            )
        count = self.schedule.sequences // num_hosts
        self.rows = range(host * count, (host + 1) * count)
        self._bad = BadRecords(policy.max_bad_records)

    @property
    def bad_records(self) -> list[str]:
        """A message for each record that became padding so far."""
        return self._bad.names()

    def whole(self) -> Pipeline:
        """The same pipeline with all sequences of the global batch, on this host."""
        other = copy.copy(self)
        other.rows = range(self.schedule.sequences)
        return other

    def batches(self, step: int = 0) -> Batches:
        """This host's part of the batches of step, step + 1, ...; numpy, without end."""
        return Batches(self, step, self._threads, self._policy)

    def row(self, step: int, row: int, task: Task) -> Batch:
        """One packed sequence, [1,...]."""
        samples = []
        for draw in self.schedule.plan(step)[row]:
            sample = self._sample(draw, task)
            if sample is not None:
                samples.append(sample)
        encoder = self.data_sets[0].encoders[0]
        return pack(
            [samples],
            self.schedule.capacity,
            pad_id=encoder.tokenizer.pad,
            like=encoder.empty_robot(),
        )

    def _sample(self, draw: Draw, task: Task) -> tuple[Encoded, RobotArrays | None] | None:
        """Reads and encodes one sample; None for a bad record."""
        data_set = self.data_sets[draw.member]
        task.starts(f"{data_set.source.name}[{draw.index}]")
        rng = np.random.default_rng(
            [self.schedule.config.seed, draw.member, draw.epoch, draw.index]
        )
        try:
            sample = read(data_set.source, draw.index, self._policy)
            encoded, robot = data_set.encoders[draw.paraphrase](sample, rng)
        except BadRecordError as error:
            self._bad.add(data_set.source.name, draw.index, error)
            return None
        self._check_lengths(draw, encoded, sample.record)
        return encoded, robot

    def _check_lengths(self, draw: Draw, encoded: Encoded, record: str) -> None:
        """The index promised at least this much room; else it is not of this data."""
        member = self.schedule.members[draw.member]
        table = member.lengths[draw.paraphrase]
        found = len(encoded.tokens), len(encoded.slots.patches), len(encoded.targets)
        names = ("tokens", "slots", "targets")
        planned = tuple(int(getattr(table, name)[draw.index]) for name in names)
        if any(f > p for f, p in zip(found, planned, strict=True)):
            raise ScheduleError(
                f"{member.name}[{draw.index}] ({record}) takes {found} of {names}, its index says "
                f"{planned}; delete the index of this data set, then run the same command again"
            )


class Batches(Iterator[Batch]):
    """Iterator over a host's batches; after an error it only repeats the error.

    Attributes:
      step: of the next batch; all the state there is.
    """

    def __init__(self, pipeline: Pipeline, step: int, threads: int, policy: ReadPolicy) -> None:
        count = len(pipeline.rows)
        # Rows, not whole batches, are Grain's elements: all threads work on the first batch.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * count)
        self._readers = Readers(max(threads, 1), policy)
        rows = grain.MapDataset.source(_Rows(pipeline, self._readers, step))
        data = rows.to_iter_dataset(options).batch(count, batch_fn=concatenate)
        self._iterator = iter(data)
        self._error: BaseException | None = None
        self.step = step

    def __next__(self) -> Batch:
        # Grain would go on behind a failed element: a batch would be lost in silence.
        if self._error is not None:
            raise self._error
        try:
            batch = next(self._iterator)
        except BaseException as error:
            self._error = error
            self.close()
            raise
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends the reader threads."""
        self._iterator.close()
        self._readers.close()


class _Rows:
    """Random access to a host's packed sequences, counted from a step on."""

    def __init__(self, pipeline: Pipeline, readers: Readers, step: int) -> None:
        self._pipeline, self._readers, self._step = pipeline, readers, step

    def __len__(self) -> int:
        return _STEPS * len(self._pipeline.rows)

    def __getitem__(self, index: int) -> Batch:
        rows = self._pipeline.rows
        step, row = self._step + index // len(rows), rows[index % len(rows)]
        return self._readers.run(lambda task: self._pipeline.row(step, row, task))


def concatenate(parts: Sequence[Batch]) -> Batch:
    """Joins batches along B."""

    def joined(cls: type, group: Sequence[VlmInputs | ActionInputs]):
        fields = {}
        for field in dataclasses.fields(cls):
            leaves = [getattr(part, field.name) for part in group]
            fields[field.name] = None if leaves[0] is None else np.concatenate(leaves)
        return cls(**fields)

    vlm = joined(VlmInputs, [part.vlm for part in parts])
    if parts[0].action is None:
        return Batch(vlm)
    return Batch(vlm, joined(ActionInputs, [part.action for part in parts]))


def _fingerprint(data_sets: Sequence[DataSet], config: ScheduleConfig) -> str:
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in _NOT_IN_FINGERPRINT
    }
    sets = [
        [
            d.source.name,
            d.weight,
            d.source.fingerprint(),
            [e.full_fingerprint() for e in d.encoders],
        ]
        for d in data_sets
    ]
    text = json.dumps([settings, sets], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
