"""Checkpoints of a run: written while it trains, picked up by the same command.

::

  WORKDIR/checkpoints/00000200/params     all parameters, trainable and frozen (checkpoint.py)
                               opt_state  optimizer state, update count, skipped updates
                               ema        moving average of the trainable parameters, if kept
                               meta       as in checkpoint.py, and train.json: `run_record`

A step is written under a temporary name.  meta/train.json, its commit marker, is written when all
arrays of all processes are on disk; then the folder takes its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from st4vla_jax import checkpoint_trees as trees
from st4vla_jax.checkpoint import META, CheckpointError, Meta, git_revision
from st4vla_jax.data.index_folder import sync
from st4vla_jax.distributed import check_shared_folder
from st4vla_jax.state import TrainState

FOLDER = "checkpoints"
RUN = "meta/train.json"
FORMAT_VERSION = 1  # of train.json and opt_state
_STEP = re.compile(r"\d{8,}")
_DELETED = ".deleted"
_TEMPORARY = re.compile(rf"\d{{8,}}(\.orbax-checkpoint-tmp.*|{_DELETED})")
_LOCK = ".lock"
# Until all processes have written their part: 36 GB (3 B parameters with moments) by one host at
# 20 MB/s.  A process that fails ends the run at once; this bounds one that hangs.
_TIMEOUT_S = 1800

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """What is kept, and how it is written.

    Attributes:
      keep_last: newest checkpoints to keep, at least one.
      keep_every: keep those whose step is a multiple of it too; 0 keeps none for that.
      best_metric: keep the one best by this evaluation metric too; "" for none.
      best_mode: "min" or "max".
      async_: write in the background while training goes on.
    """

    keep_last: int = 3
    keep_every: int = 0
    best_metric: str = ""
    best_mode: str = "min"
    async_: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.keep_last < 1:
            problems.append(f"keep_last {self.keep_last}: need at least 1")
        if self.keep_every < 0:
            problems.append(f"keep_every {self.keep_every}: need 0 or a number of steps")
        if self.best_mode not in ("min", "max"):
            problems.append(f"best_mode {self.best_mode!r}: need 'min' or 'max'")
        if problems:
            raise CheckpointError("\n  ".join(["checkpoint settings:", *problems]))


class TrainCheckpoints:
    """The checkpoints of one run.  Every process of the run makes one and calls it alike.

    While it is open no other run can write to the same workdir.
    """

    def __init__(
        self,
        workdir: Path | str,
        settings: CheckpointSettings,
        meta: Meta,
        files: Mapping[str, bytes | Path],
    ) -> None:
        """Opens WORKDIR/checkpoints and removes what dead runs left half-written there.

        Args:
          workdir: of the run; the same folder, on a shared file system, for every process.
          settings: what is kept.
          meta: what goes to meta.json; step and git revision are filled in.
          files: name below meta/ -> contents, or a file that is read now.

        Raises:
          CheckpointError: files that cannot be read, or a workdir that another run uses or that
            cannot be written.
          DistributedError: a process does not see the workdir of the others.
        """
        if "://" in str(workdir):
            raise CheckpointError(f"{workdir}: not a folder; mount the bucket, and give its path")
        self.folder = Path(workdir).absolute() / FOLDER
        self._settings = settings
        self._meta = dataclasses.replace(meta, git_revision=git_revision())
        self._primary = jax.process_index() == 0
        self._writing: int | None = None
        self._complete = set(complete_steps(self.folder))
        files = _contents(files) if self._primary else {}
        self._lock = _locked(self.folder) if self._primary else None
        self._handler = _StepHandler(files)
        self._checkpointer = ocp.AsyncCheckpointer(self._handler, timeout_secs=_TIMEOUT_S)
        check_shared_folder(self.folder)
        if self._primary:
            self._remove_leftovers()

    def save(
        self, state: TrainState, run: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves a state; returns when it is copied, before it is on disk (unless not async).

        Waits for the save before it.  A step that is there already is left as it is.

        Args:
          state: may be donated to the next update afterwards.
          run: JSON-able; what `run_record` gives back.
          metrics: of the evaluation at this step, if there was one.

        Raises:
          CheckpointError: this save or the one before it failed; the checkpoints from before are
            as they were.
        """
        self.wait()
        step, best = int(state.step), self._settings.best_metric
        if metrics is not None and best and best not in metrics:
            _LOG.warning(
                "checkpoint.best_metric %r is none of the metrics of the evaluation (%s): no best "
                "checkpoint is kept", best, ", ".join(sorted(metrics)) or "there are none",
            )  # fmt: skip
        # Not by a look at the folder: on a network disk processes may see it at different times.
        if step in self._complete:
            _LOG.info("step %d is saved already", step)
            return
        self._handler.started = time.monotonic()
        record = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "run": dict(run),
        }
        meta = dataclasses.replace(self._meta, step=step).to_json()
        self._handler.record = {META: _json(meta), RUN: _json(record)}
        items = _StepArgs(**trees.to_save(state))
        self._writing, path = step, self._path(step)
        with self._explained():
            if self._primary and path.exists():
                path.rename(path.with_suffix(f".incomplete-{time.time_ns()}"))
            self._checkpointer.save(path, items)
        if not self._settings.async_:
            self.wait()

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed; does not wait."""
        with self._explained():
            self._checkpointer.check_for_errors()

    def wait(self) -> None:
        """Waits until the last save is on disk, then removes what need not be kept.

        Raises:
          CheckpointError: the save failed.
        """
        with self._explained():
            self._checkpointer.wait_until_finished()
        if self._writing is not None:
            self._complete.add(self._writing)
            self._writing = None
            if self._primary:
                sync(self.folder)  # the new name is on disk before an old one goes
                self._remove_unneeded()

    def close(self) -> None:
        """Waits, and lets other runs use the workdir.

        Raises:
          CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def latest(self) -> int | None:
        """Newest complete step, or None; warns of folders that lack their commit marker."""
        steps = complete_steps(self.folder)
        for path in self.folder.iterdir():
            if _STEP.fullmatch(path.name) and int(path.name) not in steps:
                _LOG.warning("%s: ignored, it is not complete (lacks %s)", path, RUN)
        return max(steps, default=None)

    def run_record(self, step: int) -> dict[str, Any]:
        """The ``run`` that `save` was given at ``step``.

        Raises:
          CheckpointError: no such step, or one of a newer format.
        """
        return dict(_record(self._path(step))["run"])

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a state, each device only what it holds.

        Args:
          step: to read.
          abstract: state of ShapeDtypeStructs with shardings, of any mesh and process count.

        Raises:
          CheckpointError: no such step, damage, or leaves that are missing, left over or of
            another shape or dtype (all listed).
        """
        folder = self._path(step)
        _record(folder)
        wanted = {name: trees.flat(tree) for name, tree in trees.of_state(abstract).items()}
        problems: list[str] = []
        for name, leaves in wanted.items():
            problems += trees.mismatches(folder / name, leaves, dtypes=True)
        if problems:
            raise CheckpointError(
                "\n  ".join([f"{folder}: does not fit this run's state:", *problems])
            )
        found = {name: trees.read(folder / name, leaves) for name, leaves in wanted.items()}
        return trees.to_state(abstract, found)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Makes a CheckpointError of what Orbax and TensorStore raise, and frees the space."""
        try:
            yield
        except Exception as error:
            step, self._writing = self._writing, None
            if self._primary:
                self._remove_leftovers()
            reason = str(error).partition(" [tensorstore_spec")[0].partition("\n")[0]
            latest = self.latest()
            kept = "there is no older one" if latest is None else f"step {latest} is complete"
            full = " (no room on the disk?)" if _is_full(error) else ""
            raise CheckpointError(
                f"{self.folder}: saving step {step} failed{full}: {type(error).__name__}: "
                f"{reason}; {kept}.  Correct the cause, then run the same command again"
            ) from error

    def _remove_leftovers(self) -> None:
        for path in self.folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                _LOG.info("%s: removing what an interrupted run left", path)
                shutil.rmtree(path, ignore_errors=True)

    def _remove_unneeded(self) -> None:
        steps = complete_steps(self.folder)
        metrics = {step: _record(self._path(step))["metrics"] for step in steps}
        for step in set(steps) - kept_steps(metrics, self._settings):
            # Renamed first: a kill while it is deleted must not leave half a checkpoint.
            gone = self._path(step).with_suffix(_DELETED)
            self._path(step).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def complete_steps(folder: Path) -> list[int]:
    """Steps below WORKDIR/checkpoints that carry their commit marker, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    steps = [path for path in found if _STEP.fullmatch(path.name) and (path / RUN).is_file()]
    return sorted(int(path.name) for path in steps)


def kept_steps(
    metrics: Mapping[int, Mapping[str, float]], settings: CheckpointSettings
) -> set[int]:
    """Which of the steps stay: the last ones, every so many steps, and the best one."""
    kept = set(sorted(metrics)[-settings.keep_last :])
    if settings.keep_every:
        kept |= {step for step in metrics if step % settings.keep_every == 0}
    sign = 1 if settings.best_mode == "min" else -1
    scores = [
        (sign * values[settings.best_metric], step)
        for step, values in metrics.items()
        if math.isfinite(values.get(settings.best_metric, math.nan))
    ]
    return kept | {step for _, step in sorted(scores)[:1]}


class _StepHandler(ocp.CompositeCheckpointHandler):
    """Orbax's handler of several trees in a folder, which adds the files of meta/ at the end."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        names = ("params", "opt_state", "ema")
        super().__init__(**{name: ocp.PyTreeCheckpointHandler(use_zarr3=True) for name in names})
        self._files = files
        # Of the step being written:
        self.record: dict[str, bytes] = {}  # the last one is the commit marker
        self.started = 0.0

    def finalize(self, directory: Path) -> None:
        """Runs on the first process when all have written; the folder is renamed afterwards."""
        super().finalize(directory)
        directory = Path(directory)
        files = {f"meta/{name}": content for name, content in self._files.items()}
        for name, content in (files | self.record).items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        size = 0
        for path in (*directory.rglob("*"), directory):
            sync(path)
            size += path.stat().st_size
        seconds = time.monotonic() - self.started
        _LOG.info("%s: %.3f GB in %.1f s", directory.name.partition(".")[0], size / 1e9, seconds)


@ocp.args.register_with_handler(_StepHandler, for_save=True, for_restore=True)
class _StepArgs(ocp.args.Composite):
    """Trees that `_StepHandler` writes."""


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _contents(files: Mapping[str, bytes | Path]) -> dict[str, bytes]:
    """Reads them all: the folder that they come from may be gone when a step is saved."""
    contents, problems = {}, []
    for name, content in files.items():
        try:
            contents[name] = content if isinstance(content, bytes) else content.read_bytes()
        except OSError as error:
            problems.append(f"{content}: cannot be read ({error.strerror})")
    if problems:
        raise CheckpointError("\n  ".join(["files of the checkpoint:", *problems]))
    return contents


def _locked(folder: Path) -> Any:
    """Open lock file of the folder; the kernel frees it when its holder dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(
            f"{folder}: another run writes there; end it, or choose another --workdir"
        ) from None
    except OSError as error:  # e.g. Lustre mounted without flock
        _LOG.warning("%s: cannot be locked (%s); see to one run at a time", folder, error.strerror)
    return file


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
        version = record["format_version"]
        missing = [key for key in ("step", "metrics", "run") if key not in record]
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no complete checkpoint, lacks {RUN}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RUN}: not readable ({error})") from None
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format_version {version} of {RUN} is newer than this package's "
            f"{FORMAT_VERSION}; update st4vla_jax"
        )
    if missing:
        raise CheckpointError(f"{folder / RUN}: lacks {', '.join(missing)}")
    return record


def _is_full(error: BaseException) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota exceeded")
    return getattr(error, "errno", None) in numbers or any(text in str(error) for text in texts)
