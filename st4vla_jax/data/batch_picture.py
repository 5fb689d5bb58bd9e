"""A packed batch as one picture: what the model gets, read back from the arrays alone.

Images are put together again from patches, texts decoded from token ids, answers from the targets
of the loss; so an error on the way (a crop, a prompt, a mask, an index) is seen here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from st4vla_jax.batch import Batch
from st4vla_jax.data.packing import CELL_SLOTS
from st4vla_jax.data.sheet import COLOURS, draw_region
from st4vla_jax.data.source import Region
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.eval.parse import parse_answer

WIDTH = 1200  # pixels of the picture
# Pixels of an image's longer side: small ones, small ones with regions, at most.
_VIEW, _WITH_REGIONS, _LARGEST = 280, 500, 560
_TEXT = 420  # pixels of a text beside images, at least
_MARGIN, _LINE, _CURVE, _HEADING = 10, 16, 110, 24
_MAX_LINES = 80  # of one sample's text
_INK, _GREY, _FAINT, _PAPER, _TARGET = "#202020", "#909090", "#d8d8d8", "#ffffff", "#0a7a20"
_HEAD = "#e8eef6"
_PATCH = 14  # pixels a side
_PAIR = r"[\[(]\s*-?[\d.]+\s*,\s*-?[\d.]+\s*[\])]"
_PATH = re.compile(rf"[\[(]\s*{_PAIR}(?:\s*,\s*{_PAIR})+\s*[\])]")


@dataclasses.dataclass(frozen=True)
class RobotView:
    """The action side of a sample as it lies in the batch (shapes of one slot, batch.py)."""

    dino_images: np.ndarray  # u8[v,h,w,3], valid views only
    state: np.ndarray | None
    actions: np.ndarray
    action_mask: np.ndarray
    embodiment: int


@dataclasses.dataclass(frozen=True)
class SampleView:
    """One packed sample, read back.

    Attributes:
      row, segment: where it lies.
      tokens: number of them; image_tokens: of these stand for images.
      images: u8[h,w,3], in the order of the tokens.
      texts: (text, whether the loss asks for it) runs in order; a run of image tokens is written
        once with its length.
      answer: all that the loss asks for, control tokens left out.
      group: number of the data set and answer kind; None without targets and robot.
      robot: the action side, or None.
    """

    row: int
    segment: int
    tokens: int
    image_tokens: int
    images: tuple[np.ndarray, ...]
    texts: tuple[tuple[str, bool], ...]
    answer: str
    group: int | None
    robot: RobotView | None


def unpack(batch: Batch, tokenizer: Tokenizer) -> list[SampleView]:
    """Every sample of a numpy batch, row by row."""
    return [
        _sample(batch, row, int(segment), tokenizer)
        for row in range(batch.vlm.tokens.shape[0])
        for segment in np.unique(batch.vlm.segment_ids[row])
        if segment
    ]


def _sample(batch: Batch, row: int, segment: int, tokenizer: Tokenizer) -> SampleView:
    vlm = batch.vlm
    places = np.flatnonzero(vlm.segment_ids[row] == segment)
    tokens, cells = vlm.tokens[row, places], vlm.vision_index[row, places]
    used = vlm.target_weight[row] > 0
    own = np.flatnonzero(used & (vlm.segment_ids[row, vlm.target_index[row]] == segment))
    order = own[np.argsort(vlm.target_index[row, own], kind="stable")]
    # The target's id, not the token's: what the loss asks for stands where the token would be.
    shown, supervised = tokens.copy(), np.zeros(len(tokens), bool)
    after = np.searchsorted(places, vlm.target_index[row, order]) + 1
    inside = after < len(places)
    shown[after[inside]], supervised[after[inside]] = vlm.targets[row, order[inside]], True
    robot, group = _robot(batch, row, segment)
    if len(own):
        group = int(vlm.target_group[row, own[0]])
    return SampleView(
        row,
        segment,
        len(places),
        int(np.count_nonzero(cells >= 0)),
        tuple(_images(batch, row, cells[cells >= 0])),
        tuple(_texts(shown, supervised, tokenizer)),
        tokenizer.decode(vlm.targets[row, order].tolist()),
        group,
        robot,
    )


def _images(batch: Batch, row: int, cells: np.ndarray) -> list[np.ndarray]:
    """The images whose cells the tokens read, in the order of the tokens."""
    vlm = batch.vlm
    slots = (cells[:, None] * CELL_SLOTS + np.arange(CELL_SLOTS)).ravel()
    numbers = vlm.patch_image[row, slots]
    found = []
    for number in dict.fromkeys(numbers.tolist()):
        mine = slots[numbers == number]
        hw = vlm.patch_hw[row, mine]
        height, width = hw.max(axis=0) + 1
        grid = np.full((height, width, 3, _PATCH, _PATCH), 255, np.uint8)
        grid[hw[:, 0], hw[:, 1]] = vlm.patches[row, mine].reshape(-1, 3, _PATCH, _PATCH)
        found.append(grid.transpose(0, 3, 1, 4, 2).reshape(height * _PATCH, width * _PATCH, 3))
    return found


def _texts(
    tokens: np.ndarray, supervised: np.ndarray, tokenizer: Tokenizer
) -> Iterator[tuple[str, bool]]:
    """Yields (text, supervised) of each run of equal kind."""
    pad = tokenizer.decode([tokenizer.image_pad], skip_special=False)
    bounds = np.flatnonzero(np.diff(supervised)) + 1
    for run, flags in zip(np.split(tokens, bounds), np.split(supervised, bounds), strict=True):
        text = tokenizer.decode(run.tolist(), skip_special=False)
        yield re.sub(f"(?:{re.escape(pad)})+", _count_pads, text), bool(flags[0])


def _count_pads(match: re.Match[str]) -> str:
    number = match[0].count("<")
    return f"{match[0][: len(match[0]) // number]} x {number} "


def _robot(batch: Batch, row: int, segment: int) -> tuple[RobotView | None, int | None]:
    action = batch.action
    if action is None:
        return None, None
    for k in np.flatnonzero(action.valid[row]):
        index = action.token_index[row, k][action.token_mask[row, k]]
        if len(index) and batch.vlm.segment_ids[row, index[0]] == segment:
            view = RobotView(
                action.dino_images[row, k][action.view_mask[row, k]],
                None if action.state is None else action.state[row, k],
                action.actions[row, k],
                action.action_mask[row, k],
                int(action.embodiment[row, k]),
            )
            return view, int(action.sample_group[row, k])
    return None, None


def regions_of(answer: str, height: int, width: int) -> list[Region]:
    """Boxes, points and trajectories of an answer, in pixels of an image of that size.

    Answers are written in pixels of the resized image; numbers that are all at most 1 are taken
    for fractions of it.
    """
    parsed = parse_answer(answer)
    boxes = [((b.x1, b.y1), (b.x2, b.y2)) for b in parsed.boxes]
    points = [(p.x, p.y) for p in parsed.points]
    numbers = np.array([*[xy for box in boxes for xy in box], *points])
    scale = (width, height) if len(numbers) and numbers.max() <= 1 else (1, 1)
    found = [
        Region("box", np.array(corners) * scale, label=b.label)
        for corners, b in zip(boxes, parsed.boxes, strict=True)
    ]
    in_paths: set[tuple[float, float]] = set()
    for match in _PATH.finditer(answer):
        path = [tuple(map(float, re.findall(r"-?[\d.]+", pair)))
                for pair in re.findall(_PAIR, match[0])]  # fmt: skip
        if set(path) <= set(points):  # else the two corners of a box
            label = next(p.label for p in parsed.points if (p.x, p.y) == path[0])
            found.append(Region("trajectory", np.array(path) * scale, label=label))
            in_paths |= set(path)
    return found + [
        Region("point", np.array([xy]) * scale, label=p.label)
        for xy, p in zip(points, parsed.points, strict=True)
        if xy not in in_paths
    ]


# --- Drawing ------------------------------------------------------------------------------------


def batch_picture(
    batch: Batch,
    tokenizer: Tokenizer,
    *,
    groups: Sequence[str] = (),
    action_names: Sequence[Sequence[str]] = (),
    limit: int = 4,
) -> Image.Image:
    """Draws the first samples of a numpy batch below each other.

    Args:
      batch: as the pipeline gives it.
      tokenizer: the one that made it.
      groups: names of the numbers in ``sample_group`` and ``target_group`` (encoder.groups).
      action_names: for each embodiment number the names of its action dimensions.
      limit: robot samples, and other samples, at most.

    Returns:
      an RGB picture, 1200 pixels wide.
    """
    samples = unpack(batch, tokenizer)
    robots = [s for s in samples if s.robot is not None]
    others = [s for s in samples if s.robot is None]
    panels = [_panel(s, groups, action_names) for s in robots[:limit] + others[:limit]]
    rows, length = batch.vlm.tokens.shape
    used = np.count_nonzero(batch.vlm.segment_ids) / batch.vlm.segment_ids.size
    targets = np.count_nonzero(batch.vlm.target_weight)
    title = (
        f"{rows} packed sequences of {length} tokens, {used:.1%} used: {len(robots)} robot and "
        f"{len(others)} other samples, {targets} supervised tokens"
    )
    sheet = Image.new("RGB", (WIDTH, _LINE * 2 + sum(p.height for p in panels)), _PAPER)
    ImageDraw.Draw(sheet).text((_MARGIN, _LINE // 2), title, fill=_INK, font=_font(14))
    top = _LINE * 2
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def _printable(text: str) -> str:
    """What Pillow's own font, the only one that is everywhere, cannot draw as escapes."""
    return text.replace("\t", "    ").encode("ascii", "backslashreplace").decode()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _panel(
    sample: SampleView, groups: Sequence[str], action_names: Sequence[Sequence[str]]
) -> Image.Image:
    """One sample: a heading, its images with its text beside or below, its action chunk."""
    views, robot, font = _views(sample), sample.robot, _font(13)
    across = sum(view.width + _MARGIN for view, _ in views)
    tall = max((view.height for view, _ in views), default=-_LINE) + _LINE
    beside = WIDTH - across - 2 * _MARGIN >= _TEXT
    lines = _lines(sample, WIDTH - 2 * _MARGIN - (across if beside else 0))
    text_left, text_top = (across + _MARGIN, _HEADING) if beside else (_MARGIN, _HEADING + tall)
    bottom = max(_HEADING + tall, text_top + len(lines) * _LINE) + _MARGIN
    height = bottom + (0 if robot is None else _CURVE + 2 * _LINE + _MARGIN)
    panel = Image.new("RGB", (WIDTH, height), _PAPER)
    pen = ImageDraw.Draw(panel)
    pen.rectangle((0, 0, WIDTH, _HEADING - 5), fill=_HEAD)
    pen.text((_MARGIN, 2), _printable(_heading(sample, groups)), fill=_INK, font=font)
    left = _MARGIN
    for view, caption in views:
        pen.text((left, _HEADING - 2), caption, fill=_GREY, font=_font(12))
        panel.paste(view, (left, _HEADING + _LINE))
        left += view.width + _MARGIN
    for i, (text, colour) in enumerate(lines):
        pen.text((text_left, text_top + i * _LINE), text, fill=colour, font=font)
    if robot is not None:
        names = action_names[robot.embodiment] if robot.embodiment < len(action_names) else ()
        _draw_chunk(pen, bottom, robot, names)
    return panel


def _heading(sample: SampleView, groups: Sequence[str]) -> str:
    number, robot = sample.group, sample.robot
    name = groups[number] if number is not None and number < len(groups) else f"group {number}"
    text = (
        f"row {sample.row}, segment {sample.segment}: {name}, "
        f"{sample.tokens} tokens ({sample.image_tokens} of images)"
    )
    if robot is None:
        return text
    steps, dims = robot.actions.shape
    text += f", chunk of {steps} steps x {dims} dimensions, {robot.action_mask.mean():.0%} counts"
    if robot.state is not None:
        text += ", state " + " ".join(f"{x:+.2f}" for x in robot.state)
    return text


def _views(sample: SampleView) -> list[tuple[Image.Image, str]]:
    """Pictures with captions: the VLM's images, with the answer's regions, and DINOv2's."""
    views = []
    for number, image in enumerate(sample.images):
        height, width = image.shape[:2]
        # Which image an answer speaks of is not in its text; of one image it is clear.
        regions = regions_of(sample.answer, height, width) if len(sample.images) == 1 else []
        caption = f"image {number + 1}: {width}x{height}"
        caption += f", {len(regions)} regions" if regions else ""
        views.append((_enlarged(image, regions), caption))
    if sample.robot is not None:
        for number, image in enumerate(sample.robot.dino_images):
            height, width = image.shape[:2]
            views.append((_enlarged(image, []), f"DINOv2 view {number + 1}: {width}x{height}"))
    room, fitting = WIDTH - _MARGIN, []
    for view, caption in views:
        room -= view.width + _MARGIN
        if room < 0:
            fitting[-1] = (fitting[-1][0], f"{fitting[-1][1]} (more do not fit)")
            break
        fitting.append((view, caption))
    return fitting


def _enlarged(image: np.ndarray, regions: Sequence[Region]) -> Image.Image:
    """Small images by a whole factor, so that pixels are seen; regions drawn at that size."""
    height, width = image.shape[:2]
    longer, wanted = max(height, width), _WITH_REGIONS if regions else _VIEW
    scale = max(1, round(wanted / longer)) if longer <= _LARGEST else _LARGEST / longer
    picture = Image.fromarray(image).resize(
        (round(width * scale), round(height * scale)),
        Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR,
    )
    pen, font = ImageDraw.Draw(picture), _font(13)
    for i, region in enumerate(regions):
        colour = COLOURS[i % len(COLOURS)]
        draw_region(pen, dataclasses.replace(region, label=""), scale, colour)
        x, y = region.coordinates.min(axis=0) * scale + 3
        label = _printable(region.label)
        x = max(0, min(x, picture.width - font.getlength(label) - 2))
        pen.text((x, max(0, min(y, picture.height - _LINE))), label, fill=colour, font=font,
                 stroke_width=2, stroke_fill=_PAPER)  # fmt: skip
    return picture


def _lines(sample: SampleView, width: int) -> list[tuple[str, str]]:
    """The text in lines of at most ``width`` pixels, supervised parts in green."""
    lines = [
        (line, _TARGET if supervised else _INK)
        for text, supervised in sample.texts
        for part in text.rstrip("\n").split("\n")
        for line in _wrapped(_printable(part), width)
    ]
    if len(lines) > _MAX_LINES:
        more = len(lines) - _MAX_LINES
        lines = [*lines[:_MAX_LINES], (f"... and {more} lines more", _GREY)]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Breaks a line at spaces, or anywhere in what has none for long."""
    lines, line, font = [], "", _font(13)
    for piece in re.findall(r"\s*\S{1,40}|\s+$", text):
        if line and font.getlength(line + piece) > width:
            lines.append(line)
            line, piece = "", piece.lstrip()
        line += piece
    return [*lines, line]


def _draw_chunk(pen: ImageDraw.ImageDraw, top: int, robot: RobotView, names: Sequence[str]) -> None:
    """A plot a dimension over -1..1 (more if needed); what the loss does not count is grey."""
    steps, dims = robot.actions.shape
    width = (WIDTH - 2 * _MARGIN) // dims
    reach = max(1.0, float(np.abs(robot.actions).max()))
    bottom, middle = top + _LINE + _CURVE, top + _LINE + _CURVE / 2
    for dim in range(dims):
        left = _MARGIN + dim * width
        values, mask = robot.actions[:, dim], robot.action_mask[:, dim]
        label = names[dim] if dim < len(names) else f"dimension {dim}"
        pen.text(
            (left, top), f"{_printable(label)}  first {values[0]:+.2f}", fill=_INK, font=_font(12)
        )
        pen.rectangle((left, top + _LINE, left + width - 8, bottom), outline=_GREY)
        pen.line((left, middle, left + width - 8, middle), fill=_FAINT)
        xs = left + 6 + np.arange(steps) * (width - 20) / max(steps - 1, 1)
        ys = middle - values / reach * (_CURVE / 2 - 6)
        points = list(zip(xs.tolist(), ys.tolist(), strict=True))
        colour = COLOURS[dim % len(COLOURS)]
        for i, (x, y) in enumerate(points):
            ink = colour if mask[i] else _GREY
            if i + 1 < steps:
                both = mask[i] and mask[i + 1]
                pen.line((x, y, *points[i + 1]), fill=colour if both else _FAINT, width=1)
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ink if mask[i] else None, outline=ink)
    pen.text(
        (_MARGIN, bottom + 1), f"normalised actions, -{reach:.3g} .. {reach:.3g}; hollow: masked",
        fill=_GREY, font=_font(12),
    )  # fmt: skip
