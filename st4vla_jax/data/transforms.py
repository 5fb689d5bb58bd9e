"""One sample to arrays: tokens, mRoPE ids, vision slots, supervised positions.

The same functions serve training, evaluation and serving (DESIGN.md D11).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from st4vla_jax.data.image import ImageConfig, VisionSlots, arrange, prepare, resize
from st4vla_jax.data.prompts import (
    ASSISTANT_HEADER,
    PromptConfig,
    PromptError,
    robot_turns,
    turn_texts,
)
from st4vla_jax.data.source import Turn
from st4vla_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One sample, ready to be packed; n tokens, P vision slots, m supervised tokens.

    Attributes:
      tokens: i32[n].
      positions: i32[n,3] mRoPE ids (time, height, width), from 0.
      vision_index: i32[n] merged cell among the sample's own slots; -1 = text.
      slots: the sample's image patches.
      target_index: i32[m] token whose hidden state predicts the target (the one before it).
      targets: i32[m] token ids.
      target_weight: f32[m].
      group: data set and answer kind of the targets, for metrics only.
    """

    tokens: np.ndarray
    positions: np.ndarray
    vision_index: np.ndarray
    slots: VisionSlots
    target_index: np.ndarray
    targets: np.ndarray
    target_weight: np.ndarray
    group: int = 0


def tokenize(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    system: str,
    num_images: int,
    add_generation_prompt: bool,
    record: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenises a conversation; each image is still one image_pad token.

    Supervised are all tokens of an assistant turn after its header, the end token and the newline
    behind it included (spec upstream.md 4.5).

    Args:
      turns: see `prompts.turn_texts`, also for errors.
      tokenizer: Qwen's or the byte-level one.
      system: text of the system turn.
      num_images: images of the sample.
      add_generation_prompt: end with the header of an assistant turn.
      record: file and record, for error messages.

    Returns:
      i32[n] token ids, bool[n] True where supervised.
    """
    header = _ids(tokenizer, ASSISTANT_HEADER)
    ids: list[int] = []
    supervised: list[bool] = []
    for role, text in turn_texts(turns, system=system, num_images=num_images, record=record):
        turn_ids = _ids(tokenizer, text)
        ids += turn_ids
        supervised += [role == "assistant" and i >= len(header) for i in range(len(turn_ids))]
    if add_generation_prompt:
        ids += header
        supervised += [False] * len(header)
    return np.array(ids, np.int32), np.array(supervised, bool)


@functools.lru_cache(maxsize=4096)
def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of one turn; system turns, and instructions of robots, come again and again."""
    return tuple(tokenizer.encode(text))


def mrope_positions(is_image: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """The mRoPE ids of one sample with still images, as HF's get_rope_index.

    Text counts on from the largest id before it, equal on the three axes.  An image that starts at
    s has time s, height s + row, width s + column over its merged grid.

    Args:
      is_image: bool[n] True at the (already expanded) image tokens.
      grids: (rows, columns) of merged cells, image by image.

    Returns:
      i32[n,3].
    """
    positions = np.empty((len(is_image), 3), np.int32)
    image_tokens = np.flatnonzero(is_image)
    done = cursor = following = 0
    for rows, cols in grids:
        start = image_tokens[done]
        text = start - cursor
        positions[cursor:start] = following + np.arange(text)[:, None]
        base = following + text
        cursor, done = start + rows * cols, done + rows * cols
        row, col = np.divmod(np.arange(rows * cols), cols)
        positions[start:cursor] = base + np.stack([0 * row, row, col], axis=1)
        following = base + max(rows, cols)
    positions[cursor:] = following + np.arange(len(is_image) - cursor)[:, None]
    return positions


def encode(
    turns: Sequence[Turn],
    images: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    *,
    system: str,
    image_config: ImageConfig,
    add_generation_prompt: bool,
    supervise: bool,
    group: int = 0,
    record: str = "",
) -> Encoded:
    """Encodes a conversation about images.

    Args:
      turns: user and assistant turns; each ``<image>`` stands for the next image.
      images: u8[h,w,3], original pixels.
      tokenizer: Qwen's or the byte-level one.
      system: text of the system turn.
      image_config: sizes that images are brought to.
      add_generation_prompt: end with the header of an assistant turn.
      supervise: make every assistant turn a next-token target.
      group: see `Encoded`.
      record: file and record, for error messages.

    Raises:
      PromptError: see `prompts.turn_texts`, or nothing to supervise.
      ImageError: an image that cannot be resized.
    """
    ids, supervised = tokenize(
        turns,
        tokenizer,
        system=system,
        num_images=len(images),
        add_generation_prompt=add_generation_prompt,
        record=record,
    )
    if supervise and not supervised.any():
        raise PromptError(f"{record or 'conversation'}: it has no assistant turn to supervise")
    slots = arrange([prepare(image, image_config) for image in images])
    # One placeholder an image becomes one token a merged cell.
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == tokenizer.image_pad] = [rows * cols for rows, cols in slots.grids]
    tokens, supervised = np.repeat(ids, repeats), np.repeat(supervised, repeats)
    is_image = tokens == tokenizer.image_pad
    return of_tokens(tokens, is_image, slots, np.flatnonzero(supervised & supervise), group)


def of_tokens(
    tokens: np.ndarray, is_image: np.ndarray, slots: VisionSlots, answer: np.ndarray, group: int = 0
) -> Encoded:
    """A sample from its tokens.

    Args:
      tokens: i32[n].
      is_image: bool[n], tokens that merged cells of the images replace, in the order of ``slots``.
      slots: the images.
      answer: i64[m] positions of the tokens to predict.
      group: see `Encoded`.
    """
    vision_index = np.full(len(tokens), -1, np.int32)
    vision_index[is_image] = np.concatenate([np.empty(0, np.int32), *slots.cells])
    return Encoded(
        tokens=tokens,
        positions=mrope_positions(is_image, slots.grids),
        vision_index=vision_index,
        slots=slots,
        target_index=(answer - 1).astype(np.int32),
        targets=tokens[answer],
        target_weight=np.ones(len(answer), np.float32),
        group=group,
    )


def encode_robot(
    instruction: str,
    images: Sequence[np.ndarray],
    prompt: PromptConfig,
    tokenizer: Tokenizer,
    *,
    image_config: ImageConfig,
    record: str = "",
) -> Encoded:
    """Encodes one observation as upstream prompts it: views, spatial prompt, generation prompt.

    Args:
      instruction: the task, in words.
      images: u8[h,w,3] of each view, in view order.
      prompt: template, system turn and lower-casing.
      tokenizer: Qwen's or the byte-level one.
      image_config: sizes that views are brought to.
      record: file and record, for error messages.

    Raises:
      PromptError: no views, or control tokens in the instruction.
      ImageError: a view that cannot be resized.
    """
    if not images:
        raise PromptError(f"{record or 'observation'}: it has no camera view")
    return encode(
        robot_turns(instruction, len(images), prompt),
        images,
        tokenizer,
        system=prompt.system,
        image_config=image_config,
        add_generation_prompt=True,
        supervise=False,
        record=record,
    )


def sized_views(images: Sequence[np.ndarray], cfg: ImageConfig) -> list[np.ndarray]:
    """Views at the config's size, which the VLM and DINOv2 then both start from, as upstream."""
    return [resize(image, *cfg.size) if cfg.size else image for image in images]


def dino_views(images: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Views for DINOv2: squares, PIL bilinear (antialiased), not yet normalised.

    differs: upstream scales the shorter side to ``size`` without a crop, so views that are not
    square give tensors of other sizes there; on squares both are equal (spec upstream.md 1.5).

    Args:
      images: u8[h,w,3] of each view.
      size: pixels a side.

    Returns:
      u8[V,size,size,3].
    """
    views = np.empty((len(images), size, size, 3), np.uint8)
    for view, image in zip(views, images, strict=True):
        if image.shape[:2] == (size, size):
            view[:] = image
        else:
            resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
            view[:] = np.asarray(resized)
    return views
