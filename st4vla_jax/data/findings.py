"""What is often wrong with robot data, as checks over standardised episodes.

Each check returns sentences for a person; none means that nothing was found.  Actions are delta xyz
(m), delta roll-pitch-yaw (rad) and an absolute gripper, 1 = open (data/robot_spec.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from st4vla_jax.data.robot_spec import RobotSpec, StandardEpisode

_AXES = "xyz"
_MIN_STEPS = 20  # fewer say nothing about a correlation
_MIN_CORRELATION = 0.5  # below it, commands and motion say nothing about each other's units
_SCALE_RANGE = (0.7, 1.4)  # command over measured motion; controllers lag and undershoot
_DARK = 4.0  # grey levels: a lens cap, not a dark scene
_MOSTLY = 0.8


def gripper_findings(spec: RobotSpec, episodes: Sequence[StandardEpisode]) -> list[str]:
    """Range and sign of the binary dimensions."""
    found = []
    for dim in spec.gripper:
        runs = [episode.actions[:, dim] for episode in episodes if len(episode.actions)]
        if not runs:
            continue
        values, name = np.concatenate(runs), spec.names[dim]
        low, high = float(values.min()), float(values.max())
        if low < -0.01 or high > 1.01:
            found.append(
                f"{name} runs from {low:g} to {high:g}; expected 0 (closed) to 1 (open): add scale "
                "and offset, or another op, to its part of the spec"
            )
        elif low == high:
            found.append(f"{name} is {low:g} at every step")
        else:
            closed = np.mean([run[0] < 0.5 for run in runs])
            if closed > _MOSTLY:
                found.append(
                    f"{name} starts closed in {closed:.0%} of episodes: is its sign inverted? (1 = "
                    "open; op 'invert')"
                )
    return found


def motion_findings(spec: RobotSpec, episodes: Sequence[StandardEpisode]) -> list[str]:
    """Commanded xyz deltas against the measured change of the end effector's position."""
    if not spec.state_encoding.startswith("pos_") or spec.names[:3] != tuple(_AXES):
        return []
    moved, commands = [], []
    for episode in episodes:
        # A command shows in the next step's position, on slower robots one step later.
        if episode.state is not None and len(episode.actions) > 2:
            moved.append(np.diff(episode.state[:, :3], axis=0))
            commands.append(episode.actions[:-1, :3])
    if sum(map(len, moved)) < _MIN_STEPS:
        return []
    found = []
    for axis, name in enumerate(_AXES):
        lags = [_relation(moved, commands, axis, lag) for lag in (0, 1)]
        correlation, scale = max(lags, key=lambda r: abs(r[0]))
        if abs(correlation) < _MIN_CORRELATION:
            continue
        if scale < 0:
            found.append(f"{name} commands run against the measured motion: sign or frame differs")
        elif not _SCALE_RANGE[0] <= scale <= _SCALE_RANGE[1]:
            found.append(f"{name} commands are {scale:.2g} times the measured motion: other units?")
    return found


def _relation(
    moved: Sequence[np.ndarray], commands: Sequence[np.ndarray], axis: int, lag: int
) -> tuple[float, float]:
    """Correlation, and scale of commands over motion, with motion ``lag`` steps later."""
    x = np.concatenate([m[lag:, axis] for m in moved]).astype(np.float64)
    y = np.concatenate([c[: len(c) - lag, axis] for c in commands]).astype(np.float64)
    if x.std() < 1e-9 or y.std() < 1e-9:
        return 0.0, 1.0
    correlation = float(np.corrcoef(x, y)[0, 1])
    return correlation, float(np.sign(correlation) * y.std() / x.std())


def rate_findings(spec: RobotSpec, measured_hz: float | None) -> list[str]:
    """Control rate of the spec against that of the data, where the data knows it."""
    if measured_hz is None or abs(measured_hz - spec.control_hz) <= 0.05 * spec.control_hz:
        return []
    return [f"the data runs at {measured_hz:g} Hz, the spec says {spec.control_hz:g}"]


def camera_findings(images: Mapping[str, Sequence[np.ndarray]]) -> list[str]:
    """Cameras that show nothing, among u8[h,w,3] samples of each."""
    found = []
    for name, samples in images.items():
        brightest = max((float(image.mean()) for image in samples), default=0.0)
        if brightest < _DARK:
            found.append(
                f"camera {name} is black in all {len(samples)} images looked at (mean at most "
                f"{brightest:.1f} of 255)"
            )
        elif len(samples) > 1 and all(np.array_equal(samples[0], s) for s in samples[1:]):
            found.append(f"camera {name} shows the same image in all {len(samples)} looked at")
    return found


def duplicate_findings(episodes: Iterable[tuple[str, int]]) -> list[str]:
    """Episodes of equal content among (where it is, hash of its content) pairs."""
    places = defaultdict(list)
    for where, content in episodes:
        places[content].append(where)
    shared: dict[tuple[str, ...], int] = defaultdict(int)
    repeated: dict[str, int] = defaultdict(int)
    for where in places.values():
        if len(set(where)) > 1:
            shared[tuple(sorted(set(where)))] += 1
        for name in set(where):
            repeated[name] += where.count(name) - 1
    found = [
        f"{count} episodes are in each of {' and '.join(names)}: held out by split name they would "
        "be trained on; hold out by content (holdout)"
        for names, count in sorted(shared.items())
    ]
    found += [
        f"{count} episodes of {name} are repeats" for name, count in repeated.items() if count
    ]
    return found
