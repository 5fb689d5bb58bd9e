"""Samples side by side in rows of fixed capacity: the numpy `Batch` (DESIGN.md D2, section 5).

Which sample goes to which row is decided elsewhere (the batch schedule); here nothing is moved,
and nothing is ever cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from st4vla_jax.batch import VISION_BIN, ActionInputs, Batch, VlmInputs
from st4vla_jax.data.transforms import Encoded

CELL_SLOTS = 4  # slots of one merged cell: 2x2 patches


class PackingError(ValueError):
    """Rows that do not fit; lists every overflow and disagreement."""


@dataclasses.dataclass(frozen=True)
class RobotArrays:
    """The action side of one packed robot sample, already normalised.

    Attributes:
      dino_images: u8[v,h,w,3] RGB views, v <= V; view_mask: bool[v].
      state: f32[S] proprioception, or None.
      actions: f32[C,A]; action_mask: bool[C,A].
      embodiment: number of the statistics, for metrics; group: number of the data set, likewise.
    """

    dino_images: np.ndarray
    view_mask: np.ndarray
    state: np.ndarray | None
    actions: np.ndarray
    action_mask: np.ndarray
    embodiment: int = 0
    group: int = 0


Row = Sequence[tuple[Encoded, RobotArrays | None]]


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What one row holds (legend in batch.py).

    Attributes:
      tokens: T; slots: P, a multiple of 64; targets: M, 0 without next-token loss.
      robot: K, 0 without actions; sample_tokens: L; views: V.
    """

    tokens: int
    slots: int
    targets: int = 0
    robot: int = 0
    sample_tokens: int = 0
    views: int = 0

    def __post_init__(self) -> None:
        if self.slots % VISION_BIN:
            raise PackingError(f"capacity.slots {self.slots} is not a multiple of {VISION_BIN}")

    @classmethod
    def fit(cls, rows: Sequence[Row], token_multiple: int = 1) -> Capacity:
        """The smallest capacity that holds ``rows``, tokens rounded up to ``token_multiple``."""
        if not rows:
            raise PackingError("no rows to fit")
        used = np.max([_usage(row) for row in rows], axis=0)
        tokens = -(-used[0] // token_multiple) * token_multiple
        return cls(int(tokens), *(int(n) for n in used[1:]))


def _usage(row: Row) -> tuple[int, ...]:
    """What a row takes, in the order of Capacity's fields."""
    robots = [(sample, robot) for sample, robot in row if robot is not None]
    return (
        sum(len(sample.tokens) for sample, _ in row),
        sum(len(sample.slots.patches) for sample, _ in row),
        sum(len(sample.targets) for sample, _ in row),
        len(robots),
        max((len(sample.tokens) for sample, _ in robots), default=0),
        max((len(robot.dino_images) for _, robot in robots), default=0),
    )


def pack(
    rows: Sequence[Row],
    capacity: Capacity,
    *,
    pad_id: int,
    pad_robot_tokens_at_padding: bool = False,
    like: RobotArrays | None = None,
) -> Batch:
    """Packs rows of samples into one numpy batch.

    Args:
      rows: B rows of (sample, its action side or None).
      capacity: sizes of a row; every row must fit.
      pad_id: token id of padding.
      pad_robot_tokens_at_padding: unused entries of ``token_index`` point at the row's first
        padding token instead of token 0, so that a bridge with ``mask_padding=False`` attends to
        hidden states of padding, as upstream does; needs padding in each row with such entries.
      like: gives the shapes of robot slots when no row holds a robot sample (a batch whose only
        robot record turned out bad), so that the compiled step still fits.

    Returns:
      Batch; its ``action`` is None if ``capacity.robot`` is 0.

    Raises:
      PackingError: every overflow and every disagreement between robot samples.
    """
    if not rows:
        raise PackingError("no rows to pack")
    problems = list(_overflows(rows, capacity))
    if pad_robot_tokens_at_padding:
        problems += _missing_padding(rows, capacity)
    robots = [robot for row in rows for _, robot in row if robot is not None]
    if capacity.robot:
        problems += _robot_problems(robots, like)
    if problems:
        raise PackingError("samples do not fit:\n  " + "\n  ".join(problems))
    vlm = _pack_vlm(rows, capacity, pad_id)
    if not capacity.robot:
        return Batch(vlm=vlm)
    example = robots[0] if robots else like
    return Batch(vlm, _pack_action(rows, capacity, example, pad_robot_tokens_at_padding))


def _overflows(rows: Sequence[Row], capacity: Capacity) -> Iterator[str]:
    for number, row in enumerate(rows):
        for field, used in zip(dataclasses.fields(Capacity), _usage(row), strict=True):
            room = getattr(capacity, field.name)
            # Without robot slots nothing about robots is needed but that there be none.
            idle = field.name in ("sample_tokens", "views") and not capacity.robot
            if used > room and not idle:
                yield f"row {number} needs {field.name} {used}, capacity.{field.name} is {room}"


def _missing_padding(rows: Sequence[Row], capacity: Capacity) -> Iterator[str]:
    for number, row in enumerate(rows):
        used, *_, longest, _ = _usage(row)
        short = any(len(s.tokens) < capacity.sample_tokens for s, r in row if r is not None)
        if longest and short and used == capacity.tokens:
            yield f"row {number} has no padding token for pad_robot_tokens_at_padding to point at"


def _robot_problems(robots: Sequence[RobotArrays], like: RobotArrays | None) -> list[str]:
    """Robot samples of one batch must share all shapes but the number of views."""
    if not robots and like is None:
        return [
            "capacity.robot > 0, but there is no robot sample and no `like` to take shapes from"
        ]
    samples = [*robots, *([like] if like else [])]
    shapes = {
        "views": {robot.dino_images.shape[1:] for robot in samples},
        "state": {None if robot.state is None else robot.state.shape for robot in samples},
        "actions": {robot.actions.shape for robot in samples},
    }
    problems = [
        f"robot samples disagree on the shape of {name}: {', '.join(sorted(map(str, found)))}"
        for name, found in shapes.items()
        if len(found) > 1
    ]
    for number, robot in enumerate(robots):
        masks = robot.view_mask.shape, robot.action_mask.shape
        if masks != (robot.dino_images.shape[:1], robot.actions.shape):
            problems.append(
                f"robot sample {number}: view_mask and action_mask of shapes {masks}, expected "
                f"{(robot.dino_images.shape[:1], robot.actions.shape)}"
            )
    return problems


def _pack_vlm(rows: Sequence[Row], capacity: Capacity, pad_id: int) -> VlmInputs:
    batch = len(rows)
    tokens, slots, targets = (
        (batch, n) for n in (capacity.tokens, capacity.slots, capacity.targets)
    )
    out = VlmInputs(
        tokens=np.full(tokens, pad_id, np.int32),
        positions=np.zeros((*tokens, 3), np.int32),
        segment_ids=np.zeros(tokens, np.int32),
        patches=np.zeros((*slots, 588), np.uint8),
        patch_hw=np.zeros((*slots, 2), np.int32),
        patch_image=np.zeros(slots, np.int32),
        patch_window=np.zeros(slots, np.int32),
        vision_index=np.full(tokens, -1, np.int32),
        target_index=np.zeros(targets, np.int32),
        targets=np.zeros(targets, np.int32),
        target_weight=np.zeros(targets, np.float32),
        target_group=np.zeros(targets, np.int32),
    )
    for b, row in enumerate(rows):
        token = slot = target = image = window = 0
        for segment, (sample, _) in enumerate(row, start=1):
            t = np.s_[b, token : token + len(sample.tokens)]
            out.tokens[t] = sample.tokens
            out.positions[t] = sample.positions
            out.segment_ids[t] = segment
            cell = sample.vision_index + slot // CELL_SLOTS
            out.vision_index[t] = np.where(sample.vision_index >= 0, cell, -1)

            own = sample.slots
            p = np.s_[b, slot : slot + len(own.patches)]
            out.patches[p] = own.patches
            out.patch_hw[p] = own.patch_hw
            out.patch_image[p] = np.where(own.patch_image, own.patch_image + image, 0)
            out.patch_window[p] = np.where(own.patch_window, own.patch_window + window, 0)

            m = np.s_[b, target : target + len(sample.targets)]
            out.target_index[m] = sample.target_index + token
            out.targets[m] = sample.targets
            out.target_weight[m] = sample.target_weight
            out.target_group[m] = sample.group

            token += len(sample.tokens)
            slot += len(own.patches)
            target += len(sample.targets)
            image += len(own.grids)
            window = max(window, out.patch_window[p].max(initial=0))
    return out


def _pack_action(
    rows: Sequence[Row], capacity: Capacity, example: RobotArrays, pad_at_padding: bool
) -> ActionInputs:
    slots = (len(rows), capacity.robot)
    index = (*slots, capacity.sample_tokens)
    views = (*slots, capacity.views)
    has_state = example.state is not None
    out = ActionInputs(
        token_index=np.zeros(index, np.int32),
        token_mask=np.zeros(index, bool),
        dino_images=np.zeros((*views, *example.dino_images.shape[1:]), np.uint8),
        view_mask=np.zeros(views, bool),
        state=np.zeros((*slots, *example.state.shape), np.float32) if has_state else None,
        actions=np.zeros((*slots, *example.actions.shape), np.float32),
        action_mask=np.zeros((*slots, *example.actions.shape), bool),
        valid=np.zeros(slots, bool),
        embodiment=np.zeros(slots, np.int32),
        sample_group=np.zeros(slots, np.int32),
    )
    for b, row in enumerate(rows):
        starts = np.cumsum([0, *(len(sample.tokens) for sample, _ in row)])
        robots = [(s, *pair) for s, pair in zip(starts, row, strict=False) if pair[1] is not None]
        if pad_at_padding and starts[-1] < capacity.tokens:
            out.token_index[b] = starts[-1]
        for k, (start, sample, robot) in enumerate(robots):
            length, num_views = len(sample.tokens), len(robot.dino_images)
            out.token_index[b, k, :length] = start + np.arange(length)
            out.token_mask[b, k, :length] = True
            out.dino_images[b, k, :num_views] = robot.dino_images
            out.view_mask[b, k, :num_views] = robot.view_mask
            if has_state:
                out.state[b, k] = robot.state
            out.actions[b, k] = robot.actions
            out.action_mask[b, k] = robot.action_mask
            out.valid[b, k] = True
            out.embodiment[b, k] = robot.embodiment
            out.sample_group[b, k] = robot.group
    return out
