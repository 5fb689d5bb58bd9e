"""Single frames out of videos by PyAV: exactly the one asked for, however far keyframes lie apart.

Importing this module needs the ``lerobot`` extra (av).
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from st4vla_jax.data.source import BadRecordError

_OPEN = 8  # containers that each thread keeps open


@dataclasses.dataclass(frozen=True)
class FrameTable:
    """When the frames of a video are shown, in order.

    Attributes:
      pts: i64[F] presentation times, in units of time_base seconds.
      time_base: as the container states it.
      size: (height, width) in pixels.
    """

    pts: np.ndarray
    time_base: Fraction
    size: tuple[int, int]

    def nearest(self, seconds: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """Frames shown at given times.

        Args:
          seconds: f64[n] times in the video.
          tolerance: seconds; less than half a frame.

        Returns:
          i64[n] pts of the nearest frames, bool[n] whether they lie within the tolerance.
        """
        times = self.pts * float(self.time_base)
        right = np.minimum(np.searchsorted(times, seconds), len(times) - 1)
        left = np.maximum(right - 1, 0)
        choice = np.where(seconds - times[left] <= times[right] - seconds, left, right)
        return self.pts[choice], np.abs(times[choice] - seconds) <= tolerance


def frame_table(path: Path) -> FrameTable:
    """Reads the packets' times without decoding.

    Raises:
      BadRecordError: not a video.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            pts = [p.pts for p in container.demux(stream) if p.pts is not None]
            size = stream.codec_context.height, stream.codec_context.width
            if not pts:
                raise BadRecordError(f"{path}: a video without frames")
            return FrameTable(np.sort(np.array(pts, np.int64)), stream.time_base, size)
    except (av.FFmpegError, IndexError) as e:
        raise BadRecordError(f"{path}: not a readable video ({e})") from e


class VideoReader:
    """Reads frames by presentation time; thread-safe: each thread has its own open containers."""

    def __init__(self) -> None:
        self._local = threading.local()

    def frame(self, path: Path, pts: int) -> np.ndarray:
        """The frame that is shown at exactly ``pts``.

        Args:
          path: the video.
          pts: one of `FrameTable.pts`.

        Returns:
          u8[h,w,3] RGB.

        Raises:
          BadRecordError: the frame does not decode.
          OSError: the file cannot be read.
        """
        try:
            frame = _frame_at(self._container(path), pts)
        except OSError:  # may be tried again, with the file opened anew
            self._drop(path)
            raise
        except av.FFmpegError as e:
            self._drop(path)
            raise BadRecordError(f"{path}: the frame at pts {pts} does not decode ({e})") from e
        if frame is None:
            self._drop(path)
            raise BadRecordError(f"{path}: no frame at pts {pts} decodes; is the video truncated?")
        return frame.to_ndarray(format="rgb24")

    def _container(self, path: Path) -> Any:
        containers = self._local.__dict__.setdefault("containers", collections.OrderedDict())
        if path not in containers:
            if len(containers) == _OPEN:
                containers.popitem(last=False)[1].close()
            containers[path] = container = av.open(str(path))
            # The reader threads are the parallelism; dav1d would start its own for each video.
            container.streams.video[0].codec_context.thread_count = 1
        containers.move_to_end(path)
        return containers[path]

    def _drop(self, path: Path) -> None:
        container = self._local.__dict__.get("containers", {}).pop(path, None)
        if container is not None:
            container.close()


def _frame_at(container: Any, pts: int) -> Any:
    """The frame with these pts, or None: decoded from the keyframe before it."""
    stream = container.streams.video[0]
    # Seeking goes by decoding time.  In an open group of pictures the keyframe found may be shown
    # after the frame that is sought, so the second try starts at the beginning.
    for start in (pts, stream.start_time or 0):
        container.seek(start, stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts == pts:
                return frame
            if frame.pts is not None and frame.pts > pts:
                break
    return None
