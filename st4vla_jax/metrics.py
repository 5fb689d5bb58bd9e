"""Where a run's numbers go: metrics.jsonl always, TensorBoard event files, Weights & Biases.

What is written at step s is known when s updates are done, and before their checkpoint is complete.
A run that resumes from the checkpoint of step s does the later updates again, so what an
interrupted run had written of them is dropped first: the file of a resumed run equals an
uninterrupted one's but for what `is_wall_clock`.

Event files are written without TensorFlow: TFRecord framing (data/tfrecord.py) around hand-coded
protobufs (tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto).
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import logging
import math
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st4vla_jax.data.tfrecord import masked_crc32c

METRICS_FILE = "metrics.jsonl"
OLD_METRICS_FILE = "metrics.old.jsonl"
EVENT_FOLDER = "tensorboard"
IMAGE_FOLDER = "images"
WANDB_ID_FILE = "wandb_run_id.txt"

_WALL_CLOCK = (
    "time",
    "time/",
    "data/wait",
    "goodput",
    "memory/",
    "rate/",
    "mfu",
    "data/bad_records",
)
_LOG = logging.getLogger(__name__)


def is_wall_clock(name: str) -> bool:
    """Whether a metric depends on the machine's speed or memory, not on the computation alone."""
    return any(
        name.startswith(w) if w.endswith("/") else name == w or name.startswith(f"{w}/")
        for w in _WALL_CLOCK
    )


@dataclasses.dataclass(frozen=True)
class WandbSettings:
    """Arguments of wandb.init; ``mode`` is "online" or "offline", ``config`` the run's config."""

    project: str = "st4vla_jax"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    mode: str = "online"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class MetricWriter:
    """Writes the metrics of one run; every process has one, only process 0 writes."""

    def __init__(
        self,
        workdir: Path | str,
        *,
        process_index: int,
        first_step: int = 0,
        wandb: WandbSettings | None = None,
        tensorboard: bool = True,
    ) -> None:
        """Opens the files of a new or resumed run.

        Args:
          workdir: folder of the run, created if need be.
          process_index: of this process.
          first_step: updates that are done, of the checkpoint that the run resumes from; what is
            there of later ones is dropped.  0: nothing is done, the run begins anew.
          wandb: None leaves it out.  Without the package, or where it does not start, a warning is
            logged and the run goes on (offline if that can be had).
          tensorboard: False writes no event files.

        Raises:
          OSError: the folder cannot be written.
        """
        self._file = self._events = self._wandb = None
        if process_index:
            return
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        drop_steps(self._workdir / METRICS_FILE, first_step)
        self._file = (self._workdir / METRICS_FILE).open("a", encoding="utf-8")
        if tensorboard:
            self._events = EventFile(self._workdir / EVENT_FOLDER, first_step)
        if wandb is not None:
            self._wandb = _start_wandb(self._workdir, wandb)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, complete on return even if the process is killed then.

        JSON has no NaN and null would not tell NaN from infinity, so numbers that are not finite
        are written as the strings "NaN", "Infinity" and "-Infinity"; `read_metrics` and Python's
        float() read them.

        Args:
          step: updates that are done.
          metrics: area/name to a number (a Python, numpy or concrete jax scalar).

        Raises:
          ValueError: a value is no scalar, or a name is that of the line's own fields.
        """
        if self._file is None:
            return
        values = _scalars(metrics)
        now = time.time()
        line = {"step": int(step), "time": round(now, 3)}
        line |= {name: _json_number(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.scalars(step, values, now)
        if self._wandb is not None:
            self._wandb.log({"step": int(step), **values})

    def text(self, step: int, name: str, text: str) -> None:
        """A text for TensorBoard (as Markdown) and wandb; not in metrics.jsonl."""
        if self._events is not None:
            self._events.text(step, name, text)
        if self._wandb is not None:
            from wandb import Html

            self._wandb.log({"step": int(step), name: Html(f"<pre>{html.escape(text)}</pre>")})

    def image(self, step: int, name: str, image: Image.Image | np.ndarray) -> Path | None:
        """A picture (PIL or u8[h,w,3]) as a PNG file in the run's folder, TensorBoard and wandb.

        Returns:
          the PNG file; None on processes that do not write.
        """
        if self._file is None:
            return None
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        file_name = re.sub(r"[^\w.-]+", "_", name)
        path = self._workdir / IMAGE_FOLDER / f"{file_name}_{step}.png"
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        _replace(path, buffer.getvalue())
        if self._events is not None:
            self._events.image(step, name, picture.size, buffer.getvalue())
        if self._wandb is not None:
            from wandb import Image as WandbImage

            self._wandb.log({"step": int(step), name: WandbImage(picture)})
        return path

    def close(self) -> None:
        """Ends all files; a second call does nothing."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._events = self._wandb = None


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    values, problems = {}, []
    for name, value in metrics.items():
        if name in ("step", "time"):
            problems.append(f"{name!r} is a field of every line; call the metric area/name")
        elif np.ndim(value):
            problems.append(f"{name!r} has shape {np.shape(value)}; give one number")
        else:
            values[name] = float(value)
    if problems:
        raise ValueError("metrics: " + "; ".join(problems))
    return values


# --- metrics.jsonl ------------------------------------------------------------------------------


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_metrics(workdir: Path | str) -> list[dict[str, float]]:
    """Every line of a run's metrics.jsonl, "NaN" and the infinities as floats.

    Raises:
      OSError: there is no such file.
      ValueError: a line that is not JSON, but for a last one that was cut off.
    """
    path = Path(workdir) / METRICS_FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last end is cut
    try:
        return [
            {k: float(v) if k != "step" else v for k, v in json.loads(x).items()} for x in lines
        ]
    except ValueError as error:
        raise ValueError(f"{path}: not JSON lines ({error})") from error


def drop_steps(path: Path, first_step: int) -> None:
    """Drops, at once, the lines of more updates than ``first_step``, and what is no whole line.

    Of 0 all lines go, since no checkpoint stands behind them; the file is then kept under
    OLD_METRICS_FILE, as it may be all that is left of a run.  A process killed at any moment leaves
    either the old file or the new one.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    lines = data.splitlines(True)
    kept = [line for line in lines if _step_of(line) <= first_step] if first_step else []
    if len(kept) == len(lines):
        return
    _LOG.info("%s: %d lines of later steps dropped", path, len(lines) - len(kept))
    if kept:
        _replace(path, b"".join(kept))
    else:
        path.replace(path.with_name(OLD_METRICS_FILE))


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for one that was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# --- TensorBoard --------------------------------------------------------------------------------

_DT_STRING = 7  # tensorflow/core/framework/types.proto
_SESSION_START = 1  # SessionLog.START
_RGB = 3  # Summary.Image.colorspace


def frame_record(data: bytes) -> bytes:
    """One TFRecord: length, its masked CRC-32C, the data, its masked CRC-32C."""
    length = struct.pack("<Q", len(data))
    crcs = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(crcs) + data + next(crcs)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # a negative int64 takes ten bytes
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _float_field(number: int, value: float) -> bytes:
    with np.errstate(over="ignore"):  # beyond f32 is infinite
        return _varint(number << 3 | 5) + np.float32(value).tobytes()


class EventFile:
    """One TensorBoard event file of a process."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begins a file; viewers drop what older ones say of more updates than ``first_step``."""
        folder.mkdir(parents=True, exist_ok=True)
        # Named after the time, since viewers read the files of a run in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._event(_bytes_field(3, "brain.Event:2"), 0)
        dropped = first_step + 1 if first_step else 0
        self._event(_bytes_field(7, _int_field(1, _SESSION_START)), dropped)

    def scalars(self, step: int, values: Mapping[str, float], now: float | None = None) -> None:
        """One event with a value a tag, rounded to f32 as the format has it."""
        parts = [_bytes_field(1, tag) + _float_field(2, value) for tag, value in values.items()]
        self._summary(step, parts, now)

    def image(self, step: int, tag: str, size: tuple[int, int], png: bytes) -> None:
        """An encoded picture of ``size`` (width, height)."""
        width, height = size
        picture = _int_field(1, height) + _int_field(2, width) + _int_field(3, _RGB)
        picture += _bytes_field(4, png)
        self._summary(step, [_bytes_field(1, tag) + _bytes_field(4, picture)])

    def text(self, step: int, tag: str, text: str) -> None:
        """A string tensor of one element for the text plugin."""
        metadata = _bytes_field(1, _bytes_field(1, "text"))
        shape = _bytes_field(2, _int_field(1, 1))
        tensor = _int_field(1, _DT_STRING) + _bytes_field(2, shape) + _bytes_field(8, text)
        self._summary(step, [_bytes_field(1, tag) + _bytes_field(9, metadata)
                             + _bytes_field(8, tensor)])  # fmt: skip

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _summary(self, step: int, values: Sequence[bytes], now: float | None = None) -> None:
        self._event(_bytes_field(5, b"".join(_bytes_field(1, v) for v in values)), step, now)

    def _event(self, what: bytes, step: int, now: float | None = None) -> None:
        wall_time = b"\x09" + struct.pack("<d", time.time() if now is None else now)
        self._file.write(frame_record(wall_time + _int_field(2, step) + what))
        self._file.flush()


# --- Weights & Biases ---------------------------------------------------------------------------


def _start_wandb(workdir: Path, settings: WandbSettings) -> Any:
    """A run with the id kept in the workdir, so that a resumed run continues it; or None."""
    try:
        import wandb
    except ImportError:
        _LOG.warning("wandb is not installed (pip install wandb); metrics go to %s", workdir)
        return None
    id_file = workdir / WANDB_ID_FILE
    if not id_file.exists():
        _replace(id_file, uuid.uuid4().hex[:12].encode())
    arguments = dataclasses.asdict(settings) | {
        "id": id_file.read_text().strip(), "resume": "allow", "dir": str(workdir),
    }  # fmt: skip
    for mode in dict.fromkeys((settings.mode, "offline")):
        try:
            run = wandb.init(**{**arguments, "mode": mode})
        except wandb.Error as error:
            _LOG.warning("wandb does not start (mode %s): %s", mode, error)
            continue
        # Its own step may not go back; ours does when a run resumes.
        run.define_metric("*", step_metric="step")
        return run
    return None
