"""What a plan is about: a config on a mesh, in shapes, checked as far as that goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from st4vla_jax.batch import Batch
from st4vla_jax.config import ConfigError
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.optim import Optimizer
from st4vla_jax.plan_batch import PlannedBatch, planned_batch
from st4vla_jax.sharding import MESH_AXES, batch_shards, make_mesh, narrow_slices
from st4vla_jax.state import TrainState
from st4vla_jax.train_config import MeshSettings, TrainConfig
from st4vla_jax.train_setup import abstract_state, attempt, described


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a mesh.

    Attributes:
      mesh: of devices, or abstract.
      state: ShapeDtypeStructs with shardings, of the whole mesh.
      planned: the batch of one update.
      narrow: "embed 1280 / 16 = 80", logical axes whose slices are under
        sharding.LANES lanes.
    """

    config: TrainConfig
    mesh: Mesh | AbstractMesh
    model: ST4VLA
    optimizer: Optimizer
    state: TrainState
    planned: PlannedBatch
    narrow: tuple[str, ...]

    @property
    def batch_shards(self) -> int:
        return batch_shards(self.mesh, self.config.runtime.rules)

    @property
    def samples(self) -> int:
        """Of one update."""
        schedule = self.config.data.schedule
        return schedule.robot_samples + schedule.grounding_samples

    @property
    def batch(self) -> Batch:
        """ShapeDtypeStructs of an update's batch, with shardings."""
        sharding = NamedSharding(self.mesh, self.config.runtime.rules.spec(("batch",)))
        rows = self.planned.schedule.sequences
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding),
            self.planned.batch,
        )


def make_plan(config: TrainConfig, devices: Sequence[jax.Device] | int) -> Plan:
    """Lays a config out on devices, or on so many of them.

    Raises:
      ConfigError: every problem of mesh, parameters and data.
    """
    problems: list[str] = []
    count = devices if isinstance(devices, int) else len(devices)
    sizes = attempt(problems, lambda: config.mesh.sizes(count))
    model, optimizer, _, boxed = described(config, problems)
    if sizes and not problems:
        if isinstance(devices, int):
            mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * 3)
        else:
            mesh = make_mesh(**sizes, devices=devices)
        rules = config.runtime.rules
        state = attempt(problems, lambda: abstract_state(boxed, optimizer, mesh, config))
        narrow, refused = narrow_slices(boxed, mesh, rules)
        problems += refused
        multiple = batch_shards(mesh, rules) * config.accumulation
        planned = attempt(problems, lambda: planned_batch(config, multiple))
    if problems:
        raise ConfigError("this config cannot be laid out:\n  " + "\n  ".join(problems))
    return Plan(config, mesh, model, optimizer, state, planned, narrow)


def mesh_config(config: TrainConfig, mesh: str | None) -> TrainConfig:
    """The config on the mesh of a command line's --mesh, if one is given.

    Raises:
      ConfigError: see `parse_mesh`.
    """
    return dataclasses.replace(config, mesh=parse_mesh(mesh, config.mesh.rules)) if mesh else config


def parse_mesh(text: str, rules: Any) -> MeshSettings:
    """Reads ``data,fsdp,tensor``; one may be -1.

    Raises:
      ConfigError: not three such sizes.
    """
    try:
        data, fsdp, tensor = (int(size) for size in text.split(","))
    except ValueError:
        raise ConfigError(f"--mesh={text}: give DATA,FSDP,TENSOR, three sizes as 4,16,1") from None
    return MeshSettings(data, fsdp, tensor, rules)
