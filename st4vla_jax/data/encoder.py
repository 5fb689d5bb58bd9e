"""A `Sample` to arrays, and its length without reading its images.

Both sides live here so that what the index promises is what the batch takes: a source's length
table comes from `robot_lengths` or `conversation_lengths`, its samples from `__call__`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from st4vla_jax.data.answers import has_literal, longest_turns, render_turns
from st4vla_jax.data.image import (
    ImageConfig,
    ImageError,
    num_cells,
    num_slots,
    smart_resize,
)
from st4vla_jax.data.normalize import ActionSpec, Statistics, StatisticsError
from st4vla_jax.data.packing import RobotArrays
from st4vla_jax.data.prompts import PromptConfig, PromptError, chat_text, robot_turns
from st4vla_jax.data.source import BadRecordError, Lengths, Region, RobotStep, Sample, Turn
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.data.transforms import (
    Encoded,
    dino_views,
    encode,
    encode_robot,
    sized_views,
    tokenize,
)

if TYPE_CHECKING:
    from st4vla_jax.data.augment import Augment

# Length of a sample that cannot be encoded at all: it fits no sequence, so it leaves the kept set
# (counted and named) like one that is too long.
UNUSABLE = int(np.iinfo(np.int32).max)

Size = tuple[int, int]  # height, width in pixels


@dataclasses.dataclass(frozen=True)
class SampleEncoder:
    """Everything between a raw sample and the arrays that `packing.pack` takes.

    One encoder has one prompt; a data set with paraphrases has one encoder for each of them.

    Attributes:
      tokenizer: Qwen's or the byte-level one.
      prompt: of robot samples; ``prompts.TEMPLATES["none"]`` turns the spatial prompt off.
      image_config: sizes that views are brought to; its fixed ``size`` is for robots' views only:
        grounding images keep their aspect ratio, as upstream's do.
      dino_size: pixels a side of the views for DINOv2.
      statistics: by embodiment; needed for robot samples only.
      embodiments: action spec (units, gripper, normalisation mode) by embodiment; its order numbers
        them, and each needs statistics.
      augment: image augmentation, or None.
      groups: names of ``Sample.group``; the order numbers them, for metrics.
      chunk, action_dim: C and A of every robot sample; fewer action dimensions are filled with
        zeros that do not count in the loss.
      state_dim: S; shorter proprioception is filled with zeros, 0 leaves it out.
    """

    tokenizer: Tokenizer
    prompt: PromptConfig = PromptConfig()
    image_config: ImageConfig = ImageConfig()
    dino_size: int = 224
    statistics: Statistics | None = None
    embodiments: Mapping[str, ActionSpec] = dataclasses.field(default_factory=dict)
    augment: Augment | None = None
    groups: Sequence[str] = ("",)
    chunk: int = 16
    action_dim: int = 7
    state_dim: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, spec in self.embodiments.items():
            try:
                problems += self._embodiment_problems(name, spec)
            except StatisticsError as e:
                problems.append(str(e))
        if problems:
            raise StatisticsError("sample encoder:\n  " + "\n  ".join(problems))

    def _embodiment_problems(self, name: str, spec: ActionSpec) -> list[str]:
        if self.statistics is None:
            return [f"embodiment {name!r} needs statistics (python -m st4vla_jax.compute_stats)"]
        entry = self.statistics[name]
        spec.check(entry.action, name)
        state = len(entry.state.mask) if entry.state else 0
        checks = {
            f"embodiment {name!r} has {len(spec.names)} action dimensions, action_dim is "
            f"{self.action_dim}": len(spec.names) > self.action_dim,
            f"embodiment {name!r} has no state statistics, state_dim is {self.state_dim}": (
                self.state_dim and not state
            ),
            f"embodiment {name!r} has {state} state dimensions, state_dim is {self.state_dim}": (
                self.state_dim and state > self.state_dim
            ),
        }
        return [text for text, bad in checks.items() if bad]

    def __call__(
        self, sample: Sample, rng: np.random.Generator
    ) -> tuple[Encoded, RobotArrays | None]:
        """Augments, renders, tokenises and normalises one sample.

        Args:
          sample: from a source.
          rng: of this sample in this epoch; only augmentation draws from it.

        Returns:
          The sample's tokens and patches, and its action side (None for grounding).

        Raises:
          BadRecordError: something in the record itself cannot be used.
          StatisticsError: an embodiment, group or number of dimensions that the config lacks.
        """
        if sample.group not in self.groups:
            raise StatisticsError(
                f"{sample.record}: group {sample.group!r} is not among {', '.join(self.groups)}"
            )
        images, turns = sample.images, sample.turns
        if self.augment is not None and images:
            images, turns = _augmented(sample, self.augment, rng)
        try:
            if sample.robot is None:
                return self._conversation(images, turns, sample), None
            images = sized_views(images, self.image_config)
            encoded = encode_robot(
                turns[0].text, images, self.prompt, self.tokenizer,
                image_config=self.image_config, record=sample.record,
            )  # fmt: skip
        except PromptError as e:
            raise BadRecordError(str(e)) from e
        except ImageError as e:
            raise BadRecordError(f"{sample.record}: {e}") from e
        return encoded, self._robot(images, sample.robot, sample)

    def _conversation(
        self, images: Sequence[np.ndarray], turns: Sequence[Turn], sample: Sample
    ) -> Encoded:
        old = [image.shape[:2] for image in images]
        sizes = [(hw, prepared_size(*hw, self.conversation_images)) for hw in old]
        return encode(
            render_turns(turns, sizes, sample.record),
            images,
            self.tokenizer,
            system=self.prompt.system,
            image_config=self.conversation_images,
            add_generation_prompt=False,
            supervise=True,
            group=self.groups.index(sample.group),
            record=sample.record,
        )

    def _robot(self, images: Sequence[np.ndarray], step: RobotStep, sample: Sample) -> RobotArrays:
        """Normalises the action side; see `RobotArrays`."""
        if step.embodiment not in self.embodiments:
            raise StatisticsError(
                f"{sample.record}: embodiment {step.embodiment!r} is not among "
                f"{', '.join(self.embodiments) or 'none'}"
            )
        if len(step.actions) != self.chunk:
            raise StatisticsError(
                f"{sample.record}: a chunk of {len(step.actions)} actions, chunk is {self.chunk}"
            )
        values = [step.actions] if step.state is None else [step.actions, step.state]
        if not all(np.isfinite(array).all() for array in values):
            raise BadRecordError(f"{sample.record}: actions or state are not finite")
        mode = self.embodiments[step.embodiment].mode
        statistics = self.statistics[step.embodiment]
        actions = statistics.action.normalize(step.actions, mode)
        mask = np.asarray(step.action_mask, bool)
        mask = np.broadcast_to(mask[:, None], actions.shape) if mask.ndim == 1 else mask
        state = None
        if self.state_dim:
            if step.state is None:
                raise StatisticsError(f"{sample.record}: no state, state_dim is {self.state_dim}")
            state = _widened(statistics.state.normalize(step.state, mode), self.state_dim)
        return RobotArrays(
            dino_images=dino_views(images, self.dino_size),
            view_mask=np.ones(len(images), bool),
            state=state,
            actions=_widened(actions, self.action_dim),
            action_mask=_widened(mask, self.action_dim),
            embodiment=list(self.embodiments).index(step.embodiment),
            group=self.groups.index(sample.group),
        )

    def empty_robot(self) -> RobotArrays:
        """Shapes of a robot slot, for batches whose robot records are all bad."""
        side = self.dino_size
        return RobotArrays(
            dino_images=np.zeros((1, side, side, 3), np.uint8),
            view_mask=np.zeros(1, bool),
            state=np.zeros(self.state_dim, np.float32) if self.state_dim else None,
            actions=np.zeros((self.chunk, self.action_dim), np.float32),
            action_mask=np.zeros((self.chunk, self.action_dim), bool),
        )

    @property
    def conversation_images(self) -> ImageConfig:
        """Sizes that grounding images are brought to."""
        return dataclasses.replace(self.image_config, size=None)

    def robot_lengths(
        self, instructions: Sequence[str], text_id: np.ndarray, image_sizes: np.ndarray
    ) -> Lengths:
        """Lengths of robot samples.

        Args:
          instructions: the data set's distinct instructions.
          text_id: i32[n] the instruction of each sample.
          image_sizes: i32[n,V,2] (height, width) of each view; (0, 0) = the sample lacks it.

        Returns:
          Exact lengths; `UNUSABLE` tokens where the instruction, or every view, is unusable.
        """
        sizes, size_id = np.unique(np.asarray(image_sizes, np.int32), axis=0, return_inverse=True)
        cells, slots, views = _columns(
            [_images(map(tuple, row), self.image_config) for row in sizes], 3
        )
        used = np.unique(text_id)
        text = np.full(len(instructions), UNUSABLE, np.int64)
        text[used] = [self._instruction_tokens(instructions[i]) for i in used]
        text, size_id = text[text_id], size_id.reshape(-1)
        # Beside its cells, each view takes the tokens that start and end it.
        tokens = text + cells[size_id] + 2 * views[size_id]
        unusable = (text == UNUSABLE) | (views[size_id] < 1)
        count = len(text_id)
        return Lengths(
            tokens=np.where(unusable, UNUSABLE, tokens).astype(np.int32),
            slots=np.where(unusable, 0, slots[size_id]).astype(np.int32),
            targets=np.zeros(count, np.int32),
            robot=np.ones(count, np.int32),
        )

    def _instruction_tokens(self, instruction: str) -> int:
        """Tokens of a robot sample but for its views, or UNUSABLE."""
        try:
            text = chat_text(
                robot_turns(instruction, 1, self.prompt),
                system=self.prompt.system,
                num_images=1,
                add_generation_prompt=True,
            )
        except PromptError:
            return UNUSABLE
        return len(self.tokenizer.encode(text)) - 3  # vision_start, image_pad, vision_end

    def conversation_lengths(
        self, turns: Iterable[Sequence[Turn]], image_sizes: Iterable[Sequence[Size]]
    ) -> Lengths:
        """Lengths of grounding samples.

        Args:
          turns: conversation of each record, with its region placeholders.
          image_sizes: (height, width) of each image of each record, original pixels.

        Returns:
          Lengths, exact without augmentation, else upper bounds; `UNUSABLE` tokens where the
          conversation or an image cannot be encoded.
        """
        rows = [
            self._conversation_length(conversation, list(sizes))
            for conversation, sizes in zip(turns, image_sizes, strict=True)
        ]
        tokens, slots, targets = _columns(rows, 3).astype(np.int32)
        return Lengths(tokens, slots, targets, np.zeros(len(rows), np.int32))

    def _conversation_length(
        self, turns: Sequence[Turn], sizes: list[Size]
    ) -> tuple[int, int, int]:
        cells, slots, count = _images(sizes, self.conversation_images)
        if count != len(sizes):
            return UNUSABLE, 0, 0
        resized = [prepared_size(*hw, self.conversation_images) for hw in sizes]
        try:
            if self.augment is None:
                rendered = render_turns(turns, list(zip(sizes, resized, strict=True)))
            else:
                rendered = longest_turns(turns, resized)
            ids, supervised = tokenize(
                rendered,
                self.tokenizer,
                system=self.prompt.system,
                num_images=count,
                add_generation_prompt=False,
            )
        except PromptError:
            return UNUSABLE, 0, 0
        if not supervised.any():
            return UNUSABLE, 0, 0
        return len(ids) - count + cells, slots, int(supervised.sum())

    def fingerprint(self) -> str:
        """sha256 of what decides lengths: tokenizer, prompt, image sizes, augmentation."""
        settings = {
            "tokenizer": self.tokenizer.fingerprint(),
            "prompt": dataclasses.asdict(self.prompt),
            "image": dataclasses.asdict(self.image_config),
            "augment": None if self.augment is None else dataclasses.asdict(self.augment),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def full_fingerprint(self) -> str:
        """sha256 of everything that decides arrays: `fingerprint`, statistics, shapes, numbers."""
        settings = {
            "lengths": self.fingerprint(),
            "statistics": None if self.statistics is None else self.statistics.to_dict(),
            # A list: its order numbers the embodiments.
            "embodiments": [(k, dataclasses.asdict(v)) for k, v in self.embodiments.items()],
            "groups": list(self.groups),
            "shapes": [self.dino_size, self.chunk, self.action_dim, self.state_dim],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def prepared_size(height: int, width: int, cfg: ImageConfig) -> Size:
    """Size of an image after `image.prepare`; raises ImageError as that does."""
    return smart_resize(*(cfg.size or (height, width)), cfg)


def _images(sizes: Iterable[Size], cfg: ImageConfig) -> tuple[int, int, int]:
    """Cells, slots and number of the images with these original sizes; -1 of unusable ones."""
    present = tuple((int(h), int(w)) for h, w in sizes if h or w)
    try:
        return _image_lengths(tuple(prepared_size(*size, cfg) for size in present))
    except ImageError:
        return 0, 0, -1


@functools.lru_cache(maxsize=65_536)
def _image_lengths(prepared: tuple[Size, ...]) -> tuple[int, int, int]:
    """Cells, slots and number of images of these sizes after resizing."""
    return sum(num_cells(*size) for size in prepared), num_slots(prepared), len(prepared)


def _columns(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """i64[width,n] of n rows; n may be 0."""
    return np.array(rows, np.int64).reshape(-1, width).T


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    """Fills the last axis up to ``width`` with zeros or False."""
    missing = width - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else values


def _augmented(
    sample: Sample, augment: Augment, rng: np.random.Generator
) -> tuple[Sequence[np.ndarray], Sequence[Turn]]:
    """Images of unchanged sizes, and turns whose regions moved along.

    Numbers that are literally in a text would stay behind, so such a sample is not cropped.
    """
    regions: list[Region] = [region for turn in sample.turns for region in turn.regions]
    crop = sample.robot is not None or not has_literal(sample.turns)
    images, moved = augment.apply(sample.images, regions, rng, crop)
    remaining = iter(moved)
    turns = [
        dataclasses.replace(turn, regions=tuple(next(remaining) for _ in turn.regions))
        for turn in sample.turns
    ]
    return images, turns
