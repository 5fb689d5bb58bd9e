"""The data section of a config to a pipeline: sources, statistics, encoders, schedule.

configs/data.py has the same fields with their defaults; here they are checked and used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st4vla_jax.data.augment import Augment
from st4vla_jax.data.encoder import SampleEncoder
from st4vla_jax.data.episode_table import Filters
from st4vla_jax.data.grounding import GroundingSource
from st4vla_jax.data.grounding_folder import GroundingFolder
from st4vla_jax.data.holdout import is_held_out
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.mixtures import shares
from st4vla_jax.data.normalize import ActionSpec, EmbodimentStatistics, Statistics
from st4vla_jax.data.oxe import robot_spec
from st4vla_jax.data.pipeline import DataSet, Pipeline
from st4vla_jax.data.prompts import TEMPLATES, PromptConfig
from st4vla_jax.data.reading import ReadPolicy
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.robot_spec import nearest
from st4vla_jax.data.schedule import ScheduleConfig
from st4vla_jax.data.source import Source
from st4vla_jax.data.stats import EmbodimentAccumulator, accumulate, foreign_statistics
from st4vla_jax.data.tokenizer import Tokenizer, byte_level_tokenizer
from st4vla_jax.sections import checked_section

_COMPARED = 32  # episodes of a set that given statistics are held against
KINDS = ("rlds", "lerobot", "grounding", "lerobot_grounding")


class SettingsError(ValueError):
    """A data section that cannot be used; lists every problem by its key."""


@dataclasses.dataclass(frozen=True)
class SetSettings:
    """One data set.

    Attributes:
      name: its key in the config; messages and metrics name grounding sets by it, robot sets by
        their spec.
      kind: one of KINDS.
      path: folder; for "grounding" JSON file(s), or a folder of data.convert.
      weight: see `mixtures.shares`; among robot, or among grounding, sets.
      prompts: names in prompts.TEMPLATES or templates, in turn from epoch to epoch; () = those of
        the data section.
      spec: robots only: name of a registered spec, or a .json file.
      views: robots only, in order.
      split: rlds only.
      pad, masked: robots only, see `chunks.action_chunk`.
      pause: robots only, see `episode_table.Filters`.
      holdout: share of the episodes (grounding: of the images with their records) that training
        does not see, by a hash of their content, see `data.holdout`.
      images, coordinates: grounding JSON only, see `GroundingSource`.
      video, stride: lerobot_grounding only, see `LeRobotGrounding`.
      max_bad_records: that the index may leave out.
    """

    name: str
    kind: str
    path: str | tuple[str, ...]
    weight: float = 1.0
    prompts: tuple[str, ...] = ()
    spec: str = ""
    views: tuple[str, ...] = ("primary",)
    split: str = "train"
    pad: str = "neutral"
    masked: bool = True
    pause: float | None = None
    holdout: float = 0.0
    images: str | None = None
    coordinates: str = "none"
    video: str = ""
    stride: int = 1
    max_bad_records: int = 0

    @property
    def is_robot(self) -> bool:
        return self.kind in ("rlds", "lerobot")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Everything about data but the data sets; names as where they are used.

    Attributes:
      sets: the mixture.
      alpha: see `mixtures.shares`.
      schedule, read, image, augment: see the classes; no ``augment`` = none.
      prompts: templates of robot samples, see `SetSettings`; ("none",) turns them off.
      system, lower_case: see `PromptConfig`.
      tokenizer: folder of tokenizer.json; "" = the byte-level one of the tiny presets.
      statistics: dataset_statistics.json; "" = computed from the robot sets' training part.
      dino_size, chunk, action_dim, state_dim: see `SampleEncoder`.
      threads: readers of a host.
      index_dir: where indexes are kept; "" = beside the data.
    """

    sets: tuple[SetSettings, ...]
    alpha: float = 0.0
    schedule: ScheduleConfig = ScheduleConfig()
    read: ReadPolicy = ReadPolicy()
    image: ImageConfig = ImageConfig(size=(224, 224), min_pixels=784, max_pixels=50_176)
    augment: Augment | None = None
    prompts: tuple[str, ...] = ("paper",)
    system: str = PromptConfig.system
    lower_case: bool = False
    tokenizer: str = ""
    statistics: str = ""
    dino_size: int = 224
    chunk: int = 16
    action_dim: int = 7
    state_dim: int = 0
    threads: int = 8
    index_dir: str = ""

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> DataSettings:
        """Reads a config's data section; raises SettingsError naming unknown and missing keys."""
        problems: list[str] = []
        tree = dict(tree)
        sections = {"schedule": ScheduleConfig, "read": ReadPolicy, "image": ImageConfig}
        for key, section in sections.items():
            tree[key] = checked_section(section, tree.get(key) or {}, key, problems)
        if tree.get("augment"):
            tree["augment"] = checked_section(Augment, tree["augment"], "augment", problems)
        tree["sets"] = tuple(
            checked_section(SetSettings, {"name": name, **entry}, f"sets.{name}", problems)
            for name, entry in sorted((tree.get("sets") or {}).items())
        )
        if not tree["sets"]:
            problems.append("sets: no data set; add one by name")
        problems += [
            f"sets.{entry.name}.kind: {entry.kind!r}{nearest(entry.kind, KINDS)}"
            for entry in tree["sets"]
            if entry is not None and entry.kind not in KINDS
        ]
        tree["augment"] = tree.get("augment") or None
        settings = checked_section(cls, tree, "data", problems)
        if problems:
            raise SettingsError("data settings:\n  " + "\n  ".join(problems))
        return settings


def open_pipeline(
    settings: DataSettings, *, host: int = 0, num_hosts: int = 1, own_statistics: bool = True
) -> Pipeline:
    """Opens the training parts (indexing them if need be) and builds the pipeline of one host.

    Args:
      settings: the data section.
      host: number of this process among those that share the global batch.
      num_hosts: of these.
      own_statistics: refuse statistics that are given by path and are of other data; False where
        a checkpoint's own are put to data that it may not have seen.

    Raises:
      SettingsError: sets that cannot be opened, all by name; leaks; statistics of other data.
      SpecError, StatisticsError, ScheduleError, LayoutError: by what does not fit.
    """
    sources = _open_sources(settings)
    _check_leaks(settings, sources)
    if own_statistics:
        _check_statistics(settings, sources)
    return _pipeline(settings, sources, make_encoders(settings, sources), host, num_hosts)


def open_held_out(
    settings: DataSettings, train: Pipeline, *, host: int = 0, num_hosts: int = 1
) -> Pipeline:
    """The held-out parts beside a training pipeline of the same sets.

    They have the training part's statistics and numbers of groups and embodiments, no augmentation,
    only the sets with a holdout, and as many sequences as these need.

    Args:
      settings: the data section; its schedule may differ from the training's.
      train: of `open_pipeline`.
      host: number of this process among those that share the global batch.
      num_hosts: of these.

    Raises:
      SettingsError: nothing is held out.
      SourceError, ScheduleError, LayoutError: by what does not fit.
    """
    encoders = [
        tuple(dataclasses.replace(encoder, augment=None) for encoder in data_set.encoders)
        for entry, data_set in zip(settings.sets, train.data_sets, strict=True)
        if entry.holdout
    ]
    settings = _held_out_settings(settings)
    return _pipeline(settings, _open_sources(settings, "held_out"), encoders, host, num_hosts)


def _open_sources(settings: DataSettings, part: str = "train") -> list[Source]:
    """Raises SettingsError naming every set that cannot be opened."""
    sources, problems = [], []
    for entry in settings.sets:
        try:
            sources.append(open_source(entry, settings, part))
        except (ValueError, OSError) as error:  # all of this package's own errors are ValueErrors
            problems.append(f"sets.{entry.name}: {error}")
        except ModuleNotFoundError as error:
            problems.append(f"sets.{entry.name}: {error}; pip install '.[lerobot]'")
    if problems:
        raise SettingsError("data settings:\n  " + "\n  ".join(problems))
    return sources


def _pipeline(
    settings: DataSettings,
    sources: Sequence[Source],
    encoders: Sequence[tuple[SampleEncoder, ...]],
    host: int,
    num_hosts: int,
) -> Pipeline:
    weights = _weights(settings, sources)
    return Pipeline(
        [DataSet(*one) for one in zip(sources, encoders, weights, strict=True)],
        settings.schedule,
        policy=settings.read,
        host=host,
        num_hosts=num_hosts,
        threads=settings.threads,
    )


def open_source(entry: SetSettings, settings: DataSettings, part: str = "train") -> Source:
    """The source of one part of a data set."""
    common = {
        "holdout": entry.holdout,
        "part": part,
        "max_bad_records": entry.max_bad_records,
        "index_dir": settings.index_dir or None,
    }
    path = entry.path if isinstance(entry.path, str) else entry.path[0]
    if entry.kind == "grounding" and Path(path).is_dir():
        return GroundingFolder(path, name=entry.name, **common)
    if entry.kind == "grounding":
        return GroundingSource(
            entry.path, name=entry.name, images=entry.images, coordinates=entry.coordinates,
            **common,
        )  # fmt: skip
    if entry.kind == "lerobot_grounding":
        from st4vla_jax.data.lerobot import LeRobotGrounding  # needs the extra [lerobot]

        return LeRobotGrounding(
            path, name=entry.name, video=entry.video, stride=entry.stride, **common
        )
    robot = {
        "spec": robot_spec(entry.spec), "chunk": settings.chunk, "views": entry.views,
        "pad": entry.pad, "masked": entry.masked, "filters": Filters(pause=entry.pause), **common,
    }  # fmt: skip
    if entry.kind == "lerobot":
        from st4vla_jax.data.lerobot import LeRobotSource

        return LeRobotSource(path, **robot)
    return RldsSource(path, split=entry.split, **robot)


def _held_out_settings(settings: DataSettings) -> DataSettings:
    """Settings of the held-out part: the sets that have one, sequences as they need."""
    sets = tuple(entry for entry in settings.sets if entry.holdout)
    if not sets:
        raise SettingsError(
            "data settings: no data set holds anything out; set sets.NAME.holdout to a share of it"
        )
    counts = {
        "robot_samples": any(entry.is_robot for entry in sets) * settings.schedule.robot_samples,
        "grounding_samples": (
            any(not entry.is_robot for entry in sets) * settings.schedule.grounding_samples
        ),
    }
    schedule = dataclasses.replace(settings.schedule, sequences=0, **counts)
    return dataclasses.replace(settings, sets=sets, schedule=schedule)


def _check_leaks(settings: DataSettings, sources: Sequence[Source]) -> None:
    """Raises SettingsError where one data set trains on episodes that another holds out."""
    parts = []
    for entry, source in zip(settings.sets, sources, strict=True):
        if entry.kind != "grounding":
            content = source.contents()
            held_out = is_held_out(content, entry.holdout)
            parts.append((entry, content[held_out], content[~held_out]))
    problems = [
        f"sets.{other.name} trains on {count} episodes that sets.{entry.name} holds out; give both "
        "the same holdout"
        for entry, held_out, _ in parts
        for other, _, trained in parts
        if (count := len(np.intersect1d(held_out, trained)))
    ]
    if problems:
        raise SettingsError("data settings:\n  " + "\n  ".join(problems))


def _weights(settings: DataSettings, sources: Sequence[Source]) -> list[float]:
    """Weights of all sets, scaled by size**alpha among their kin."""
    numbers: dict[bool, list[int]] = {True: [], False: []}
    for number, entry in enumerate(settings.sets):
        numbers[entry.is_robot].append(number)
    weights = [0.0] * len(sources)
    for own in filter(None, numbers.values()):
        given = {str(i): settings.sets[i].weight for i in own}
        sizes = {str(i): len(sources[i]) for i in own}
        for key, share in shares(given, sizes, settings.alpha).items():
            weights[int(key)] = share
    return weights


def make_encoders(
    settings: DataSettings, sources: Sequence[Source]
) -> list[tuple[SampleEncoder, ...]]:
    """For each data set one encoder a paraphrase; numbers of groups and embodiments are shared."""
    specs: dict[str, ActionSpec] = {
        source.spec.embodiment: source.spec.action_spec
        for entry, source in zip(settings.sets, sources, strict=True)
        if entry.is_robot
    }
    base = SampleEncoder(
        tokenizer=open_tokenizer(settings.tokenizer),
        image_config=settings.image,
        dino_size=settings.dino_size,
        statistics=_statistics(settings, sources) if specs else None,
        embodiments=specs,
        augment=settings.augment,
        groups=tuple(g for s in sources for g in getattr(s, "groups", (s.name,))),
        chunk=settings.chunk,
        action_dim=settings.action_dim,
        state_dim=settings.state_dim,
    )
    return [
        tuple(
            dataclasses.replace(
                base,
                prompt=PromptConfig(
                    TEMPLATES.get(name, name), settings.system, settings.lower_case
                ),
            )
            for name in _prompts(entry, settings)
        )
        for entry in settings.sets
    ]


def _prompts(entry: SetSettings, settings: DataSettings) -> Sequence[str]:
    """Prompts are of robot samples; one encoder serves any grounding set."""
    if not entry.is_robot:
        return ("none",)
    return entry.prompts or settings.prompts


def open_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a folder, or the byte-level one for ""."""
    return Tokenizer.load(folder) if folder else byte_level_tokenizer()


def _statistics(settings: DataSettings, sources: Sequence[Source]) -> Statistics:
    robots = [s for e, s in zip(settings.sets, sources, strict=True) if e.is_robot]
    return Statistics.load(settings.statistics) if settings.statistics else statistics_of(robots)


def _check_statistics(settings: DataSettings, sources: Sequence[Source]) -> None:
    """Raises SettingsError where statistics given by path are of other data."""
    if not settings.statistics:
        return
    statistics = Statistics.load(settings.statistics)
    problems = [
        text
        for entry, source in zip(settings.sets, sources, strict=True)
        if entry.is_robot
        and source.spec.embodiment in statistics
        and (text := _foreign(source, statistics[source.spec.embodiment]))
    ]
    if problems:
        raise SettingsError(f"{settings.statistics}:\n  " + "\n  ".join(problems))


def _foreign(source: Any, entry: EmbodimentStatistics) -> str | None:
    episodes = itertools.islice(source.standard_episodes(), _COMPARED)
    return foreign_statistics(source.name, episodes, entry)


def statistics_of(sources: Sequence[Any]) -> Statistics:
    """Statistics of robot sources by embodiment, over all episodes of their samples."""
    found: dict[str, EmbodimentAccumulator] = {}
    for source in sources:
        own = accumulate(source.spec, source.standard_episodes())
        if source.spec.embodiment in found:
            found[source.spec.embodiment].merge(own)
        else:
            found[source.spec.embodiment] = own
    entries: dict[str, EmbodimentStatistics] = {k: v.result() for k, v in found.items()}
    return Statistics(entries)
