"""The config of a training run: from a config file's tree to checked, frozen dataclasses.

configs/common.py has every key with its default; a key that it lacks is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from st4vla_jax.config import ConfigError, ModelConfig, model_config
from st4vla_jax.data.settings import DataSettings, SettingsError
from st4vla_jax.models.layers import REMAT_POLICIES
from st4vla_jax.models.lora import LoraTarget
from st4vla_jax.models.st4vla import LossWeights
from st4vla_jax.optim import Group, OptimConfig
from st4vla_jax.runtime import DTypes, Runtime
from st4vla_jax.sections import checked_section
from st4vla_jax.sharding import Rules, ShardingError
from st4vla_jax.train_checkpoints import CheckpointSettings

PARTS = ("vlm", "dino", "bridge", "dit")
_DTYPES = ("float32", "bfloat16")  # float16 would need loss scaling


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Presets and overrides, see `config.model_config`; no dino and dit = the VLM alone."""

    vlm: str = "3b"
    dino: str = "s"
    dit: str = "b"
    bridge: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    action: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> ModelConfig:
        return model_config(
            self.vlm, self.dino or None, self.dit or None,
            bridge=dict(self.bridge), action=dict(self.action),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RuntimeSettings:
    """Names of dtypes (see `DTypes`) and what else `Runtime` takes.

    Parameters are float32 (DESIGN.md D8): an update of 1e-5 would round away in bfloat16.
    """

    compute: str = "bfloat16"
    action: str = "float32"
    remat: str = "full"
    query_chunk: int = 1024
    vocab_tile: int = 16_384
    attention: str = "auto"

    def __post_init__(self) -> None:
        problems = [
            f"{name} {getattr(self, name)!r} must be one of {', '.join(_DTYPES)}"
            for name in ("compute", "action")
            if getattr(self, name) not in _DTYPES
        ]
        if self.remat not in REMAT_POLICIES:
            problems.append(f"remat {self.remat!r} must be one of {', '.join(REMAT_POLICIES)}")
        if problems:
            raise ConfigError("; ".join(problems))

    def build(self, rules: Rules) -> Runtime:
        names = {name: jnp.dtype(getattr(self, name)) for name in ("compute", "action")}
        return Runtime(
            DTypes(**names), rules, self.remat, self.query_chunk, self.vocab_tile, self.attention
        )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices on each mesh axis; one of them may be -1, the rest of the devices.

    Attributes:
      rules: logical axis name -> mesh axes, in place of sharding.DEFAULT_RULES' entries.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(s != -1 and s < 1 for s in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"sizes {sizes} must be positive, at most one of them -1")

    def sizes(self, devices: int) -> dict[str, int]:
        """Size of each axis on so many devices.

        Raises:
          ConfigError: they do not divide.
        """
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        known = math.prod(s for s in sizes.values() if s > 0)
        rest = devices // known
        sizes = {name: rest if s == -1 else s for name, s in sizes.items()}
        if math.prod(sizes.values()) != devices:
            shape = " x ".join(f"{name}={getattr(self, name)}" for name in sizes)
            raise ConfigError(f"mesh: {shape} does not tile {devices} devices")
        return sizes


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """Where parameters come from; "" = fresh.

    Attributes:
      checkpoint: a workdir (its latest step), a step's folder or a converted checkpoint; gives
        every part that it has.
      vlm, dino, bridge, dit: the same, for one part; "fresh" = fresh in spite of ``checkpoint``.
    """

    checkpoint: str = ""
    vlm: str = ""
    dino: str = ""
    bridge: str = ""
    dit: str = ""

    def source(self, part: str) -> str:
        """Folder for a part, "" if it is fresh or left to what ``checkpoint`` has."""
        own = getattr(self, part)
        return "" if own == "fresh" else own or self.checkpoint


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Held-out evaluation of actions and answers (eval/actions.py).

    Attributes:
      every: updates between evaluations; 0 = none.
      batches: held-out batches, at most; samples: chunks sampled for each robot sample.
      train_batches: training batches that get the same scores, as fit/*; 0 = none.
      diagnostics: updates between `diagnostics` of the two losses' gradients in the VLM; 0 = none.
    """

    every: int = 0
    batches: int = 4
    train_batches: int = 0
    samples: int = 32
    diagnostics: int = 0

    def __post_init__(self) -> None:
        counts = (self.every, self.diagnostics, self.train_batches)
        if min(counts) < 0 or self.batches < 1 or self.samples < 2:
            raise ConfigError(
                "every, diagnostics and train_batches must be at least 0, batches 1, samples 2"
            )


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """What is written down.

    Attributes:
      every: updates between lines of metrics.
      tensorboard: write event files.
      wandb: project; "" = not used.
      wandb_mode: "online" or "offline".
      cache_dir: persistent compilation cache; "" = WORKDIR/compile_cache, "none" = none.
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str = ""
    wandb_mode: str = "online"
    cache_dir: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"every {self.every} must be at least 1")
        if self.wandb_mode not in ("online", "offline"):
            raise ConfigError(f"wandb_mode {self.wandb_mode!r} must be online or offline")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Factors of the losses, and R noise draws for each robot sample."""

    action: float = 1.0
    text: float = 0.1
    repeats: int = 4

    def __post_init__(self) -> None:
        if min(self.action, self.text) < 0 or self.action + self.text == 0 or self.repeats < 1:
            raise ConfigError("factors must not be negative or both 0; repeats at least 1")

    @property
    def weights(self) -> LossWeights:
        return LossWeights(self.action, self.text)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      steps: updates; seed: of fresh parameters, noise and dropout (data.schedule.seed: of order).
      accumulation: microbatches of an update.
      save_every: updates between checkpoints; the last update is saved too.
      lora: low-rank adapters by name.
      tree: the config as plain dicts, as written into checkpoints.
    """

    steps: int
    seed: int
    accumulation: int
    save_every: int
    model: ModelConfig
    runtime: Runtime
    mesh: MeshSettings
    init: InitSettings
    loss: LossSettings
    optim: OptimConfig
    lora: Mapping[str, LoraTarget]
    data: DataSettings
    checkpoint: CheckpointSettings
    evaluation: EvaluationSettings
    log: LogSettings
    tree: Mapping[str, Any]

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> TrainConfig:
        """Reads a config tree.

        Raises:
          ConfigError: every problem found, by key.
        """
        tree = plain(tree)
        problems: list[str] = []
        sections = {key: tree.get(key, {}) for key in _SECTIONS}
        built = {
            key: checked_section(kind, sections[key] or {}, key, problems)
            for key, kind in _SECTIONS.items()
        }
        values = {key: built[key] for key in built if key not in ("model", "runtime")}
        values["model"] = _attempt(lambda: built["model"] and built["model"].build(), problems)
        values["runtime"] = _attempt(lambda: _runtime(built), problems)
        values["optim"] = _optim(tree.get("optim", {}), problems)
        values["lora"] = _named(LoraTarget, tree.get("lora", {}), "lora", problems)
        values["data"] = _data(tree.get("data", {}), values["model"], problems)
        scalars = {k: v for k, v in tree.items() if k not in (*_SECTIONS, "optim", "lora", "data")}
        values |= scalars | {"tree": tree}
        config = checked_section(cls, values, "", problems)
        if config is not None and not problems:
            problems += config.problems()
        if problems:
            raise ConfigError("config:\n  " + "\n  ".join(problems))
        return config

    def problems(self) -> list[str]:
        """What does not go together."""
        schedule, robots = self.data.schedule, any(s.is_robot for s in self.data.sets)
        holdout = any(s.holdout for s in self.data.sets)
        checks = {
            f"steps {self.steps}, accumulation {self.accumulation} and save_every "
            f"{self.save_every} must be at least 1": (
                min(self.steps, self.accumulation, self.save_every) < 1
            ),
            "data.schedule.robot_samples: the model has no dino and dit; set both, or 0 samples": (
                schedule.robot_samples and not self.model.has_action
            ),
            "data.schedule.robot_samples is 0, but the model has dino and dit: set model.dino and "
            'model.dit to "" to train the VLM alone': (
                not schedule.robot_samples and self.model.has_action
            ),
            "evaluation.every is set, but no data set has a holdout": (
                self.evaluation.every and not holdout
            ),
            "checkpoint.best_metric is set, but evaluation.every is 0": (
                bool(self.checkpoint.best_metric) and not self.evaluation.every
            ),
            "evaluation.diagnostics takes the whole batch at once: it needs accumulation 1": (
                self.evaluation.diagnostics and self.accumulation > 1
            ),
            f"checkpoint.best_metric: no checkpoint would have scores, as save_every "
            f"{self.save_every} and evaluation.every {self.evaluation.every} do not divide": (
                bool(self.checkpoint.best_metric and self.evaluation.every)
                and self.save_every % self.evaluation.every
                and self.evaluation.every % self.save_every
            ),
            "evaluation.diagnostics compares both losses: it needs robot and grounding samples": (
                self.evaluation.diagnostics
                and not (schedule.robot_samples and schedule.grounding_samples)
            ),
        }
        found = [text for text, bad in checks.items() if bad]
        found += [
            f"data.schedule.views is {schedule.views}, but data.sets.{entry.name}.views has "
            f"{len(entry.views)}"
            for entry in self.data.sets
            if entry.is_robot and len(entry.views) > schedule.views
        ]
        if self.data.state_dim and not robots:
            found.append("model.bridge.state_dim is set, but no data set has robot samples")
        return found

    def without_effect(self) -> list[str]:
        """Keys that this run does not use, though they are not at their defaults."""
        schedule = self.data.schedule
        unused = {
            "loss.action": (not schedule.robot_samples, self.loss.action, 1.0),
            "loss.repeats": (not schedule.robot_samples, self.loss.repeats, 4),
            "loss.text": (not schedule.grounding_samples, self.loss.text, 0.1),
            "evaluation.samples": (not self.evaluation.every, self.evaluation.samples, 32),
            "evaluation.batches": (not self.evaluation.every, self.evaluation.batches, 4),
            "evaluation.train_batches": (
                not self.evaluation.every, self.evaluation.train_batches, 0,
            ),
            "checkpoint.best_mode": (
                not self.checkpoint.best_metric, self.checkpoint.best_mode, "min",
            ),
            "log.wandb_mode": (not self.log.wandb, self.log.wandb_mode, "online"),
            "init.checkpoint": (
                all(getattr(self.init, p) for p in PARTS), self.init.checkpoint, "",
            ),
        }  # fmt: skip
        return [key for key, (idle, value, default) in unused.items() if idle and value != default]


_SECTIONS = {
    "model": ModelSettings, "runtime": RuntimeSettings, "mesh": MeshSettings,
    "init": InitSettings, "loss": LossSettings, "checkpoint": CheckpointSettings,
    "evaluation": EvaluationSettings, "log": LogSettings,
}  # fmt: skip


def plain(value: Any) -> Any:
    """Dicts and lists as JSON has them, of a ConfigDict's."""
    if hasattr(value, "items"):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _attempt(build, problems: list[str]) -> Any:
    """``build()``, or None and its problem."""
    try:
        return build()
    except (ConfigError, ShardingError, ValueError, TypeError) as error:
        problems.append(str(error))
        return None


def _runtime(built: Mapping[str, Any]) -> Runtime | None:
    if built["runtime"] is None or built["mesh"] is None:
        return None
    return built["runtime"].build(Rules().replace(**built["mesh"].rules))


def _optim(tree: Mapping[str, Any], problems: list[str]) -> OptimConfig | None:
    groups = _named(Group, tree.get("groups", {}), "optim.groups", problems)
    config = checked_section(OptimConfig, {**tree, "groups": groups}, "optim", problems)
    if config is not None and None not in groups.values():
        problems += config.problems()
    return config


def _named(kind: type, tree: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, Any]:
    """Sections by names of the user's choice; one that is empty was taken out."""
    return {
        name: checked_section(kind, entry, f"{key}.{name}", problems)
        for name, entry in tree.items()
        if entry
    }


def _data(tree: Mapping[str, Any], model: ModelConfig | None, problems) -> DataSettings | None:
    """The data section; what the model decides is not asked for a second time."""
    decided = {"dino_size": 224, "chunk": 16, "action_dim": 7, "state_dim": 0}
    if model is not None and model.has_action:
        decided = {
            "dino_size": model.dino.image_size,
            "chunk": model.dit.chunk,
            "action_dim": model.dit.action_dim,
            "state_dim": model.bridge.state_dim,
        }
    problems += [f"data.{key}: the model decides it" for key in decided if key in tree]
    try:
        return DataSettings.from_dict({**tree, **decided})
    except SettingsError as error:
        problems += str(error).split("\n  ")[1:] or [str(error)]
        return None
