"""Overlap of boxes, distance of trajectories, points in masks: plain geometry in pixels.

Coordinates are continuous (x, y); pixel (c, r) covers [c, c + 1) x [r, r + 1).
"""

from __future__ import annotations

import numpy as np


def sorted_box(corners: np.ndarray) -> np.ndarray:
    """Any two opposite corners f[2,2] as (upper left, lower right)."""
    return np.sort(corners, axis=0)


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes f[...,2,2] (sorted corners); leading axes broadcast.

    0 where both have no area.
    """
    low = np.maximum(first[..., 0, :], second[..., 0, :])
    high = np.minimum(first[..., 1, :], second[..., 1, :])
    overlap = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(box[..., 1, :] - box[..., 0, :], axis=-1) for box in (first, second)]
    union = areas[0] + areas[1] - overlap
    return np.where(union > 0, overlap / np.where(union > 0, union, 1), 0.0)


def inside_mask(points: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Whether each point f[n,2] lies in a true pixel of bool[h,w]; outside the image is not."""
    col, row = np.floor(points).astype(np.int64).T
    height, width = mask.shape
    within = (col >= 0) & (col < width) & (row >= 0) & (row < height)
    return within & mask[np.clip(row, 0, height - 1), np.clip(col, 0, width - 1)]


def inside_box(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Whether each point f[n,2] lies in a box f[2,2], its border included."""
    return np.all((points >= box[0]) & (points <= box[1]), axis=-1)


def resample(points: np.ndarray, count: int) -> np.ndarray:
    """``count`` points f[count,2] at even steps along the index of a polyline f[n,2]."""
    at = np.linspace(0, len(points) - 1, count)
    return np.stack([np.interp(at, np.arange(len(points)), axis) for axis in points.T], axis=-1)


def trajectory_mae(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute error over way-points and coordinates (A0's protocol).

    A prediction f[n,2] of another number of way-points than the truth f[m,2] is resampled to m.
    """
    return float(np.abs(resample(predicted, len(truth)) - truth).mean())


def discrete_frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Discrete Frechet distance of polylines f[n,2] and f[m,2] (Eiter and Mannila 1994)."""
    distance = np.linalg.norm(first[:, None] - second[None], axis=-1)
    coupling = np.empty_like(distance)
    coupling[0] = np.maximum.accumulate(distance[0])
    coupling[:, 0] = np.maximum.accumulate(distance[:, 0])
    for i in range(1, len(first)):
        for j in range(1, len(second)):
            before = min(coupling[i - 1, j], coupling[i, j - 1], coupling[i - 1, j - 1])
            coupling[i, j] = max(before, distance[i, j])
    return float(coupling[-1, -1])
