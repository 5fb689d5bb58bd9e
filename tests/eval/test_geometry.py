"""Geometry against rasterised areas, recursion and hand-computed cases."""

import functools

import numpy as np
import pytest

from st4vla_jax.eval.geometry import (
    box_iou,
    discrete_frechet,
    inside_box,
    inside_mask,
    resample,
    sorted_box,
    trajectory_mae,
)


def test_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[:20, :20] + 0.5
    for _ in range(50):
        boxes = [sorted_box(rng.integers(0, 21, (2, 2)).astype(float)) for _ in range(2)]
        masks = [(xs > b[0, 0]) & (xs < b[1, 0]) & (ys > b[0, 1]) & (ys < b[1, 1]) for b in boxes]
        union = (masks[0] | masks[1]).sum()
        want = (masks[0] & masks[1]).sum() / union if union else 0.0
        assert box_iou(*boxes) == pytest.approx(want)


def test_iou_broadcasts_and_knows_half_overlap():
    a = np.array([[0.0, 0.0], [2.0, 2.0]])
    shifted = np.stack([a + [dx, 0] for dx in (0, 1, 2, 5)])
    np.testing.assert_allclose(box_iou(a, shifted), [1, 1 / 3, 0, 0])
    assert box_iou(a * 0, a * 0) == 0


def frechet_by_recursion(p, q):
    @functools.cache
    def c(i, j):
        here = float(np.hypot(*(p[i] - q[j])))
        before = [c(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if min(a, b) >= 0]
        return max(here, min(before)) if before else here

    return c(len(p) - 1, len(q) - 1)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (6, 1), (5, 7), (8, 8)])
def test_frechet_equals_the_recursion(n, m):
    rng = np.random.default_rng(n * 10 + m)
    p, q = rng.standard_normal((n, 2)), rng.standard_normal((m, 2))
    assert discrete_frechet(p, q) == pytest.approx(frechet_by_recursion(p, q))


def test_frechet_of_a_reversed_path_is_its_length():
    line = np.stack([np.arange(6.0), np.zeros(6)], axis=1)
    assert discrete_frechet(line, line) == 0
    assert discrete_frechet(line, line[::-1]) == 5
    assert discrete_frechet(line, line + [0, 2]) == 2


def test_trajectory_error():
    line = np.array([[0.0, 0.0], [4.0, 0.0], [8.0, 4.0]])
    np.testing.assert_allclose(resample(line, 5), [[0, 0], [2, 0], [4, 0], [6, 2], [8, 4]])
    np.testing.assert_allclose(resample(line[:1], 3), np.zeros((3, 2)))
    assert trajectory_mae(line + [1, -3], line) == 2  # mean over x and y
    assert trajectory_mae(resample(line, 5), line) == 0


def test_points_inside():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    points = np.array([[2.0, 1.0], [2.99, 1.99], [3.0, 1.5], [-0.5, 1], [2, 3.5], [1e6, -1e6]])
    np.testing.assert_array_equal(inside_mask(points, mask), [1, 1, 0, 0, 0, 0])
    box = np.array([[0.0, 0.0], [2.0, 1.0]])
    np.testing.assert_array_equal(inside_box(points, box), [1, 0, 0, 0, 0, 0])
    assert inside_mask(np.zeros((0, 2)), mask).shape == (0,)
