"""Scores of written answers: boxes, points, trajectories and words, with reasons for failures.

Protocols (spec upstream.md 7.1): box IoU@0.5 as for RefCOCO-g and Refit-testB, share of points
inside the mask as for Where2Place, mean absolute error and discrete Frechet distance of way-points
as for A0.  Everything is measured in pixels of the original image.  An answer in which nothing is
found counts as a miss (IoU 0, no point inside, wrong words); distances have no worst value, so they
are averaged over the answered, and the share answered stands beside.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from st4vla_jax.data.answers import to_original
from st4vla_jax.data.prompts import IMAGE
from st4vla_jax.data.source import Region, Sample, Turn
from st4vla_jax.eval import geometry
from st4vla_jax.eval.parse import Answer, parse_answer
from st4vla_jax.eval.statistics import Rate

IOU_THRESHOLD = 0.5
KINDS = ("box", "point", "trajectory", "text")
_FAR = 1e6  # pixels: larger numbers in answers are as wrong, and would overflow

Size = tuple[int, int]  # height, width in pixels


class GroundingSourceLike(Protocol):
    """What questions are read from (`data.grounding.GroundingSource`)."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def record(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a right answer is.

    Attributes:
      kind: of KINDS.
      regions: of the answer, in pixels of the original images; none for text.
      sizes: (height, width) of each original image.
      text: the answer's text, for kind "text".
      inside: where a point counts: mask bool[h,w], box f[2,2], or None (distance only).
      record: file and record, for reports.
      group: value of the record's key that scores are told apart by.
    """

    kind: str
    regions: tuple[Region, ...]
    sizes: tuple[Size, ...]
    text: str = ""
    inside: np.ndarray | None = None
    record: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt about images, and its truth; ``turns`` are those before the first answer."""

    turns: tuple[Turn, ...]
    images: tuple[np.ndarray, ...]
    truth: Truth


@dataclasses.dataclass(frozen=True)
class Score:
    """How one answer did.

    Attributes:
      kind, record, group: of the truth.
      answer: the text.
      found: coordinates f64[n,2] of what was read, in original pixels.
      reason: why nothing was found; "" if something was.
      values: box: "iou" of each true box; point: "inside" share (if there is a place to be in) and
        "distance" to the true point; trajectory: "mae", "frechet"; text: "exact".
    """

    kind: str
    record: str
    answer: str
    found: tuple[np.ndarray, ...]
    reason: str
    values: Mapping[str, tuple[float, ...]]
    group: str = ""


# --- Questions ----------------------------------------------------------------------------------


def questions(
    source: GroundingSourceLike,
    *,
    masks: Path | None = None,
    limit: int | None = None,
    by: str | None = None,
) -> Iterator[Question]:
    """The first question of each record.

    Args:
      source: records; a key ``mask`` names a picture whose bright pixels are where a point counts,
        a key ``box`` a box [x1,y1,x2,y2] likewise.
      masks: folder that ``mask`` is relative to; needed if a record has one.
      limit: stop after so many records.
      by: key of the records whose values are the groups.

    Raises:
      BadRecordError: a record that cannot be read: a benchmark is scored whole or not at all.
      ValueError: a record with a mask, but no ``masks``; or without the key ``by``.
    """
    count = len(source) if limit is None else min(limit, len(source))
    for index in range(count):
        sample = source[index]
        first = next(i for i, turn in enumerate(sample.turns) if turn.role == "assistant")
        asked, answer = sample.turns[:first], sample.turns[first]
        images = sample.images[: sum(turn.text.count(IMAGE) for turn in asked)]
        kind = answer.regions[0].kind if answer.regions else "text"
        inside = _place(source.record(index), masks, sample.record) if kind == "point" else None
        sizes = tuple(image.shape[:2] for image in images)
        group = _group(source.record(index), by, sample.record) if by else ""
        truth = Truth(kind, answer.regions, sizes, answer.text, inside, sample.record, group)
        yield Question(asked, images, truth)


def _group(record: Mapping[str, Any], key: str, name: str) -> str:
    if key not in record:
        raise ValueError(
            f"{name} has no key {key!r} to tell scores apart by; it has {', '.join(record)}"
        )
    return str(record[key])


def _place(record: Mapping[str, Any], masks: Path | None, name: str) -> np.ndarray | None:
    if "mask" in record:
        if masks is None:
            raise ValueError(f"{name} has a mask: give the folder that masks are in")
        with Image.open(masks / record["mask"]) as picture:
            return np.asarray(picture.convert("L")) > 127
    if "box" in record:
        return geometry.sorted_box(np.reshape(np.asarray(record["box"], np.float64), (2, 2)))
    return None


# --- Answers ------------------------------------------------------------------------------------


def score(truth: Truth, answer: str, resized: Sequence[Size]) -> Score:
    """Scores an answer's text; never raises on any text.

    Args:
      truth: what is right.
      answer: the model's text; coordinates in pixels of the resized image, or fractions of it.
      resized: (height, width) of each image as the model saw it.
    """
    if truth.kind == "text":
        found, reason = (), "" if answer.strip() else "the answer is empty"
    else:
        found, reason = _read(truth, parse_answer(answer), resized)
    return Score(
        truth.kind, truth.record, answer, found, reason, _measure(truth, found, answer),
        truth.group,
    )  # fmt: skip


def _read(truth: Truth, answer: Answer, resized: Sequence[Size]):
    """(coordinates in original pixels of each thing that is asked for, reason if there is none)."""
    boxes = [np.array([[b.x1, b.y1], [b.x2, b.y2]]) for b in answer.boxes]
    points = [np.array([[p.x, p.y]]) for p in answer.points]
    if answer.reason:
        return (), answer.reason
    if truth.kind == "box":
        if not boxes and len(points) == 2 and len(truth.regions) == 1:
            boxes = [np.concatenate(points)]  # two corners as points
        found, reason = boxes[: len(truth.regions)], "points where a box is asked for"
    else:
        points = points or [box.mean(axis=0, keepdims=True) for box in boxes]
        found, reason = points, "nothing where points are asked for"
    if truth.kind == "trajectory" and found:
        found = [np.concatenate(found)]
    if not found:
        return (), reason
    image = truth.regions[0].image
    new_hw, old_hw = resized[image], truth.sizes[image]
    if _are_fractions(found):
        found = [coordinates * (new_hw[1], new_hw[0]) for coordinates in found]
    found = [np.clip(c, -_FAR, _FAR) for c in found]
    found = [to_original(c, new_hw, old_hw).astype(np.float64) for c in found]
    if truth.kind == "box":
        found = [np.clip(geometry.sorted_box(c), 0, (old_hw[1], old_hw[0])) for c in found]
        found = [c for c in found if np.prod(c[1] - c[0]) > 0]
        if not found:
            return (), "no box has an area inside the image"
    return tuple(found), ""


def _are_fractions(found: Sequence[np.ndarray]) -> bool:
    """All within [0, 1] and not all whole: Where2Place's other convention (spec data.md 6)."""
    values = np.concatenate(found)
    return bool(np.all((values >= 0) & (values <= 1)) and np.any(values != np.round(values)))


def _measure(truth: Truth, found: Sequence[np.ndarray], answer: str = ""):
    """The values of a `Score` from coordinates in original pixels."""
    if truth.kind == "text":
        return {"exact": (float(_plain(answer) == _plain(truth.text)),)}
    if truth.kind == "box":
        return {"iou": _matched_ious([r.coordinates for r in truth.regions], found)}
    if truth.kind == "trajectory":
        way = truth.regions[0].coordinates.astype(np.float64)
        if not found:
            return {}
        return {
            "mae": (geometry.trajectory_mae(found[0], way),),
            "frechet": (geometry.discrete_frechet(found[0], way),),
        }
    values = {}
    points = np.concatenate(found) if found else np.zeros((0, 2))
    if found:
        true_points = np.concatenate([r.coordinates for r in truth.regions])
        distances = np.linalg.norm(points[:, None] - true_points, axis=-1)
        values["distance"] = (float(distances.min(axis=1).mean()),)
    if truth.inside is not None:
        is_mask = truth.inside.dtype == bool
        within = (geometry.inside_mask if is_mask else geometry.inside_box)(points, truth.inside)
        values["inside"] = (float(within.mean()) if found else 0.0,)
    return values


def _matched_ious(true_boxes: Sequence[np.ndarray], found: Sequence[np.ndarray]):
    """IoU of each true box with the answer's box matched to it (each used once, best total)."""
    ious = np.zeros(len(true_boxes))
    if len(found):
        truths = np.stack([geometry.sorted_box(box) for box in true_boxes]).astype(np.float64)
        table = geometry.box_iou(truths[:, None], np.stack(found)[None])
        rows, cols = linear_sum_assignment(table, maximize=True)
        ious[rows] = table[rows, cols]
    return tuple(float(iou) for iou in ious)


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


# --- Floor --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prior:
    """Answers that need no looking: regions of the training set, as fractions of their images.

    Attributes:
      regions: kind -> coordinates f64[n,2] of each region; n differs for trajectories.
    """

    regions: Mapping[str, Sequence[np.ndarray]]

    @classmethod
    def of(cls, conversations: Iterable[tuple[Sequence[Turn], Sequence[Size]]]) -> Prior:
        """Collects the answers' regions.

        Args:
          conversations: turns and (height, width) of the images of each training record, as
            `GroundingSource.turns` and `image_sizes` give them without reading images.
        """
        regions: dict[str, list[np.ndarray]] = {}
        for turns, sizes in conversations:
            answers = [turn for turn in turns if turn.role == "assistant"]
            for region in (r for turn in answers for r in turn.regions):
                size = np.array(sizes[region.image][::-1], np.float64)
                regions.setdefault(region.kind, []).append(region.coordinates / size)
        return cls(regions)

    def floor(self, truths: Sequence[Truth], *, draws: int = 100, seed: int = 0) -> Summary:
        """What answers drawn from the prior score on average, ``draws`` for each truth.

        Truths of a kind that the prior has none of, and texts, are left out.
        """
        rng, scores = np.random.default_rng(seed), []
        for truth in truths:
            choices = self.regions.get(truth.kind, ())
            if not len(choices):
                continue
            size = np.array(truth.sizes[truth.regions[0].image][::-1], np.float64)
            for _ in range(draws):
                picks = rng.integers(len(choices), size=len(truth.regions))
                found = tuple(choices[pick] * size for pick in picks)
                values = _measure(truth, found)
                scores.append(Score(truth.kind, truth.record, "", found, "", values))
        return Summary.of(scores)


# --- Summary ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scores of many answers.

    Attributes:
      answered: answers in which something was found.
      iou50: true boxes hit with IoU of at least 0.5; exact: right words; None without such.
      means: mean of each value by name, over the answers that have it.
      reasons: why nothing was found -> how often.
    """

    answered: Rate
    iou50: Rate | None
    exact: Rate | None
    means: Mapping[str, float]
    reasons: Mapping[str, int]

    @classmethod
    def of(cls, scores: Sequence[Score]) -> Summary:
        values: dict[str, list[float]] = {}
        for one in scores:
            for name, numbers in one.values.items():
                values.setdefault(name, []).extend(numbers)
        hits = [iou >= IOU_THRESHOLD for iou in values.get("iou", ())]
        exact = values.pop("exact", [])
        return cls(
            answered=Rate(sum(not one.reason for one in scores), len(scores)),
            iou50=Rate(sum(hits), len(hits)) if hits else None,
            exact=Rate(int(sum(exact)), len(exact)) if exact else None,
            means={name: float(np.mean(numbers)) for name, numbers in values.items()},
            reasons=dict(Counter(one.reason for one in scores if one.reason).most_common()),
        )

    def metrics(self, name: str, suffix: str = "") -> dict[str, float]:
        """Flat metrics "eval/{name}/iou50", ...; ``suffix`` marks another set, e.g. "_floor"."""
        out = dict(self.means) | ({"answered": self.answered.value} if self.answered.trials else {})
        for key, rate in (("iou50", self.iou50), ("exact", self.exact)):
            if rate is not None:
                out[key] = rate.value
        return {f"eval/{name}/{key}{suffix}": value for key, value in out.items()}
