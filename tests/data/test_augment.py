import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st4vla_jax.data.augment import Augment, AugmentError
from st4vla_jax.data.source import Region

CROP = Augment(scale=(0.3, 1.0), aspect=(0.7, 1.4), brightness=0, contrast=0, saturation=0, hue=0)
SIDES = st.integers(1, 90)


def rng_of(seed):
    return np.random.default_rng(seed)


def region(kind, *coordinates, image=0):
    return Region(kind, np.array(coordinates, np.float32), image, "cup")


def picture(height, width, seed=0):
    return rng_of(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=200, deadline=None)
@given(height=SIDES, width=SIDES, seed=st.integers(0, 10**6))
def test_crops_lie_in_the_image_and_keep_the_area_asked_for(height, width, seed):
    left, top, right, bottom = CROP.crop_box(rng_of(seed), height, width)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (bottom - top) * (right - left) >= 0.3 * 0.7 * (height - 2) * (width - 2)


def test_crops_have_the_area_and_aspect_asked_for():
    half = dataclasses.replace(CROP, scale=(0.5, 0.5))  # no side reaches the image's
    boxes = np.array([half.crop_box(rng_of(seed), 2000, 1000) for seed in range(300)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    np.testing.assert_allclose(widths * heights, 1_000_000, rtol=2e-3)
    aspects = (widths / 1000) / (heights / 2000)
    assert 0.698 < aspects.min() < 0.72 and 1.37 < aspects.max() < 1.403
    assert abs(np.log(aspects).mean()) < 0.03


def test_crops_cover_the_whole_range():
    boxes = np.array([CROP.crop_box(rng_of(seed), 200, 100) for seed in range(500)])
    shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 20_000
    assert shares.min() < 0.33 and shares.max() > 0.95
    assert abs(np.mean(boxes[:, 0] + boxes[:, 2]) / 2 - 50) < 2  # centred on average
    assert abs(np.mean(boxes[:, 1] + boxes[:, 3]) / 2 - 100) < 4


def marked(height, width, box):
    """A black image with a white rectangle: where the box is can be seen in the pixels."""
    x1, y1, x2, y2 = box
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    return image


def extent(image):
    """Corners of what is white."""
    white = image[..., 0] > 127
    rows, cols = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    return [[cols[0], rows[0]], [cols[-1] + 1, rows[-1] + 1]]


@pytest.mark.parametrize("seed", range(30))
def test_boxes_and_points_stay_on_what_they_mark(seed):
    rng = rng_of(seed)
    height, width = (int(side) for side in rng.integers(120, 260, 2))
    x1, y1 = int(rng.integers(10, width - 70)), int(rng.integers(10, height - 70))
    x2, y2 = x1 + int(rng.integers(20, 60)), y1 + int(rng.integers(20, 60))
    centre = ((x1 + x2) / 2, (y1 + y2) / 2)
    regions = (
        region("box", (x1, y1), (x2, y2)),
        region("point", centre),
        region("trajectory", (x1 + 2, y1 + 2), centre, (x2 - 2, y2 - 2)),
    )
    image = marked(height, width, (x1, y1, x2, y2))
    (cropped,), (box, point, trace) = CROP.apply([image], regions, rng_of(seed + 1000))
    assert cropped.shape == image.shape and cropped.dtype == np.uint8
    white = cropped[..., 0] > 127
    np.testing.assert_allclose(box.coordinates, extent(cropped), atol=1)
    np.testing.assert_allclose(point.coordinates[0], trace.coordinates[1], atol=1e-3)
    for x, y in (*point.coordinates, *trace.coordinates):
        assert white[int(y), int(x)]
    assert [r.label for r in (box, point, trace)] == ["cup"] * 3
    assert box.coordinates.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(
    height=SIDES, width=SIDES, seed=st.integers(0, 10**6), points=st.integers(1, 4), data=st.data()
)
def test_nothing_in_the_image_is_lost(height, width, seed, points, data):
    """Every point stays in view, every box keeps its share; order and number stay."""
    share = st.floats(0, 0.999)
    corners = [(data.draw(share) * width, data.draw(share) * height) for _ in range(points + 2)]
    trace = region("trajectory", *corners[:points])
    box = np.sort(np.array(corners[points:], np.float32), axis=0)
    image = picture(height, width)
    augment = dataclasses.replace(CROP, min_visible=0.8)
    (cropped,), (trace_after, box_after) = augment.apply(
        [image], [trace, region("box", *box)], rng_of(seed)
    )
    assert cropped.shape == image.shape
    assert trace_after.coordinates.shape == trace.coordinates.shape
    limit = np.array([width, height]) * (1 + 1e-6)
    assert np.all(trace_after.coordinates >= 0) and np.all(trace_after.coordinates <= limit)
    after = box_after.coordinates
    assert np.all(after[0] <= after[1]) and np.all(after >= 0) and np.all(after <= limit)
    before = np.prod(box[1] - box[0])
    if before > 1e-3:
        # A crop is at most the image, so what it keeps of a box is never smaller in its pixels.
        assert np.prod(after[1] - after[0]) >= 0.8 * before * (1 - 1e-3)


def test_a_crop_that_loses_a_region_is_not_used():
    image = picture(60, 80)
    corners = region("trajectory", (0, 0), (79.5, 59.5))
    (same,), (after,) = CROP.apply([image], [corners], rng_of(0))
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(after.coordinates, corners.coordinates)
    (changed,), _ = CROP.apply([image], [], rng_of(0))
    assert np.any(changed != image)


def test_way_points_outside_the_image_do_not_hold_a_crop_back():
    """Traces of the real LeRobot set lie far outside (spec data.md section 6)."""
    image = picture(60, 80)
    outside = region("trajectory", (-500, 20), (40, 30), (40, 900))
    (changed,), (after,) = CROP.apply([image], [outside], rng_of(3))
    assert np.any(changed != image)
    assert after.coordinates[0, 0] < -500 and after.coordinates[2, 1] > 900


def test_each_image_has_its_own_crop_and_regions():
    images = [marked(100, 100, (40, 40, 60, 60)), marked(50, 200, (150, 10, 170, 40))]
    regions = [
        region("box", (150, 10), (170, 40), image=1),
        region("box", (40, 40), (60, 60), image=0),
    ]
    augmented, moved = CROP.apply(images, regions, rng_of(5))
    assert [i.shape for i in augmented] == [i.shape for i in images]
    assert [r.image for r in moved] == [1, 0]
    for found in moved:
        np.testing.assert_allclose(found.coordinates, extent(augmented[found.image]), atol=1.5)
    assert np.any(moved[0].coordinates != regions[0].coordinates)


def test_the_same_generator_gives_the_same_sample_and_no_flip():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :20] = 255  # left
    one, _ = Augment().apply([image], [], rng_of(7))
    two, _ = Augment().apply([image], [], rng_of(7))
    np.testing.assert_array_equal(one[0], two[0])
    for seed in range(20):
        (after,), _ = Augment().apply([image], [], rng_of(seed))
        assert after[:, :10].mean() > after[:, 40:].mean()


def test_whole_scale_without_jitter_changes_nothing():
    still = dataclasses.replace(CROP, scale=(1, 1), aspect=(1, 1))
    image = picture(33, 47)
    point = region("point", (12.25, 30.5))
    (same,), (after,) = still.apply([image], [point], rng_of(0))
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(after.coordinates, point.coordinates)


def only(**strength):
    zero = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    return Augment(**zero | strength)


LUMA = np.array([0.299, 0.587, 0.114])


def chroma(image):
    """Colour as a complex number of YIQ, from the definitions of U and V turned by 33 degrees."""
    red, _, blue = np.moveaxis(image.astype(float), -1, 0)
    luma = image @ LUMA
    u, v = 0.492 * (blue - luma), 0.877 * (red - luma)
    angle = np.deg2rad(33)
    return v * np.cos(angle) - u * np.sin(angle) + 1j * (v * np.sin(angle) + u * np.cos(angle))


@pytest.mark.parametrize("seed", range(8))
def test_each_jitter_changes_what_it_says(seed):
    image = np.full((16, 16, 3), (180, 140, 120), np.uint8)
    image[8:] = (40, 60, 70)
    grey = image @ LUMA

    bright = only(brightness=0.3).jitter(rng_of(seed), image) / image
    assert np.ptp(bright) < 0.04 and 0.68 <= bright.mean() <= 1.32

    contrast = only(contrast=0.3).jitter(rng_of(seed), image).astype(float)
    factor = np.ptp(contrast[..., 0]) / np.ptp(image[..., 0].astype(float))
    np.testing.assert_allclose(contrast, grey.mean() + factor * (image - grey.mean()), atol=1)
    assert 0.69 <= factor <= 1.31

    vivid = only(saturation=0.3).jitter(rng_of(seed), image)
    np.testing.assert_allclose(vivid @ LUMA, grey, atol=0.6)
    factor = chroma(vivid) / chroma(image)
    assert np.ptp(factor.real) < 0.08 and abs(factor.imag).max() < 0.05
    assert 0.67 <= factor.real.mean() <= 1.33

    turned = only(hue=0.1).jitter(rng_of(seed), image)
    np.testing.assert_allclose(turned @ LUMA, grey, atol=0.6)
    factor = chroma(turned) / chroma(image)
    np.testing.assert_allclose(abs(factor), 1, atol=0.05)
    assert np.ptp(np.angle(factor)) < 0.06


def test_jitters_are_drawn_across_their_range():
    image = np.full((2, 2, 3), (150, 100, 90), np.uint8)
    drawn = [
        [only(brightness=0.2).jitter(rng_of(s), image)[0, 0, 0] / 150 for s in range(200)],
        [
            1 + np.angle((chroma(only(hue=0.1).jitter(rng_of(s), image)) / chroma(image))[0, 0])
            / np.pi
            for s in range(200)
        ],
    ]  # fmt: skip
    for factors in drawn:
        assert min(factors) <= 0.82 and max(factors) >= 1.18
        assert 0.98 < np.mean(factors) < 1.02


def test_jitters_together_are_one_after_another():
    image = np.full((16, 16, 3), (140, 120, 110), np.uint8)
    image[8:] = (80, 90, 100)
    for seed in range(5):
        together = Augment().jitter(rng_of(seed), image)
        rng, one = rng_of(seed), image.astype(float)
        one = one * rng.uniform(0.8, 1.2)
        mean = (one @ LUMA).mean()
        one = mean + rng.uniform(0.8, 1.2) * (one - mean)
        factor = rng.uniform(0.8, 1.2) * np.exp(2j * np.pi * rng.uniform(-0.05, 0.05))
        np.testing.assert_allclose(together @ LUMA, one @ LUMA, atol=0.6)
        np.testing.assert_allclose(chroma(together), factor * chroma(one), atol=1)


def test_jitter_clips_at_black_and_white():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 255
    levels = {int(v) for s in range(20) for v in only(contrast=1).jitter(rng_of(s), image).ravel()}
    assert {0, 255} <= levels


def test_settings_out_of_range_are_listed_at_once():
    with pytest.raises(AugmentError) as error:
        Augment(scale=(0.9, 1.1), aspect=(0, 1), min_visible=2, brightness=-1, hue=0.6)
    for key in ("scale", "aspect", "min_visible", "brightness", "hue"):
        assert f"{key} " in str(error.value)
