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


def hsv(image):
    scaled = image.astype(float) / 255
    high, low = scaled.max(-1), scaled.min(-1)
    r, g, b = np.moveaxis(scaled, -1, 0)
    spread = np.where(high > low, high - low, 1)
    sector = np.where(
        high == r,
        (g - b) / spread % 6,
        np.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread),
    )
    return sector / 6, np.where(high > 0, (high - low) / np.where(high > 0, high, 1), 0), high


@pytest.mark.parametrize("seed", range(8))
def test_each_jitter_changes_what_it_says(seed):
    image = np.full((4, 4, 3), (180, 140, 120), np.uint8)
    image[2:] = (40, 60, 70)
    grey = image.astype(float) @ (0.299, 0.587, 0.114)

    bright = only(brightness=0.3).jitter(rng_of(seed), image) / image
    assert np.ptp(bright) < 0.04 and 0.68 <= bright.mean() <= 1.32

    contrast = only(contrast=0.3).jitter(rng_of(seed), image).astype(float)
    factor = np.ptp(contrast[..., 0]) / np.ptp(image[..., 0].astype(float))
    middle = round(grey.mean())
    np.testing.assert_allclose(contrast, middle + factor * (image - float(middle)), atol=2)
    assert 0.66 <= factor <= 1.34

    vivid = only(saturation=0.3).jitter(rng_of(seed), image).astype(float)
    np.testing.assert_allclose(vivid @ (0.299, 0.587, 0.114), grey, atol=1.5)
    factor = np.ptp(vivid[0, 0]) / np.ptp(image[0, 0].astype(float))
    assert 0.66 <= factor <= 1.34

    turned = only(hue=0.1).jitter(rng_of(seed), image)
    (hue, saturation, value), (old_hue, old_saturation, old_value) = hsv(turned), hsv(image)
    shift = (hue - old_hue + 0.5) % 1 - 0.5
    assert np.ptp(shift) < 0.03 and abs(shift).max() < 0.12
    np.testing.assert_allclose(saturation, old_saturation, atol=0.03)
    np.testing.assert_allclose(value, old_value, atol=0.02)


def test_jitters_are_drawn_across_their_range():
    red = np.full((1, 1, 3), (200, 0, 0), np.uint8)
    hues = [hsv(only(hue=0.1).jitter(rng_of(s), red))[0].item() for s in range(200)]
    shifts = [(hue + 0.5) % 1 - 0.5 for hue in hues]
    assert min(shifts) < -0.09 and max(shifts) > 0.09 and abs(np.mean(shifts)) < 0.02
    image = np.full((2, 2, 3), 100, np.uint8)
    levels = [only(brightness=0.2).jitter(rng_of(s), image)[0, 0, 0] for s in range(200)]
    assert min(levels) <= 82 and max(levels) >= 118 and 98 < np.mean(levels) < 102


def test_settings_out_of_range_are_listed_at_once():
    with pytest.raises(AugmentError) as error:
        Augment(scale=(0.9, 1.1), aspect=(0, 1), min_visible=2, brightness=-1, hue=0.6)
    for key in ("scale", "aspect", "min_visible", "brightness", "hue"):
        assert f"{key} " in str(error.value)
