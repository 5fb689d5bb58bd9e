"""Synthetic samples with the lengths of the real mixture, for benchmarks where no data travels.

Lengths under the paper's settings: one 224x224 view, Qwen2.5-VL's tokenizer, the paper's prompt,
grounding images of at most 50,176 pixels.  Robot samples: all steps of the Bridge V2 episodes in
../shared.  Grounding: questions of the LLaVA demo, and box, point and trajectory records after the
protocols of RefCOCO, RoboPoint and A0.  tests/reference/mixture.py measures them; a test compares.
Kinds are drawn with the shares of the paper's stage-1 data (637 K, 879 K, 832 K and 684 K samples).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from st4vla_jax.batch import Batch
from st4vla_jax.config import ModelConfig
from st4vla_jax.data.image import arrange
from st4vla_jax.data.layout import COSTS, lay_out
from st4vla_jax.data.packing import Capacity, RobotArrays, Row, pack
from st4vla_jax.data.transforms import Encoded, of_tokens

Packed = tuple[Encoded, RobotArrays | None]

VIEW = 224  # pixels a side of a robot's view
CELL = 28
LEAD = 15  # tokens before the image: system turn, opening of the user turn, start of the image

# Tokens without the image's cells -> samples.
ROBOT = {44: 64, 45: 48, 47: 40, 49: 48}
# Kind -> (share, records of (height, width after smart_resize, tokens without cells, targets)).
GROUNDING = {
    "question": (637, ((196, 224, 40, 3), (196, 224, 38, 3), (196, 224, 37, 6))),
    "box": (879, (
        (168, 252, 73, 39), (252, 168, 76, 42), (168, 252, 80, 43), (252, 168, 84, 45),
        (168, 252, 87, 46), (168, 252, 78, 42), (168, 252, 81, 44), (252, 168, 100, 54),
        (168, 252, 77, 42), (252, 168, 84, 45), (168, 252, 90, 48), (168, 252, 75, 41),
    )),
    "point": (832, (
        (168, 252, 112, 29), (252, 168, 116, 35), (168, 252, 130, 46), (252, 168, 138, 59),
        (168, 252, 150, 69), (168, 252, 156, 76),
    )),
    "trajectory": (684, (
        (168, 252, 115, 74), (168, 252, 100, 66), (168, 252, 104, 69), (168, 252, 115, 75),
        (168, 252, 112, 73), (168, 252, 107, 70),
    )),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Draws samples that fit a model.

    Attributes:
      cfg: gives vocabulary, chunk, action dimensions and DINOv2's image size.
      seed: of everything.
      scale: of all image sides and token counts (tests: below 1).
    """

    cfg: ModelConfig
    seed: int = 0
    scale: float = 1.0

    def draw(self, robot: int, grounding: int) -> list[Packed]:
        """That many samples of each, robot samples first."""
        rng = np.random.default_rng(self.seed)
        texts, counts = np.array(list(ROBOT)), np.array(list(ROBOT.values()))
        lengths = rng.choice(texts, robot, p=counts / counts.sum())
        samples = [self._robot(int(n), rng) for n in lengths]
        shares = np.array([share for share, _ in GROUNDING.values()], float)
        kinds = rng.choice(list(GROUNDING), grounding, p=shares / shares.sum())
        for kind in kinds:
            records = GROUNDING[kind][1]
            height, width, text, targets = records[rng.integers(len(records))]
            samples.append((self._encoded(height, width, text, targets, rng), None))
        return samples

    def _robot(self, text: int, rng: np.random.Generator) -> Packed:
        dit, side = self.cfg.dit, self.cfg.dino.image_size
        shape = (dit.chunk, dit.action_dim)
        return self._encoded(VIEW, VIEW, text, 0, rng), RobotArrays(
            dino_images=rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8),
            view_mask=np.ones(1, bool),
            state=None,
            actions=rng.uniform(-1, 1, shape).astype(np.float32),
            action_mask=np.ones(shape, bool),
        )

    def _encoded(
        self, height: int, width: int, text: int, targets: int, rng: np.random.Generator
    ) -> Encoded:
        """One image after LEAD tokens; the last ``targets`` tokens are supervised."""
        height, width = (max(1, round(n * self.scale / CELL)) * CELL for n in (height, width))
        lead, targets = (round(n * self.scale) for n in (LEAD, targets))
        text = max(round(text * self.scale), lead + targets + 1)
        cells = height * width // CELL**2
        is_image = np.zeros(text + cells, bool)
        is_image[lead : lead + cells] = True
        # The last ids are special: padding and image placeholders.
        tokens = rng.integers(0, self.cfg.text.vocab_size - 16, text + cells).astype(np.int32)
        slots = arrange([rng.integers(0, 256, (height, width, 3), dtype=np.uint8)])
        return of_tokens(tokens, is_image, slots, np.arange(len(tokens) - targets, len(tokens)))


def pad_id(cfg: ModelConfig) -> int:
    """The token id of padding, which no sample has."""
    return cfg.text.vocab_size - 5


def packed_batch(cfg: ModelConfig, samples: list[Packed], tokens: int = 0) -> Batch:
    """Samples side by side, laid out as training's schedule does.

    Args:
      cfg: the model's.
      samples: from `Mixture.draw`.
      tokens: T; 0 takes the multiple of 64 up to 1024 whose padding costs least (data/layout.py).
    """
    room, rows = _rows(samples, tokens)
    return pack(rows, _capacity(rows, room), pad_id=pad_id(cfg))


def split_batch(cfg: ModelConfig, samples: list[Packed], tokens: int = 0) -> tuple[Batch, int]:
    """The same with rows of robot samples first, then rows of grounding samples.

    Returns:
      the batch, and its number of robot rows.
    """
    room, _ = _rows(samples, tokens)
    kinds = [[s for s in samples if (s[1] is None) == grounding] for grounding in (False, True)]
    robot, grounding = (_rows(kind, room)[1] for kind in kinds)
    rows = robot + grounding
    return pack(rows, _capacity(rows, room), pad_id=pad_id(cfg)), len(robot)


def _capacity(rows: list[Row], tokens: int) -> Capacity:
    return dataclasses.replace(Capacity.fit(rows), tokens=tokens)


def _rows(samples: list[Packed], tokens: int) -> tuple[int, list[Row]]:
    """(T, rows); see `packed_batch`."""
    sizes = np.array([_size(sample, robot) for sample, robot in samples], np.int64)
    longest = int(-(-sizes[:, 0].max() // 64) * 64)
    layouts = {}
    for room in [tokens] if tokens else range(longest, max(longest, 1024) + 1, 64):
        layouts[room] = lay_out(sizes, 1 - sizes[:, 3], 1, np.array([room, 0, 0, 0]))
    room = min(layouts, key=lambda t: layouts[t].sequences * (COSTS @ layouts[t].capacity))
    layout = layouts[room]
    return room, [
        [samples[i] for i in np.flatnonzero(layout.row == row)] for row in range(layout.sequences)
    ]


def padded_batch(cfg: ModelConfig, samples: list[Packed]) -> Batch:
    """One sample a row, all padded to the longest: no packing."""
    rows: list[Row] = [[sample] for sample in samples]
    return pack(rows, Capacity.fit(rows), pad_id=pad_id(cfg))


def with_all_logits(batch: Batch) -> Batch:
    """The same batch and loss, but with logits of every position, as peers compute them."""
    vlm = batch.vlm
    rows, length = vlm.tokens.shape
    everywhere = np.arange(length, dtype=np.int32)[None].repeat(rows, 0)
    targets, weight = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
    for row in range(rows):
        used = vlm.target_weight[row] > 0
        targets[row, vlm.target_index[row, used]] = vlm.targets[row, used]
        weight[row, vlm.target_index[row, used]] = vlm.target_weight[row, used]
    vlm = vlm.replace(
        target_index=everywhere, targets=targets, target_weight=weight,
        target_group=np.zeros((rows, length), np.int32),
    )  # fmt: skip
    return batch.replace(vlm=vlm)


def _size(sample: Encoded, robot: RobotArrays | None) -> tuple[int, int, int, int]:
    return (
        len(sample.tokens),
        len(sample.slots.patches),
        len(sample.targets),
        int(robot is not None),
    )


def padding(batch: Batch) -> dict[str, float]:
    """Share of a batch's slots that hold nothing, by kind."""
    shares = {
        "tokens": 1 - float(np.mean(batch.vlm.segment_ids > 0)),
        "patches": 1 - float(np.mean(batch.vlm.patch_image > 0)),
        "targets": 1 - float(np.mean(batch.vlm.target_weight > 0)),
    }
    if batch.action is not None:
        shares["robot"] = 1 - float(np.mean(batch.action.valid))
    return shares
