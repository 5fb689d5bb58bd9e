"""Resizing equals transformers' pixel for pixel; the slot layout holds its promises."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st4vla_jax.batch import VISION_BIN
from st4vla_jax.data import image as image_lib
from st4vla_jax.data.image import ImageConfig, ImageError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


# --- decoding -----------------------------------------------------------------------------------


def test_decode_image_takes_every_kind_of_source(tmp_path):
    pixels = noise(30, 40)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels))
    for source in (pixels, Image.fromarray(pixels), path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(image_lib.decode_image(source), pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_decode_image_converts_modes_as_pil(mode):
    image = Image.fromarray(noise(20, 30)).convert(mode)
    decoded = image_lib.decode_image(image)
    assert decoded.shape == (20, 30, 3) and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF")])
def test_decode_image_refuses_what_would_be_cut_off_at_255(tmp_path, mode, kind):
    """PIL's convert("RGB") makes 255 of every value above it, a depth map all white."""
    path = tmp_path / "depth"
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((4, 6), 1000, dtype)).save(path, kind)
    assert Image.open(path).mode == mode
    for source in (path, path.read_bytes(), Image.open(path)):
        with pytest.raises(ImageError, match=f"mode '{mode}' has more than 8 bits.*convert it"):
            image_lib.decode_image(source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (0, -3)}, r"size \(0, -3\): need \(height, width\)"),
        ({"size": (224,)}, "size"),
        ({"size": (224.0, 224.0)}, "size"),
        ({"size": (1, 201)}, "ratio of its sides is over 200"),
        ({"min_pixels": 0}, "min_pixels 0"),
        ({"min_pixels": 10, "max_pixels": 9}, "0 < min_pixels <= max_pixels"),
        ({"max_pixels": "9999"}, "max_pixels '9999'"),
        ({"min_pixels": -1, "size": (0, 1)}, "min_pixels -1.*; size"),
    ],
)
def test_image_config_checks_its_values(fields, message):
    with pytest.raises(ImageError, match=message):
        ImageConfig(**fields)


def test_decode_image_ignores_exif_orientation():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(noise(20, 30)).save(buffer, "JPEG", exif=exif)
    assert image_lib.decode_image(buffer.getvalue()).shape == (20, 30, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_decode_image_names_the_file_that_is_no_image(tmp_path, kind):
    whole = encoded(noise(64, 64), kind)
    for i, data in enumerate((b"", b"hello", whole[: len(whole) // 2])):
        path = tmp_path / f"bad{i}.png"
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"bad{i}.png"):
            image_lib.decode_image(path)
    with pytest.raises(ImageError, match="episode 3"):
        image_lib.decode_image(b"hello", name="episode 3")


def test_decode_image_names_the_png_with_a_broken_chunk():
    """PIL raises SyntaxError for any but the first data chunk."""
    first, _, last = encoded(noise(300, 300)).rpartition(b"IDAT")
    broken = first + b"\0\0\0\0" + last
    with pytest.raises(ImageError, match="view 2"):
        image_lib.decode_image(broken, name="view 2")


def test_decode_image_rejects_arrays_of_other_kinds():
    for bad in (noise(4, 4).astype(np.float32), noise(4, 4)[..., 0], noise(4, 4)[:0]):
        with pytest.raises(ImageError, match="view 1"):
            image_lib.decode_image(bad, name="view 1")


def test_decode_image_leaves_io_errors_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        image_lib.decode_image(tmp_path / "missing.png")


# --- resizing -----------------------------------------------------------------------------------


def random_sizes(count):
    """(height, width) pairs; every fourth is a strip with an aspect ratio of up to 200."""
    rng = np.random.default_rng(1)
    for i in range(count):
        short = int(rng.integers(1, 12 if i % 4 == 0 else 300))
        long = int(rng.integers(short, min(200 * short, 2400 if i % 4 == 0 else 420) + 1))
        yield (short, long) if rng.integers(2) else (long, short)


@pytest.mark.parity
@pytest.mark.parametrize(("max_pixels", "count"), [(12_845_056, 200), (40_000, 50)])
def test_pixels_and_grid_equal_transformers(max_pixels, count):
    hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = hf.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=max_pixels)
    cfg = ImageConfig(max_pixels=max_pixels)
    for i, (height, width) in enumerate(random_sizes(count)):
        raw = noise(height, width, i)
        theirs = processor(raw, return_tensors="np", input_data_format="channels_last")
        slots = image_lib.arrange([image_lib.prepare(raw, cfg)])
        ((gh, gw),) = slots.grids
        assert theirs["image_grid_thw"].tolist() == [[1, 2 * gh, 2 * gw]], (height, width)
        values = theirs["pixel_values"].reshape(-1, 3, 2, 14, 14).transpose(2, 0, 1, 3, 4)
        mean, std = (np.reshape(v, (3, 1, 1)) for v in (image_lib.IMAGE_MEAN, image_lib.IMAGE_STD))
        pixels = (values * std + mean) * 255
        assert np.abs(pixels - np.rint(pixels)).max() < 1e-2
        ours = slots.patches.reshape(-1, 4, 588)[slots.cells[0]].reshape(-1, 3, 14, 14)
        for frame in np.rint(pixels).astype(np.uint8):
            np.testing.assert_array_equal(frame, ours, err_msg=f"{height}x{width}")


@pytest.mark.parity
def test_smart_resize_equals_transformers_on_many_sizes():
    hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, 9.5, (5000, 2))).astype(int).tolist():
        for cfg in (ImageConfig(), ImageConfig(min_pixels=50_000, max_pixels=200_000)):
            bounds = {"min_pixels": cfg.min_pixels, "max_pixels": cfg.max_pixels}
            try:
                theirs = hf.smart_resize(height, width, **bounds)
            except ValueError:
                with pytest.raises(ImageError, match=f"{height} and width {width}"):
                    image_lib.smart_resize(height, width, cfg)
            else:
                assert image_lib.smart_resize(height, width, cfg) == theirs


def test_aspect_ratio_over_200_and_empty_sides_raise():
    image_lib.smart_resize(10, 2000, ImageConfig())
    for height, width in ((10, 2001), (2001, 10), (0, 5)):
        with pytest.raises(ImageError, match=f"{height} and width {width}"):
            image_lib.smart_resize(height, width, ImageConfig())


def test_image_config_rejects_impossible_bounds():
    with pytest.raises(ImageError, match="min_pixels 10 and max_pixels 5"):
        ImageConfig(min_pixels=10, max_pixels=5)


def test_prepare_resizes_to_the_configured_size_first():
    raw = noise(480, 640)
    prepared = image_lib.prepare(raw, ImageConfig(size=(224, 224)))
    expected = Image.fromarray(raw).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(prepared, np.asarray(expected))
    assert image_lib.prepare(prepared, ImageConfig(size=(224, 224))) is prepared
    tiny = image_lib.prepare(raw, ImageConfig(size=(20, 100)))  # smart_resize still applies
    assert tiny.shape[:2] == image_lib.smart_resize(20, 100, ImageConfig())


# --- slots --------------------------------------------------------------------------------------

grid = st.tuples(st.integers(1, 13), st.integers(1, 13))


@settings(max_examples=100, deadline=None)
@given(st.lists(grid, max_size=4), st.integers(0, 2**16))
def test_arrange_holds_its_promises(grids, seed):
    images = [noise(28 * gh, 28 * gw, seed + i) for i, (gh, gw) in enumerate(grids)]
    slots = image_lib.arrange(images)
    sizes = [image.shape[:2] for image in images]
    count = len(slots.patches)

    assert slots.grids == tuple(grids)
    assert count % VISION_BIN == 0 and count == image_lib.num_slots(sizes)
    assert [len(c) for c in slots.cells] == [image_lib.num_cells(*size) for size in sizes]
    used = np.concatenate([[], *slots.cells]).astype(int)
    assert len(set(used.tolist())) == len(used)  # no slot is used twice
    padding = np.setdiff1d(np.arange(count // 4), used)
    for ids in (slots.patch_image, slots.patch_window):
        assert ids.dtype == np.int32
        assert not ids.reshape(-1, 4)[padding].any() and ids.reshape(-1, 4)[used].all()

    # Every patch is where its cell says, with its own pixels; windows are 8x8 patches of an image.
    members = {}
    for number, (image, (_, gw), cells) in enumerate(
        zip(images, grids, slots.cells, strict=True), start=1
    ):
        for index, cell in enumerate(cells.tolist()):
            for part in range(4):
                slot = 4 * cell + part
                row, col = 2 * (index // gw) + part // 2, 2 * (index % gw) + part % 2
                assert slots.patch_hw[slot].tolist() == [row, col]
                assert slots.patch_image[slot] == number
                key = (number, row // 8, col // 8)
                members.setdefault(key, []).append(slot)
                pixels = image[14 * row : 14 * row + 14, 14 * col : 14 * col + 14]
                np.testing.assert_array_equal(
                    slots.patches[slot].reshape(3, 14, 14), pixels.transpose(2, 0, 1)
                )
    ids = set()
    for window in members.values():
        assert len({slot // VISION_BIN for slot in window}) == 1  # never straddles bins
        assert len(set(slots.patch_window[window].tolist())) == 1
        ids.add(int(slots.patch_window[window[0]]))
    assert len(ids) == len(members)  # numbers are unique within the sample

    again = image_lib.arrange(images)
    for a, b in zip(slots.cells, again.cells, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=50, deadline=None)
@given(st.lists(grid, min_size=1, max_size=4))
def test_edge_windows_share_bins(grids):
    """No two bins could be joined, which first-fit guarantees and one bin a window does not."""
    slots = image_lib.arrange([np.zeros((28 * gh, 28 * gw, 3), np.uint8) for gh, gw in grids])
    filled = np.sort((slots.patch_image.reshape(-1, VISION_BIN) > 0).sum(1))
    assert filled[0] > 0 and (len(filled) < 2 or filled[0] + filled[1] > VISION_BIN)


@pytest.mark.parametrize(
    ("size", "bins"), [((224, 224), 4), ((168, 252), 4), ((28, 28), 1), ((112, 112), 1)]
)
def test_number_of_bins(size, bins):
    assert image_lib.num_slots([size]) == bins * VISION_BIN


def test_no_images_give_no_slots():
    slots = image_lib.arrange([])
    assert slots.patches.shape == (0, 588) and slots.patch_hw.shape == (0, 2)
    assert slots.cells == () and slots.grids == () and image_lib.num_slots([]) == 0


def test_sizes_that_were_not_prepared_raise():
    with pytest.raises(ImageError, match="30x56, 0x28"):
        image_lib.num_slots([(30, 56), (28, 28), (0, 28)])
    with pytest.raises(ImageError, match="30x56"):
        image_lib.arrange([noise(30, 56)])
