"""One self-contained HTML file: tables, pictures and curves, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from st4vla_jax.data.sheet import COLOURS

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #202020 }
table { border-collapse: collapse; margin: .5rem 0 }
td, th { border-bottom: 1px solid #d8d8d8; padding: .2rem .8rem; text-align: left }
td { font-variant-numeric: tabular-nums }
img { max-width: 100%; image-rendering: auto }
figure { margin: 1rem 0 } figcaption { color: #606060 }
"""
_PLOT = (420, 220, 46)  # width, height, margin in pixels
_LINE = 14  # pixels of a curve's name below the plot


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
      title: its heading.
      lines: paragraphs.
      header: of the table; rows: its cells as text.
      pictures: (caption, picture) pairs.
      curves: title of a plot -> {name of a curve: [(x, y), ...]}; points that are not finite are
        left out.
    """

    title: str
    lines: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[tuple[str, Image.Image]] = ()
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] = dataclasses.field(
        default_factory=dict
    )


def write_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the file beside ``path`` and renames it: never half a report."""
    body = "".join(_section(section) for section in sections)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in section.lines]
    if section.rows:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.header)
        rows = (
            "".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in section.rows
        )  # fmt: skip
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
    parts += [_plot(title, curves) for title, curves in section.curves.items()]
    for caption, picture in section.pictures:
        data = io.BytesIO()
        picture.save(data, "PNG")
        source = base64.b64encode(data.getvalue()).decode()
        parts.append(
            f'<figure><img src="data:image/png;base64,{source}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "".join(parts)


def _plot(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """An SVG line plot with the ranges of both axes."""
    width, height, margin = _PLOT
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in curves.items()
    }
    every = [point for points in finite.values() for point in points]
    if not every:
        return f"<p>{html.escape(title)}: no finite values</p>"
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*every, strict=True))

    def place(x: float, y: float) -> str:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        inner_w, inner_h = width - 2 * margin, height - 2 * margin
        return f"{margin + across * inner_w:.1f},{height - margin - up * inner_h:.1f}"

    parts = [
        f'<svg width="{width}" height="{height + _LINE * len(curves)}" font-size="11" role="img">',
        f'<text x="{margin}" y="14">{html.escape(title)}</text>',
        f'<text x="2" y="{height - margin}">{y0:.3g}</text>',
        f'<text x="2" y="{margin + 4}">{y1:.3g}</text>',
        f'<text x="{margin}" y="{height - margin + 14}">{x0:g}</text>',
        f'<text x="{width - margin}" y="{height - margin + 14}" text-anchor="end">{x1:g}</text>',
        f'<rect x="{margin}" y="{margin}" width="{width - 2 * margin}" '
        f'height="{height - 2 * margin}" fill="none" stroke="#d8d8d8"/>',
    ]
    for number, (name, points) in enumerate(finite.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        y = height - 8 + number * _LINE
        parts.append(f'<text x="{margin}" y="{y}" fill="{colour}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"
