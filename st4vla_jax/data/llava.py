"""Grounding and question-answering records in LLaVA form: what one line of JSONL means.

A record is one JSON object, ``{"image" | "images": path or paths, "conversations": [{"from":
"human" | "gpt", "value": text}]}`` with ``<image>`` tags in the human texts (Qwen's fine-tuning
format reads ``image``, InternVLA's ``images``; spec data.md section 6).  Own extension, which
data/importers.py writes: a conversation entry may hold ``"regions"``, one for each ``<region>`` of
its text, as ``{"kind", "coordinates": [[x, y], ...], "image", "label"}`` in ORIGINAL pixels.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from st4vla_jax.data.answers import COORDINATES, LITERAL, longest_turns
from st4vla_jax.data.image import ImageConfig, smart_resize
from st4vla_jax.data.prompts import PromptError, turn_texts
from st4vla_jax.data.source import BadRecordError, Region, Turn

Size = tuple[int, int]  # height, width in pixels

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
POINTS = {"box": 2, "point": 1}  # a trajectory has one or more

_FRAME = re.compile(r"(\d+)x(\d+)")

_SLACK = 1.0  # pixels that annotations of other tools may lie outside, by rounding


def check_frame(coordinates: str) -> None:
    """Raises ValueError unless the option of `frame_size` is one that it knows."""
    if coordinates not in ("none", "pixels", "fraction", "thousand", "smart_resize") and not (
        _FRAME.fullmatch(coordinates)
    ):
        raise ValueError(
            f"coordinates={coordinates!r}: expected none, pixels, fraction, thousand, smart_resize "
            "or HEIGHTxWIDTH"
        )


def frame_size(coordinates: str, size: Size) -> tuple[float, float]:
    """(height, width) of the frame that the numbers of a text are in.

    Args:
      coordinates: "pixels" of the original; "fraction" (RoboPoint); "thousand" (Qwen2-VL);
        "smart_resize" with Qwen2.5-VL's default bounds; "HxW", as "224x224" (InternVLA's json).
      size: the original's.
    """
    if match := _FRAME.fullmatch(coordinates):
        return float(match[1]), float(match[2])
    if coordinates == "smart_resize":
        return smart_resize(*size, ImageConfig())
    return {"pixels": size, "fraction": (1.0, 1.0), "thousand": (1000.0, 1000.0)}[coordinates]


def image_paths(record: Mapping[str, Any]) -> list[str]:
    """The record's images, by either key; [] for text alone.

    Raises:
      BadRecordError: not a path or list of paths.
    """
    images = record.get("images", record.get("image")) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise BadRecordError(f"image is {str(images)[:80]}, expected a path or a list of paths")
    return images


def parse_record(line: bytes) -> dict[str, Any]:
    """One line of JSONL.

    Raises:
      BadRecordError: not JSON, or not a record.
    """
    try:
        record = json.loads(line)
    except ValueError as e:  # also UnicodeDecodeError
        raise BadRecordError(f"not JSON ({e})") from e
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadRecordError("not an object with a list of conversations")
    return record


def record_turns(
    record: Mapping[str, Any], sizes: Sequence[Size], coordinates: str = "none"
) -> tuple[Turn, ...]:
    """The conversation, its regions clipped to their images.

    Args:
      record: see the module's docstring.
      sizes: (height, width) of each image.
      coordinates: see `frame_size`; "none" leaves numbers in texts alone.

    Raises:
      BadRecordError: another form, a region outside its image or inside out; all problems.
    """
    problems: list[str] = []
    turns = []
    for number, entry in enumerate(record["conversations"], start=1):
        role = ROLES.get(str(entry.get("from"))) if isinstance(entry, dict) else None
        if role is None or not isinstance(entry.get("value"), str):
            problems.append(f"turn {number} needs from: human or gpt, and a text as value")
            continue
        text, regions = entry["value"], entry.get("regions", [])
        if regions:
            regions = [_region(region, problems, number) for region in regions]
        elif coordinates != "none":
            text, regions = lift_coordinates(text, coordinates, sizes, problems, number)
        clipped = [_clip(r, sizes, problems, number) for r in regions if r is not None]
        turns.append(Turn(role, text, tuple(r for r in clipped if r is not None)))
    if problems:
        raise BadRecordError("; ".join(problems))
    return tuple(turns)


def check_turns(turns: Sequence[Turn], sizes: Sequence[Size]) -> None:
    """Renders a conversation once, so that nothing is left to fail in training.

    Raises:
      BadRecordError: placeholders that do not match, control tokens, unknown roles, nothing to
        supervise.
    """
    try:
        turn_texts(longest_turns(turns, sizes), system="", num_images=len(sizes))
    except PromptError as e:
        raise BadRecordError(str(e).removeprefix("conversation: ")) from e
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRecordError("it has no answer")


def lift_coordinates(
    text: str, coordinates: str, sizes: Sequence[Size], problems: list[str], number: int = 0
) -> tuple[str, list[Region]]:
    """Replaces bracketed lists of two or four numbers by ``<coordinates>`` and their regions."""
    regions: list[Region] = []
    if len(sizes) != 1:
        if LITERAL.search(text):
            problems.append(
                f"turn {number} has coordinates, and the record {len(sizes)} images: say which "
                "image they are in by 'regions'"
            )
        return text, regions
    height, width = frame_size(coordinates, sizes[0])
    to_pixels = np.array([sizes[0][1] / width, sizes[0][0] / height])

    def lift(match: re.Match[str]) -> str:
        numbers = [float(n) for n in match[1].split(",")]
        if len(numbers) == 3:
            return match[0]
        points = np.array(numbers).reshape(-1, 2) * to_pixels
        kind = "box" if len(points) == 2 else "point"
        regions.append(Region(kind, points.astype(np.float32)))
        return COORDINATES

    return LITERAL.sub(lift, text), regions


def answer_kind(turns: Sequence[Turn]) -> str:
    """box, point, trajectory or text: what the answers hold, for metrics."""
    kinds = [r.kind for turn in turns if turn.role == "assistant" for r in turn.regions]
    return kinds[0] if kinds else "text"


def _region(entry: Any, problems: list[str], number: int) -> Region | None:
    try:
        points = np.array(entry["coordinates"], np.float32)
        kind, image = entry["kind"], int(entry.get("image", 0))
        wrong = points.ndim != 2 or points.shape[1] != 2 or not len(points)
        if (
            kind not in (*POINTS, "trajectory")
            or wrong
            or len(points) != POINTS.get(kind, len(points))
        ):
            raise ValueError(f"a {kind} of shape {list(points.shape)}")
    except (KeyError, TypeError, ValueError) as e:
        problems.append(f"turn {number}: region {str(entry)[:80]} is not readable ({e!r})")
        return None
    return Region(kind, points, image, str(entry.get("label", "")))


def _clip(region: Region, sizes: Sequence[Size], problems: list[str], number: int) -> Region | None:
    where = f"turn {number}: {region.kind} {np.round(region.coordinates, 2).ravel().tolist()}"
    if not 0 <= region.image < len(sizes):
        problems.append(f"{where} is in image {region.image} of {len(sizes)}")
        return None
    points = region.coordinates
    height, width = sizes[region.image]
    corner = np.array([width, height], np.float32)
    if not np.isfinite(points).all():
        problems.append(f"{where} is not finite")
        return None
    if (points < -_SLACK).any() or (points > corner + _SLACK).any():
        problems.append(f"{where} lies outside its image of {width}x{height} pixels")
        return None
    points = np.clip(points, 0, corner)
    if region.kind == "box" and not (points[1] > points[0]).all():
        problems.append(f"{where} has x2 <= x1 or y2 <= y1")
        return None
    return dataclasses.replace(region, coordinates=points)
