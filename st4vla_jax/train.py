"""Trains a policy: both stages and every ablation.

python -m st4vla_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]

The same command goes on where an interrupted run stopped.  Exit status: 0 when the last step is
done, 75 when a signal stopped it after saving (launchers run the command again), 1 with a message
when something has to be mended first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from st4vla_jax import distributed
from st4vla_jax.checkpoint import CheckpointError, git_revision
from st4vla_jax.config import ConfigError
from st4vla_jax.data.members import ScheduleError
from st4vla_jax.data.reading import ReadError
from st4vla_jax.data.settings import SettingsError
from st4vla_jax.data.source_files import SourceError
from st4vla_jax.eval.actions import HeldOutError
from st4vla_jax.eval.pss import ProbeError
from st4vla_jax.replay import replay
from st4vla_jax.resume import flat_record
from st4vla_jax.train_config import TrainConfig
from st4vla_jax.train_lib import Run, TrainingError
from st4vla_jax.train_setup import RunFlags, Setup, prepare
from st4vla_jax.train_start import RecompilationError

_CONFIG = config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_DATA_CHANGE = flags.DEFINE_bool("allow_data_change", False, "go on with other data")
_RESTART = flags.DEFINE_bool("restart_optimizer", False, "go on with a new optimizer")
_OVERFIT = flags.DEFINE_bool("overfit_one_batch", False, "train on the first batch alone")
_PROFILE = flags.DEFINE_string("profile", None, "steps to trace, FIRST:LAST")
_REPLAY = flags.DEFINE_integer(
    "replay", None, "rebuild and run the update after this step; writes no state", lower_bound=0
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "processes of this run")
_PROCESS = flags.DEFINE_integer("process_id", None, "number of this process")

ERRORS = (
    ConfigError,
    CheckpointError,
    ReadError,
    TrainingError,
    RecompilationError,
    HeldOutError,
    ScheduleError,
    SettingsError,
    SourceError,
    ProbeError,
    distributed.DistributedError,
)


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every file that it writes
    try:
        distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        with distributed.ending_together(ERRORS):
            return _train()
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _train() -> int:
    """From flags to the end of the run; returns the exit status."""
    profile = _profile(_PROFILE.value)
    stop = distributed.Preemption()
    config = TrainConfig.from_dict(_CONFIG.value)
    if "://" in _WORKDIR.value:
        raise ConfigError(
            f"--workdir={_WORKDIR.value} is no folder: mount the bucket and give its path"
        )
    workdir = Path(_WORKDIR.value).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    distributed.check_shared_folder(workdir)
    use_compile_cache(config.log.cache_dir, workdir)
    switches = RunFlags(_DATA_CHANGE.value, _RESTART.value, _OVERFIT.value)
    setup = prepare(config, workdir, switches)
    agree(setup)
    if _REPLAY.value is not None:
        return replay(setup, _REPLAY.value)
    return Run(setup, stop, profile).train()


def use_compile_cache(folder: str, workdir: Path) -> None:
    """Lets compiled programs be found again by the next start, on by default."""
    if folder == "none":
        return
    jax.config.update("jax_compilation_cache_dir", folder or str(workdir / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def agree(setup: Setup) -> None:
    """Raises DistributedError where processes would train different things."""
    config = flat_record(dict(setup.config.tree), "config")
    distributed.check_agreement({
        **{key: json.dumps(value) for key, value in config},
        "code": git_revision() or "unknown",
        "data": setup.pipeline.fingerprint,
        "step": str(setup.resume_step),
        "flags": f"{setup.flags} replay={_REPLAY.value} profile={_PROFILE.value}",
        "mesh": str(dict(setup.mesh.shape)),
        "jax": jax.__version__,
    })  # fmt: skip


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        first, last = (int(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"--profile={text}: give FIRST:LAST, two step numbers") from None
    if not 0 <= first <= last:
        raise ConfigError(f"--profile={text}: the first step is after the last")
    return first, last


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main)
