"""What a training config asks of a machine: data, weights, tokenizer, disk (see doctor.py)."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from st4vla_jax.config import ConfigError, ModelConfig
from st4vla_jax.data.index_folder import MANIFEST, cache_root, read_manifest
from st4vla_jax.data.normalize import Statistics
from st4vla_jax.data.oxe import robot_spec
from st4vla_jax.data.settings import DataSettings, SetSettings, open_tokenizer
from st4vla_jax.data.shards import ShardState
from st4vla_jax.data.source_files import file_stamps
from st4vla_jax.data.tfds_folder import ALL_SPLITS, read_folder
from st4vla_jax.doctor import Finding, Findings, folder, look
from st4vla_jax.resume import find_checkpoint
from st4vla_jax.sharding import unbox
from st4vla_jax.state import leaves_by_path, split
from st4vla_jax.train_config import PARTS, TrainConfig
from st4vla_jax.train_setup import described


def examine(config: TrainConfig, workdir: Path | None) -> Findings:
    """Everything that the config names."""
    for entry in config.data.sets:
        yield from look(f"data {entry.name}", lambda e=entry: data_set(e, config.data))
    yield from look("statistics", lambda: statistics(config.data))
    yield from look("tokenizer", lambda: tokenizer(config))
    yield from look("weights", lambda: weights(config))
    if config.data.index_dir:
        yield from look("index_dir", lambda: folder("index_dir", Path(config.data.index_dir)))
    needed = 0
    try:
        trained, frozen = parameters(config)
        text = f"{trained / 1e6:.1f} M parameters trained, {frozen / 1e6:.1f} M frozen"
        yield Finding("model", "ok", text)
        needed = checkpoint_bytes(config, trained, frozen)
    except ConfigError as error:
        yield Finding("model", "fail", str(error), "correct the config")
    if workdir is not None:
        yield from look("workdir", lambda: folder("workdir", workdir, needed))
    if config.log.wandb:
        yield from look("wandb", lambda: wandb(config.log.wandb_mode))


def parameters(config: TrainConfig) -> tuple[int, int]:
    """Numbers of trained and of frozen parameters, adapters included.

    Raises:
      ConfigError: groups that do not cover them, every parameter by name.
    """
    problems: list[str] = []
    _, optimizer, _, boxed = described(config, problems)
    if problems:
        raise ConfigError("\n          ".join(problems))
    trees = split(unbox(boxed), optimizer.is_trainable)
    trained, frozen = (
        sum(math.prod(leaf.shape) for _, leaf in leaves_by_path(tree)) for tree in trees
    )
    return trained, frozen


def checkpoint_bytes(config: TrainConfig, trained: int, frozen: int) -> int:
    """Disk that the checkpoints of a run take: those kept and the one being written."""
    width = jnp.dtype(config.runtime.dtypes.params).itemsize
    moments = jnp.dtype(config.optim.mu_dtype).itemsize + 4
    average = width if config.optim.ema else 0
    one = trained * (width + moments + average) + frozen * width
    return one * (config.checkpoint.keep_last + 1)


# --- Data ---------------------------------------------------------------------------------------


def data_set(entry: SetSettings, settings: DataSettings) -> Findings:
    """Files of a data set, its spec, its index."""
    name = f"data {entry.name}"
    paths = [Path(p) for p in ([entry.path] if isinstance(entry.path, str) else entry.path)]
    missing = [str(p) for p in paths if not os.access(p, os.R_OK)]
    if entry.images and not os.access(entry.images, os.R_OK):
        missing.append(entry.images)
    if missing:
        advice = f"set data.sets.{entry.name}.path (and images) to where the data are"
        yield Finding(name, "fail", f"cannot be read: {', '.join(missing)}", advice)
        return
    if entry.kind.startswith("lerobot"):
        lacking = [m for m in ("av", "pyarrow") if importlib.util.find_spec(m) is None]
        if lacking:
            text = f"needs {' and '.join(lacking)}"
            yield Finding(name, "fail", text, "pip install '.[lerobot]'")
            return
    if entry.is_robot:
        robot_spec(entry.spec)  # raises with the names that there are
    stamps = data_stamps(entry, paths)
    state = index_state(cache_root(_root(entry, paths[0]), settings.index_dir or None), stamps)
    size = sum(size for _, size, _ in stamps) / 2**20
    text = f"{len(stamps)} files of {size:.1f} MiB, {state}"
    yield Finding(name, "ok", text)


def _root(entry: SetSettings, path: Path) -> Path:
    return read_folder(path).root if entry.kind == "rlds" else path


def data_stamps(entry: SetSettings, paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of the files that an index is made from.

    Raises:
      FolderError: an RLDS folder that is not as it should be.
      FileNotFoundError: the split, or a LeRobot folder's files, are not there.
    """
    if entry.kind == "grounding":
        return [tuple(stamp) for stamp in file_stamps(paths)]
    if entry.kind == "rlds":
        splits = read_folder(paths[0]).splits
        if entry.split not in (ALL_SPLITS, *splits):
            there = ", ".join(sorted(splits))
            raise FileNotFoundError(f"{paths[0]}: no split {entry.split!r}; there are {there}")
        chosen = splits.values() if entry.split == ALL_SPLITS else [splits[entry.split]]
        shards = [ShardState.of(s.path, s.format) for group in chosen for s in group]
        return [(s.name, s.size, s.mtime_ns) for s in shards]
    files = sorted(paths[0].glob("data/*/*.parquet"))
    if not files or not (paths[0] / "meta/info.json").is_file():
        raise FileNotFoundError(f"{paths[0]}: no LeRobot folder (meta/info.json, data/*/*.parquet)")
    return [tuple(stamp) for stamp in file_stamps(files)]


def index_state(root: Path, stamps: Sequence[tuple[str, int, int]]) -> str:
    """Whether an index of files as they are is there; an old one is never read, but built anew."""
    wanted, names = set(stamps), {name for name, _, _ in stamps}
    state = "no index yet: the first start builds it"
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        held = _indexed(read_manifest(manifest.parent))
        if wanted <= held:
            return f"indexed in {manifest.parent}"
        if names <= {name for name, _, _ in held}:
            state = "changed since it was indexed: the next start builds the index anew"
    return state


def _indexed(manifest: dict[str, Any] | None) -> set[tuple[str, int, int]]:
    if manifest is None:
        return set()
    shards = {(s["name"], s["size"], s["mtime_ns"]) for s in manifest.get("shards", ())}
    return shards | {tuple(stamp) for stamp in manifest.get("stamps", ())}


def statistics(settings: DataSettings) -> Findings:
    """The file of normalisation statistics, if the config names one."""
    if settings.statistics:
        found = Statistics.load(settings.statistics)
        yield Finding("statistics", "ok", f"of {', '.join(found)}")
        return
    without = [e.name for e in settings.sets if e.kind == "lerobot"]
    if without:
        advice = "python -m st4vla_jax.compute_stats, then set data.statistics"
        yield Finding("statistics", "fail", f"{', '.join(without)} needs a file of them", advice)
    elif any(e.is_robot for e in settings.sets):
        yield Finding("statistics", "ok", "computed from the data at the start")


# --- Model --------------------------------------------------------------------------------------


def tokenizer(config: TrainConfig) -> Findings:
    """The tokenizer, against the model's vocabulary."""
    folder_name, source = config.data.tokenizer, config.init.source("vlm")
    if not folder_name and source:
        folder_name = str(find_checkpoint(source) / "meta" / "tokenizer")
    found = open_tokenizer(folder_name)
    where, rows = folder_name or "byte-level, built in", config.model.text.vocab_size
    text = f"{where}: {len(found)} tokens for {rows} rows of embeddings"
    if len(found) > rows:
        yield Finding("tokenizer", "fail", text, "set data.tokenizer to that of the model")
    elif not folder_name and rows > 100_000:
        advice = "set data.tokenizer (python -m convert_weights.tokenizer makes Qwen's)"
        yield Finding("tokenizer", "warn", text, advice)
    else:
        yield Finding("tokenizer", "ok", text)


def weights(config: TrainConfig) -> Findings:
    """The checkpoints that parts start from."""
    fresh = []
    for part in PARTS if config.model.has_action else PARTS[:1]:
        source = config.init.source(part)
        if source:
            yield Finding("weights", "ok", f"{part} from {find_checkpoint(source)}")
        else:
            fresh.append(part)
    if fresh:
        pretrained = [part for part in fresh if part in ("vlm", "dino")]
        big = _is_big(config.model) and pretrained
        advice = "convert pretrained ones (python -m convert_weights.to_jax), set init.checkpoint"
        text = f"fresh: {', '.join(fresh)}"
        yield Finding("weights", "warn" if big else "ok", text, advice if big else "")


def _is_big(model: ModelConfig) -> bool:
    return model.text.hidden_size >= 1024


def wandb(mode: str) -> Findings:
    """Whether Weights & Biases can be reached as the config wants it; nothing is sent."""
    if importlib.util.find_spec("wandb") is None:
        text = "not installed: metrics go to metrics.jsonl and TensorBoard only"
        yield Finding("wandb", "warn", text, "pip install wandb, or set log.wandb to ''")
    elif mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_netrc()):
        text = "online, but nobody is logged in: the run will be kept offline"
        yield Finding("wandb", "warn", text, "wandb login, or set log.wandb_mode to offline")
    else:
        yield Finding("wandb", "ok", mode)


def _has_netrc() -> bool:
    """Whether the file that `wandb login` writes is there; it is not read."""
    return any((Path.home() / name).exists() for name in (".netrc", "_netrc"))
