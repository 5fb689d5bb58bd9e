"""A contact sheet: thumbnails of samples with what is known about them drawn in (PIL only)."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from st4vla_jax.data.source import Region

THUMB = 176  # pixels a side
_TEXT = 40  # pixels below a thumbnail
_CURVES = 120  # pixels of an episode's action curves
_MARGIN = 6
_INK, _GREY, _PAPER = "#202020", "#b0b0b0", "#ffffff"
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#808000", "#9a6324")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thumbnail: u8[h,w,3] pixels, regions in those pixels, a caption."""

    image: np.ndarray
    caption: str = ""
    regions: tuple[Region, ...] = ()


@dataclasses.dataclass(frozen=True)
class Strip:
    """A row of thumbnails under a title; curves f32[T,A] with their names below it, if any."""

    title: str
    cells: tuple[Cell, ...]
    curves: np.ndarray | None = None
    names: tuple[str, ...] = ()


def contact_sheet(strips: Sequence[Strip]) -> Image.Image:
    """Draws the strips below each other."""
    columns = max((len(strip.cells) for strip in strips), default=1)
    width = max(columns, 3) * (THUMB + _MARGIN) + _MARGIN
    heights = [_height(strip) for strip in strips]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN
    for strip, height in zip(strips, heights, strict=True):
        pen.text((_MARGIN, top), strip.title[:120], fill=_INK)
        for i, cell in enumerate(strip.cells):
            left = _MARGIN + i * (THUMB + _MARGIN)
            sheet.paste(thumbnail(cell), (left, top + 16))
            lines = "\n".join(textwrap.wrap(cell.caption, 28)[:3])
            pen.text((left, top + 18 + THUMB), lines, fill=_INK)
        if strip.curves is not None:
            box = (_MARGIN, top + 16 + THUMB + _TEXT, width - _MARGIN, top + height - _MARGIN)
            _draw_curves(pen, box, strip.curves, strip.names)
        top += height
    return sheet


def _height(strip: Strip) -> int:
    return 16 + THUMB + _TEXT + (_CURVES if strip.curves is not None else 0) + _MARGIN


def thumbnail(cell: Cell) -> Image.Image:
    """The image, scaled to fit a square, with its regions."""
    picture = Image.fromarray(cell.image)
    scale = THUMB / max(picture.size)
    size = tuple(max(1, round(n * scale)) for n in picture.size)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for i, region in enumerate(cell.regions):
        draw_region(pen, region, scale, COLOURS[i % len(COLOURS)])
    square = Image.new("RGB", (THUMB, THUMB), _GREY)
    square.paste(picture, (0, 0))
    return square


def draw_region(pen: ImageDraw.ImageDraw, region: Region, scale: float, colour: str) -> None:
    """Draws a box, point or trajectory whose coordinates are multiplied by ``scale``."""
    points = [tuple(map(float, xy)) for xy in np.asarray(region.coordinates, float) * scale]
    if region.kind == "box":
        xs, ys = zip(*points, strict=True)
        pen.rectangle((min(xs), min(ys), max(xs), max(ys)), outline=colour, width=2)
    elif region.kind == "trajectory":
        pen.line(points, fill=colour, width=2)
    if region.kind != "box":
        for x, y in points:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    if region.label:
        pen.text((points[0][0] + 3, points[0][1] + 2), region.label, fill=colour)


def _draw_curves(
    pen: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    curves: np.ndarray,
    names: Sequence[str],
) -> None:
    """One small plot a dimension, side by side, each with its own range."""
    left, top, right, bottom = box
    count = max(1, curves.shape[1])
    width = (right - left) // count
    for i in range(curves.shape[1]):
        values, x0 = curves[:, i].astype(float), left + i * width
        low, high = float(values.min()), float(values.max())
        span = high - low or 1.0
        area = (x0 + 2, top + 26, x0 + width - 4, bottom)
        pen.rectangle(area, outline=_GREY)
        name = names[i] if i < len(names) else f"{i}"
        pen.text((x0 + 2, top), f"{name}\n{low:.3g} .. {high:.3g}", fill=_INK)
        xs = np.linspace(area[0] + 2, area[2] - 2, len(values))
        ys = area[3] - 3 - (values - low) / span * (area[3] - area[1] - 6)
        points = list(zip(xs.tolist(), ys.tolist(), strict=True))
        if len(points) > 1:
            pen.line(points, fill=COLOURS[i % len(COLOURS)], width=1)
