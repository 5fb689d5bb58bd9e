"""Boxes, points and trajectories out of a model's text, however it wrote them.

Formats seen (spec upstream.md 4.6, data.md 6): ``<box>[[x1,y1,x2,y2]]</box>`` with one or two
brackets on either side, JSON ``bbox_2d`` and ``point_2d`` as Qwen2.5-VL writes it, fenced or cut
off at the end, lists of tuples, bare lists.  Coordinates are returned as written: pixels of the
resized image, or fractions where a benchmark asks for them.
"""

from __future__ import annotations

import dataclasses
import math
import re

BOX_NAMES = ("bbox_2d", "bbox", "bboxes", "box", "boxes")
POINT_NAMES = (
    "point_2d", "points_2d", "point", "points", "trace", "trajectory", "waypoints", "waypoints2d",
)  # fmt: skip

# One pass over the text; every alternative starts with another character and, once that matches,
# scans what it takes only once, so the whole is linear in the text's length.
_TOKEN = re.compile(
    r"""
      (?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)
    | (?P<open>[\[(])
    | (?P<close>[\])])
    | (?P<comma>,)
    | (?P<brace>\{)
    | (?P<unbrace>\})
    | ["']label["']\s*:\s*(?:"(?P<label>[^"]*)"|'(?P<label_>[^']*)')
    | ["'](?P<key>\w+)["']\s*:
    | <ref>(?P<ref>[^<]*)</ref>
    | <(?P<tag>\w+)>
    | </(?P<untag>\w+)>
    | (?P<word>[^\W\d]\w*)
    | (?P<other>[^\s])
    """,
    re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Box:
    """Corners (x1, y1) and (x2, y2) as written, not sorted."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a text holds, in the order of the text.

    Attributes:
      boxes: every box.
      points: every point; for a trajectory, its way-points in time order.
      reason: why nothing was found; empty if something was.
    """

    boxes: tuple[Box, ...]
    points: tuple[Point, ...]
    reason: str = ""


@dataclasses.dataclass
class _Scope:
    """One JSON object (or the text around all of them): its label may follow its numbers."""

    name: str = ""  # key that the object is the value of, e.g. "pick"
    label: str = ""


@dataclasses.dataclass
class _Group:
    """Numbers between one pair of brackets, and where they stand."""

    numbers: list[float]
    kind: str  # "box", "point" or "" if the text does not say
    label: str
    scope: _Scope


def parse_answer(text: str) -> Answer:
    """Finds every box and point of an answer; never raises on any text.

    A bracketed list of four numbers is a box and one of two a point, unless a key or tag says
    otherwise: two corners under ``bbox_2d`` are a box, a flat even list under ``trajectory`` is
    points.  Other lists are skipped.
    """
    boxes: list[Box] = []
    points: list[Point] = []
    skipped: list[int] = []
    corner: _Group | None = None
    for group in _groups(text):
        numbers, size = group.numbers, len(group.numbers)
        label = group.label or group.scope.label or group.scope.name
        if group.kind == "box" and size == 2:
            if corner is None or corner.scope is not group.scope:
                corner = group
                continue
            numbers, size = corner.numbers + numbers, 4
        corner = None
        kind = group.kind or {4: "box", 2: "point"}.get(size, "")
        if kind == "box" and size % 4 == 0:
            boxes += [Box(*numbers[i : i + 4], label) for i in range(0, size, 4)]
        elif kind == "point" and size % 2 == 0:
            points += [Point(*numbers[i : i + 2], label) for i in range(0, size, 2)]
        else:
            skipped.append(size)
    if boxes or points:
        return Answer(tuple(boxes), tuple(points))
    if not text.strip():
        reason = "the answer is empty"
    elif skipped:
        reason = f"no box or point in lists of {', '.join(map(str, skipped[:8]))} numbers"
    elif corner:
        reason = "a box with one corner only"
    else:
        reason = "no complete bracketed list of numbers"
    return Answer((), (), reason)


def _kind(name: str) -> str:
    name = name.lower()
    return "box" if name in BOX_NAMES else "point" if name in POINT_NAMES else ""


def _groups(text: str) -> list[_Group]:
    """The innermost bracketed number lists, in the order of the text."""
    found: list[_Group] = []
    scopes = [_Scope()]
    kind = tag_kind = key = ref = ""
    numbers: list[float] | None = None  # None outside an innermost bracket
    for match in _TOKEN.finditer(text):
        what, value = match.lastgroup, match[match.lastgroup]
        name, key = key, ""  # a key names an object only where it stands right before it
        if what == "number" and numbers is not None:
            numbers.append(float(value))
            continue
        if what == "comma":
            continue
        if what == "open":
            numbers = []
            continue
        if numbers and what in ("close", "untag") and all(map(math.isfinite, numbers)):
            found.append(_Group(numbers, kind or tag_kind, ref, scopes[-1]))
        numbers = None
        if what == "brace":
            scopes.append(_Scope(name))
            kind = ""
        elif what == "unbrace":
            if len(scopes) > 1:
                scopes.pop()
            kind = ""
        elif what in ("label", "label_"):
            scopes[-1].label = value
        elif what == "key":
            key, kind = value, _kind(value)
        elif what == "ref":
            ref = value.strip()
        elif what == "tag":
            tag_kind = _kind(value)
            numbers = [] if tag_kind else None  # brackets may be missing inside the tag
        elif what == "untag":
            tag_kind = ref = ""
    return found
