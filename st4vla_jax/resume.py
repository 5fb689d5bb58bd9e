"""What a run may start from: its own checkpoint if nothing that matters changed, or weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from st4vla_jax import checkpoint_trees as trees
from st4vla_jax.checkpoint import CheckpointError, nested, param_shapes, read_meta
from st4vla_jax.train_checkpoints import FOLDER, complete_steps

FINGERPRINT, TRAINABLE = "data_fingerprint", "trainable"  # keys of a run's record
# Keys that came later -> what runs without them did.
_LATER = {r"config\.optim\.groups\.[^.]+\.rule": "adam"}


def compare_runs(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    free: Sequence[str] = (),
    data: Sequence[str] = (),
    optimizer: Sequence[str] = (),
    allow_data_change: bool = False,
    restart_optimizer: bool = False,
) -> None:
    """Compares the records of the run that wrote a checkpoint and of the one that wants to go on.

    Args:
      old: `TrainCheckpoints.run_record`.
      new: the same of this run: nested dicts, with the fingerprint of the data under
        ``data_fingerprint`` and the paths of the trainable parameters under ``trainable``.
      free: keys that may change, "config.log_every"; one of a dict frees all below it.
      data: keys that may change with allow_data_change, as the fingerprint may.
      optimizer: keys that may change with restart_optimizer, as the trainable paths may.
      allow_data_change: the user's word for it.
      restart_optimizer: the user's word for it: only parameters are taken from the checkpoint.

    Raises:
      CheckpointError: something else changed; lists key, old and new value, and the flag.
    """
    # JSON makes lists of tuples; what is compared has been through it on both sides.
    flat_old, flat_new = dict(flat_record(old)), dict(flat_record(new))
    accepted = (
        (free, True, ""),
        ((FINGERPRINT, *data), allow_data_change, "  [--allow_data_change accepts it]"),
        ((TRAINABLE, *optimizer), restart_optimizer, "  [--restart_optimizer accepts it]"),
    )
    problems = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, _unsaid(key)), flat_new.get(key, "absent")
        if before == after:
            continue
        named = [(on, hint) for keys, on, hint in accepted if _below(key, keys)]
        if not any(on for on, _ in named):
            problems.append(f"{key}: {_change(before, after)}{''.join(hint for _, hint in named)}")
    if problems:
        raise CheckpointError(
            "\n  ".join(
                [
                    "this run differs from the one that wrote the checkpoint (take another "
                    "--workdir, or undo the change):",
                    *problems,
                ]
            )
        )


def _unsaid(key: str) -> str:
    """What a record without this key means by it."""
    known = (value for pattern, value in _LATER.items() if re.fullmatch(pattern, key))
    return next(known, "absent")


def flat_record(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("config.optim.b1", value) of nested dicts; an empty one is a value."""
    if isinstance(record, Mapping) and record:
        for name, value in record.items():
            yield from flat_record(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, list(record) if isinstance(record, tuple) else record


def _below(key: str, keys: Sequence[str]) -> bool:
    return any(key == k or key.startswith(k + ".") for k in keys)


def _change(before: Any, after: Any) -> str:
    """Old and new value; of lists of names only what differs."""
    if isinstance(before, list) and isinstance(after, list) and len(before) + len(after) > 8:
        gone = [f"-{item}" for item in before if item not in after]
        come = [f"+{item}" for item in after if item not in before]
        if gone or come:
            return ", ".join(gone + come)
    return f"{before!r} -> {after!r}"


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Parameters taken from elsewhere.

    Attributes:
      params: what was taken, nested dict.
      fresh: what the source has not: top-level names, and paths below the others.
      folder: the checkpoint that it came from.
      step: of the run that wrote it, or None.
    """

    params: dict[str, Any]
    fresh: tuple[str, ...]
    folder: Path
    step: int | None


def init_from(
    source: Path | str,
    abstract: Mapping[str, Any],
    subtrees: Sequence[str] | None = None,
    may_be_fresh: Sequence[str] = (),
) -> WarmStart:
    """Reads parameters to start from, cast and sharded, each device only what it holds.

    Args:
      source: workdir of a run (its latest step), a folder of one step, or any checkpoint.
      abstract: the whole parameter tree wanted: ShapeDtypeStructs with shardings.
      subtrees: top-level names to take, e.g. ("vlm",); None takes all that both have.
      may_be_fresh: regexes of whole paths that the source need not have, e.g. LoRA factors.

    Raises:
      CheckpointError: no checkpoint there, or a part taken does not fit (every path listed).
    """
    folder = find_checkpoint(source)
    part, fresh, problems = _fitting(folder, abstract, subtrees, may_be_fresh)
    if problems:
        raise CheckpointError("\n  ".join([f"{folder}: does not fit this model:", *problems]))
    params = nested(trees.read(folder / "params", part).items())
    return WarmStart(params, tuple(fresh), folder, read_meta(folder).step)


def init_problems(
    folder: Path,
    abstract: Mapping[str, Any],
    subtrees: Sequence[str] | None = None,
    may_be_fresh: Sequence[str] = (),
) -> list[str]:
    """Why `init_from` would refuse a checkpoint's folder, without reading parameters."""
    return [f"{folder}: {text}" for text in _fitting(folder, abstract, subtrees, may_be_fresh)[2]]


def _fitting(folder, abstract, subtrees, may_be_fresh) -> tuple[dict, list[str], list[str]]:
    """Leaves to read by path, what stays fresh, and what does not fit."""
    wanted, stored = trees.flat(abstract), param_shapes(folder)
    tops = {path.split("/")[0] for path in wanted}, {path.split("/")[0] for path in stored}
    taken = tops[0] & tops[1] if subtrees is None else set(subtrees)
    sides = zip(tops, ("this model", "the checkpoint"), strict=True)
    problems = [f"{name}: not in {side}" for top, side in sides for name in sorted(taken - top)]
    if not taken:
        problems.append(f"it holds {', '.join(sorted(tops[1]))}, this model none of that")
    optional = [re.compile(pattern) for pattern in may_be_fresh]
    fresh = sorted(tops[0] - taken)
    part = {}
    for path, leaf in wanted.items():
        if path.split("/")[0] not in taken & tops[1]:
            continue
        if path not in stored and any(pattern.fullmatch(path) for pattern in optional):
            fresh.append(path)
        else:
            part[path] = leaf
    left = {path for path in stored if path.split("/")[0] not in taken & tops[0]}
    problems += trees.mismatches(folder / "params", part, dtypes=False, ignore=left)
    return part, fresh, problems


def find_checkpoint(source: Path | str) -> Path:
    """Folder of the checkpoint meant by a workdir (its latest step) or by a checkpoint's folder.

    Raises:
      CheckpointError: there is none.
    """
    source = Path(source).absolute()
    steps = complete_steps(source / FOLDER)
    if steps:
        return source / FOLDER / f"{steps[-1]:08d}"
    if (source / FOLDER).is_dir():
        raise CheckpointError(f"{source}: no step in its {FOLDER} is complete")
    read_meta(source)
    return source
