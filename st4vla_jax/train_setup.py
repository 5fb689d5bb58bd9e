"""Everything that a run decides before its first array: all problems are found here, and at once.

`prepare` opens the data, lays the state out on the mesh, finds the weights to start from and
compares with the workdir's last checkpoint.  It compiles nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from st4vla_jax.batch import Batch
from st4vla_jax.checkpoint import (
    HF_CONFIG,
    PASSTHROUGH,
    STATISTICS,
    CheckpointError,
    Meta,
    read_meta,
)
from st4vla_jax.config import ConfigError, ModelConfig
from st4vla_jax.data.pipeline import Pipeline
from st4vla_jax.data.settings import DataSettings, open_held_out, open_pipeline
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.distributed import data_block, global_batch
from st4vla_jax.models.lora import LORA_A, LORA_B, add_lora, lora_problems
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.optim import Optimizer, coverage_problems
from st4vla_jax.resume import FINGERPRINT, TRAINABLE, compare_runs, find_checkpoint, init_problems
from st4vla_jax.sharding import (
    batch_shards,
    make_mesh,
    param_shardings,
    platform_problems,
    unbox,
)
from st4vla_jax.state import Params, TrainState, leaves_by_path, split
from st4vla_jax.train_checkpoints import FOLDER, TrainCheckpoints, complete_steps
from st4vla_jax.train_config import PARTS, TrainConfig
from st4vla_jax.train_step import StepConfig, init_train_state

# May differ from the run that a workdir's checkpoint is of: they change no number, or only by
# rounding (mesh, runtime), or what is written down.
FREE_KEYS = tuple(
    f"config.{key}"
    for key in (
        "steps", "save_every", "accumulation", "mesh", "checkpoint", "evaluation", "log",
        "runtime.remat", "runtime.query_chunk", "runtime.vocab_tile", "runtime.attention",
        "data.threads", "data.index_dir", "data.read", "data.schedule.sequences",
        "data.schedule.multiple", "init", "optim.max_skipped",
    )
)  # fmt: skip
DATA_KEYS = ("config.data",)  # free where the fingerprint, which covers the samples, is the same
OPTIMIZER_KEYS = ("config.optim", "config.lora", "ema")


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """What the command line adds to a config; see train.py."""

    allow_data_change: bool = False
    restart_optimizer: bool = False
    overfit_one_batch: bool = False


@dataclasses.dataclass
class Setup:
    """A checked run.

    Attributes:
      abstract: state of ShapeDtypeStructs with shardings.
      init: fresh parameters in `Axes` boxes, from a key.
      sources: checkpoint folder of each part that is not fresh.
      record: what a checkpoint says about the run, see `resume.compare_runs`.
      resume_step: to go on from, or None; restart: with a new optimizer.
    """

    config: TrainConfig
    workdir: Path
    flags: RunFlags
    mesh: Mesh
    model: ST4VLA
    optimizer: Optimizer
    abstract: TrainState
    init: Callable[[jax.Array], Params]
    sources: Mapping[str, Path]
    pipeline: Pipeline
    checkpoints: TrainCheckpoints
    record: dict[str, Any]
    resume_step: int | None
    restart: bool = False

    @property
    def step_config(self) -> StepConfig:
        return step_config(self.config, self.groups)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.pipeline.data_sets[0].encoders[0].groups)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pipeline.data_sets[0].encoders[0].tokenizer

    def to_device(self, batch: Batch) -> Batch:
        """The global batch of which this process has the rows ``batch``."""
        return global_batch(batch, self.mesh, self.config.runtime.rules)


def prepare(config: TrainConfig, workdir: Path | str, flags: RunFlags = RunFlags()) -> Setup:  # noqa: B008
    """Checks a run and opens what it reads.

    Raises:
      ConfigError: every problem of config, mesh, weights, data and workdir.
    """
    problems: list[str] = []
    workdir = Path(workdir).absolute()
    mesh = attempt(problems, lambda: make_mesh(**config.mesh.sizes(len(jax.devices()))))
    model, optimizer, init, boxed = described(config, problems)
    abstract = mesh and not problems and attempt(
        problems, lambda: abstract_state(boxed, optimizer, mesh, config)
    )  # fmt: skip
    if mesh:
        problems += platform_problems(boxed, mesh, config.runtime.rules)
    folders, base = _sources(config, workdir, abstract, problems)
    settings = _data_settings(config, base)
    # Without a mesh the data are opened all the same: what is wrong with them is told too.
    layout = mesh or make_mesh(devices=jax.devices()[:1])
    pipeline = attempt(problems, lambda: _open_train(settings, layout, config))
    if pipeline:
        problems += _tokenizer_problems(pipeline, config)
    if problems:
        raise ConfigError("this run cannot start:\n  " + "\n  ".join(problems))
    record = run_record(config, pipeline, abstract, flags)
    checkpoints = TrainCheckpoints(
        workdir, config.checkpoint, _meta(config, pipeline, base), _files(config, pipeline, base)
    )
    step, restart = checkpoints.latest(), False
    if step is not None:
        try:
            before = checkpoints.run_record(step)
            same = before[FINGERPRINT] == record[FINGERPRINT]
            compare_runs(
                before, record, free=FREE_KEYS + (DATA_KEYS if same else ()), data=DATA_KEYS,
                optimizer=OPTIMIZER_KEYS, allow_data_change=flags.allow_data_change,
                restart_optimizer=flags.restart_optimizer,
            )  # fmt: skip
            restart = flags.restart_optimizer and _optimizer_of(before) != _optimizer_of(record)
        except CheckpointError:
            checkpoints.close()
            raise
    return Setup(
        config, workdir, flags, mesh, model, optimizer, abstract, init, folders, pipeline,
        checkpoints, record, step, restart,
    )  # fmt: skip


def _optimizer_of(record: Mapping[str, Any]) -> list[Any]:
    """What moments belong to: where it is the same, --restart_optimizer has nothing to do."""
    return [record["config"]["optim"], record["config"]["lora"], record["ema"], record[TRAINABLE]]


def described(
    config: TrainConfig, problems: list[str]
) -> tuple[ST4VLA, Optimizer, Callable[[jax.Array], Params], Params]:
    """The model, its optimizer, what makes fresh parameters, and their shapes in `Axes` boxes."""
    model = ST4VLA(config.model, config.runtime)
    optimizer = Optimizer(config.optim, config.steps)

    def init(key: jax.Array) -> Params:
        return add_lora(model.init(key), config.lora, jax.random.fold_in(key, len(PARTS)))

    boxed = jax.eval_shape(model.init, jax.random.key(0))
    problems += lora_problems(boxed, config.lora)
    boxed = jax.eval_shape(init, jax.random.key(0))
    problems += coverage_problems([p for p, _ in leaves_by_path(unbox(boxed))], config.optim.groups)
    return model, optimizer, init, boxed


def step_config(config: TrainConfig, groups: Sequence[str]) -> StepConfig:
    """What an update of this run computes; ``groups`` name data sets and answer kinds."""
    loss = config.loss
    return StepConfig(loss.repeats, loss.weights, config.accumulation, config.seed, tuple(groups))


def attempt(problems: list[str], fn: Callable[[], Any]) -> Any:
    """``fn()``, or None with its error among the problems."""
    try:
        return fn()
    except (ValueError, OSError) as error:  # all of this package's own errors are ValueErrors
        problems.append(str(error))
        return None


def abstract_state(
    boxed: Params, optimizer: Optimizer, mesh: Mesh, config: TrainConfig
) -> TrainState:
    """The state's shapes, dtypes and shardings.

    Moments and the moving average are laid out as their parameters.

    Raises:
      ShardingError: parameters that the mesh does not divide, all listed.
    """
    shardings = param_shardings(boxed, mesh, config.runtime.rules)
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, config.runtime.dtypes.params, sharding=s),
        unbox(boxed), shardings,
    )  # fmt: skip
    trainable, frozen = split(params, optimizer.is_trainable)
    state = jax.eval_shape(lambda p, f: init_train_state(p, optimizer, f), trainable, frozen)
    replicated = NamedSharding(mesh, PartitionSpec())
    by_shape = dict(leaves_by_path(trainable))

    def laid_out(keys, leaf):
        """A leaf below a parameter's path (its moments) takes that parameter's sharding."""
        path = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in keys)
        own = next((p for p in by_shape if path.endswith("/" + p)), None)
        sharding = replicated if own is None else by_shape[own].sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree_util.tree_map_with_path(laid_out, state.opt_state)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    ema = trainable if state.ema is not None else None
    return TrainState(scalar, trainable, frozen, opt_state, ema, scalar)


def abstract_batch(batch: Batch, setup: Setup) -> Batch:
    """Shapes of the global batch that this process's part belongs to."""
    sharding = NamedSharding(setup.mesh, setup.config.runtime.rules.spec(("batch",)))
    sequences = setup.pipeline.schedule.sequences
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((sequences, *x.shape[1:]), x.dtype, sharding=sharding), batch
    )


def run_record(
    config: TrainConfig, pipeline: Pipeline, abstract: TrainState, flags: RunFlags
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, to be compared when it goes on."""
    return json.loads(json.dumps({
        "config": config.tree,
        FINGERPRINT: pipeline.fingerprint,
        TRAINABLE: sorted(path for path, _ in leaves_by_path(abstract.params)),
        "overfit_one_batch": flags.overfit_one_batch,
        "ema": abstract.ema is not None,
    }))  # fmt: skip


def _sources(
    config: TrainConfig, workdir: Path, abstract: TrainState | None, problems: list[str]
) -> tuple[dict[str, Path], Path | None]:
    """Checkpoint folder of each part that is not fresh, and the one whose meta files are kept.

    A run that goes on needs nothing of what it once started from.
    """
    if steps := complete_steps(workdir / FOLDER):
        return {}, workdir / FOLDER / f"{steps[-1]:08d}"
    sources = {part: path for part in PARTS if (path := config.init.source(part))}
    folders, stored = {}, {}
    for path in dict.fromkeys(sources.values()):
        folder = attempt(problems, lambda path=path: find_checkpoint(path))
        meta = folder and attempt(problems, lambda folder=folder: read_meta(folder))
        if meta:
            stored[path] = folder, meta.model
    for part, path in sources.items():
        if path not in stored:
            continue
        folder, model = stored[path]
        has = part == "vlm" or model.has_action
        if has and part in _parts(config):
            folders[part] = folder
            problems += _other_sizes(part, folder, model, config.model)
        elif getattr(config.init, part):
            problems.append(f"init.{part}: {folder} or this model has no {part}")
    if abstract:
        for folder in dict.fromkeys(folders.values()):
            parts = [part for part, own in folders.items() if own == folder]
            problems += init_problems(folder, abstract.all_params, parts, ADAPTERS)
    return folders, folders.get("vlm")


def _other_sizes(part: str, folder: Path, stored: ModelConfig, own: ModelConfig) -> list[str]:
    """Fields of the architecture that differ; parameters' shapes do not show all of them."""
    sections = {"vlm": ("vision", "text"), "dino": ("dino",)}.get(part, ())
    pairs = [
        (f"{name}.{field.name}", getattr(getattr(stored, name), field.name),
         getattr(getattr(own, name), field.name))
        for name in sections
        for field in dataclasses.fields(getattr(own, name))
        if field.name != "image_size"
    ]  # fmt: skip
    return [
        f"init.{part}: {folder} has {name} {there}, this model {here}"
        for name, there, here in pairs
        if there != here
    ]


ADAPTERS = (f".*/({LORA_A}|{LORA_B})",)


def _parts(config: TrainConfig) -> tuple[str, ...]:
    return PARTS if config.model.has_action else PARTS[:1]


def _data_settings(config: TrainConfig, base: Path | None) -> DataSettings:
    """The tokenizer of the VLM's checkpoint serves where the config names none."""
    if config.data.tokenizer or base is None:
        return config.data
    return dataclasses.replace(config.data, tokenizer=str(base / "meta" / "tokenizer"))


def _open_train(settings: DataSettings, mesh: Mesh, config: TrainConfig) -> Pipeline:
    """This process's part of the training data."""
    settings = _divisible(settings, mesh, config, config.accumulation)
    host, num_hosts = data_block(mesh, config.runtime.rules)
    return open_pipeline(settings, host=host, num_hosts=num_hosts)


def open_held_out_part(setup: Setup) -> Pipeline:
    """This process's part of the run's held-out data."""
    settings = _data_settings(setup.config, setup.sources.get("vlm"))
    settings = _divisible(settings, setup.mesh, setup.config, 1)
    host, num_hosts = data_block(setup.mesh, setup.config.runtime.rules)
    return open_held_out(settings, setup.pipeline, host=host, num_hosts=num_hosts)


def _divisible(
    settings: DataSettings, mesh: Mesh, config: TrainConfig, accumulation: int
) -> DataSettings:
    """Sequences divide by devices and microbatches.

    Where the config's own ``schedule.multiple`` is a multiple of these already, another mesh or
    accumulation gives the very same sequences.
    """
    schedule = settings.schedule
    needed = batch_shards(mesh, config.runtime.rules) * accumulation
    multiple = math.lcm(schedule.multiple, needed)
    if schedule.sequences % multiple:
        raise ConfigError(
            f"data.schedule.sequences {schedule.sequences} is no multiple of {multiple} "
            "(devices along the batch x accumulation); leave it 0 to have it chosen"
        )
    return dataclasses.replace(settings, schedule=dataclasses.replace(schedule, multiple=multiple))


def _tokenizer_problems(pipeline: Pipeline, config: TrainConfig) -> list[str]:
    tokenizer, vocab = pipeline.data_sets[0].encoders[0].tokenizer, config.model.text.vocab_size
    if len(tokenizer) <= vocab:
        return []
    where = config.data.tokenizer or "the byte-level tokenizer"
    return [f"data.tokenizer: {where} has {len(tokenizer)} tokens, the model has {vocab}"]


def _meta(config: TrainConfig, pipeline: Pipeline, base: Path | None) -> Meta:
    """What serving needs to know, by the encoder of the first robot set (or of the first set)."""
    encoders = [d.encoders[0] for d in pipeline.data_sets]
    robots = [d.source.spec for d in pipeline.data_sets if hasattr(d.source, "spec")]
    number = next((i for i, d in enumerate(pipeline.data_sets) if hasattr(d.source, "spec")), 0)
    old = read_meta(base) if base else None
    return Meta(
        model=config.model,
        prompt=encoders[number].prompt,
        image=config.data.image,
        action=robots[0].action_spec if robots else None,
        source=dict(old.source) if old else {},
        notes={"trained_from": str(base) if base else "scratch"},
        stored_head=old.stored_head if old else False,
    )


def _files(config: TrainConfig, pipeline: Pipeline, base: Path | None) -> dict[str, bytes | Path]:
    """Files below a checkpoint's meta/: tokenizer, statistics, what the VLM came with."""
    encoder = pipeline.data_sets[0].encoders[0]
    files: dict[str, bytes | Path] = {
        f"tokenizer/{name}": content for name, content in encoder.tokenizer.files().items()
    }
    if base:
        kept = [path for path in (base / "meta").rglob("*") if path.is_file()]
        # The tokenizer that encodes is the one that is kept, whatever the VLM came with.
        own = () if config.data.tokenizer else ("tokenizer/",)
        wanted = (*own, HF_CONFIG, PASSTHROUGH)
        names = {path: path.relative_to(base / "meta").as_posix() for path in kept}
        files |= {name: path for path, name in names.items() if name.startswith(wanted)}
    if encoder.statistics is not None:
        files[STATISTICS] = json.dumps(encoder.statistics.to_dict(), indent=2).encode()
    return files


def sharded_like(tree: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
