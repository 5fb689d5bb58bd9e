"""Boxes, points and trajectories to the text that Qwen2.5-VL writes, and back to pixels.

The one place where regions become text: training, evaluation and serving all come here.  Regions
are kept in original pixels and converted with the resize that really happens, since Qwen2.5-VL
speaks in absolute pixels of the image after smart_resize (spec data.md section 6).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from st4vla_jax.data.prompts import PromptError
from st4vla_jax.data.source import Region, Turn

REGION = "<region>"  # the next region as a JSON object
COORDINATES = "<coordinates>"  # the next region's bare numbers, inside a text of another format

_NUMBER = r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*"
LITERAL = re.compile(rf"[\[(]({_NUMBER}(?:,{_NUMBER}){{1,3}})[\])]")  # [x, y] or (x1, y1, x2, y2)

_PLACEHOLDER = re.compile(f"{REGION}|{COORDINATES}")
_KEYS = {"box": "bbox_2d", "point": "point_2d", "trajectory": "point_2d"}

Size = tuple[int, int]  # height, width in pixels


def has_literal(turns: Sequence[Turn]) -> bool:
    """Whether a text holds bracketed numbers that no region stands for: they follow no crop."""
    return any(LITERAL.search(turn.text) for turn in turns)


def to_resized(coordinates: np.ndarray, old_hw: Size, new_hw: Size) -> np.ndarray:
    """Pixels of an image to whole pixels of its resized copy, as Qwen's tools round them.

    Args:
      coordinates: float[...,2] (x, y) in an image of old_hw.
      old_hw: (height, width) of the original.
      new_hw: (height, width) after smart_resize.

    Returns:
      i32[...,2]: ``round(x * new / old)``, half to even, clamped into the image.
    """
    (old_h, old_w), (new_h, new_w) = old_hw, new_hw
    scaled = np.asarray(coordinates, np.float64) * (new_w / old_w, new_h / old_h)
    return np.clip(np.round(scaled), 0, (new_w - 1, new_h - 1)).astype(np.int32)


def to_original(coordinates: np.ndarray, new_hw: Size, old_hw: Size) -> np.ndarray:
    """Pixels of the resized image (numbers of an answer) to f32[...,2] pixels of the original."""
    (old_h, old_w), (new_h, new_w) = old_hw, new_hw
    scaled = np.asarray(coordinates, np.float64) * (old_w / new_w, old_h / new_h)
    return scaled.astype(np.float32)


def render(region: Region, new_hw: Size, old_hw: Size) -> str:
    """A region as Qwen2.5-VL writes it, one JSON object.

    ``{"bbox_2d": [x1, y1, x2, y2], "label": "cup"}``, ``{"point_2d": [x, y], ...}``; a trajectory
    is ``{"point_2d": [[x, y], ...], ...}`` in time order: no format is fixed upstream, and one
    object a way-point would take twice the tokens.  Without a label the key is left out.

    Args:
      region: in pixels of its image.
      new_hw: (height, width) of that image after smart_resize.
      old_hw: (height, width) of the image that the coordinates are pixels of.
    """
    label = f', "label": {json.dumps(region.label, ensure_ascii=False)}' if region.label else ""
    return f'{{"{_KEYS[region.kind]}": {render_coordinates(region, new_hw, old_hw)}{label}}}'


def render_coordinates(region: Region, new_hw: Size, old_hw: Size) -> str:
    """The numbers of `render` alone, in brackets; arguments as there."""
    points = to_resized(region.coordinates, old_hw, new_hw)
    return json.dumps(points.tolist() if region.kind == "trajectory" else points.ravel().tolist())


def answer_text(count: int) -> str:
    """An assistant's text with `count` placeholders, fenced as Qwen2.5-VL lists its answers."""
    return "```json\n[\n\t" + ",\n\t".join([REGION] * count) + "\n]\n```"


def labelled_answer(names: Sequence[str]) -> str:
    """A list of boxes, each behind its name, with a placeholder for each box's numbers.

    differs: Qwen2.5-VL writes the box first.  Where the name stands right before the numbers, a
    tiny model learns which of several things words mean, and knows it for other questions too.
    """
    text = answer_text(len(names))
    for name in names:
        label = json.dumps(name, ensure_ascii=False)
        region = f'{{"label": {label}, "{_KEYS["box"]}": {COORDINATES}}}'
        text = text.replace(REGION, region, 1)
    return text


def answer_opening(kind: str) -> str:
    """What `answer_text` and `render` write before the first number of a box or point."""
    return answer_text(1).partition(REGION)[0] + f'{{"{_KEYS[kind]}": ['


def render_turns(
    turns: Sequence[Turn], sizes: Sequence[tuple[Size, Size]], record: str = ""
) -> tuple[Turn, ...]:
    """Replaces every placeholder by its region's text.

    Args:
      turns: conversation with ``<region>`` and ``<coordinates>`` placeholders.
      sizes: for each image of the sample its (height, width) before and after all resizing; before
        means the pixels that the regions are in.
      record: file and record, for error messages.

    Returns:
      Turns without regions.

    Raises:
      PromptError: another number of placeholders than of regions, or a region of an image that
        the sample does not have; all at once.
    """

    def text_of(region: Region, bare: bool) -> str:
        old_hw, new_hw = sizes[region.image]
        return (render_coordinates if bare else render)(region, new_hw, old_hw)

    return _replace(turns, text_of, len(sizes), record)


def longest_rendering(region: Region, new_hw: Size) -> str:
    """A text that takes as many tokens as any rendering of the region at new_hw can.

    Augmentation moves coordinates, not their number; Qwen's tokenizer and the byte-level one take
    one token a digit, so the largest coordinates are the longest.
    """
    return render(_at_far_corner(region, new_hw), new_hw, new_hw)


def longest_turns(
    turns: Sequence[Turn], new_sizes: Sequence[Size], record: str = ""
) -> tuple[Turn, ...]:
    """`render_turns` with `longest_rendering`, to bound a sample's length; errors as there."""

    def text_of(region: Region, bare: bool) -> str:
        new_hw = new_sizes[region.image]
        far = _at_far_corner(region, new_hw)
        return (render_coordinates if bare else render)(far, new_hw, new_hw)

    return _replace(turns, text_of, len(new_sizes), record)


def _at_far_corner(region: Region, hw: Size) -> Region:
    coordinates = np.full_like(region.coordinates, (hw[1] - 1, hw[0] - 1))
    return Region(region.kind, coordinates, region.image, region.label)


def _replace(
    turns: Sequence[Turn], text_of: Callable[[Region, bool], str], num_images: int, record: str
) -> tuple[Turn, ...]:
    problems = []
    for number, turn in enumerate(turns, start=1):
        found = len(_PLACEHOLDER.findall(turn.text))
        if found != len(turn.regions):
            problems.append(
                f"turn {number} ({turn.role}) has {found} {REGION} or {COORDINATES} placeholders "
                f"for {len(turn.regions)} regions"
            )
        problems += [
            f"turn {number} ({turn.role}) has a {region.kind} in image {region.image}, the sample "
            f"has {num_images} images"
            for region in turn.regions
            if not 0 <= region.image < num_images
        ]
    if problems:
        raise PromptError(f"{record or 'conversation'}: " + "; ".join(problems))
    replaced = []
    for turn in turns:
        regions = iter(turn.regions)
        # One pass: a placeholder that occurs in a label is text.
        text = _PLACEHOLDER.sub(
            lambda m, r=regions: text_of(next(r), m[0] == COORDINATES), turn.text
        )
        replaced.append(Turn(turn.role, text))
    return tuple(replaced)
