"""Images to the vision tower's input: decoding, Qwen's resizing, patches in window order.

NumPy and PIL only.  Pixels stay u8 up to the device, which normalises them (DESIGN.md D3).  Three
units of area occur: a patch is 14x14 pixels and fills one slot; a cell is 2x2 patches, merged to
one token; a window is 4x4 cells, less at the bottom and right edges, and attends within itself.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# OpenAI CLIP's statistics, as in Qwen2-VL's preprocessor_config.json; of pixels in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT_RATIO = 200

_PATCH = 14  # pixels a side
_MERGE = 2  # patches a side of a cell
_CELL = _PATCH * _MERGE  # pixels a side
_WINDOW = 4  # cells a side
_CELL_PATCHES = _MERGE**2
_BIN_CELLS = _WINDOW**2  # one bin = one full window = batch.VISION_BIN slots
_PATCH_BYTES = 3 * _PATCH**2
# PIL's modes of more than 8 bits: its convert("RGB") cuts them off at 255.
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


class ImageError(ValueError):
    """Something that is not a usable image; the message names the file or the sizes."""


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How a view is brought to size; stored in a checkpoint's meta.

    Attributes:
      size: (height, width) that every view is first resized to; None keeps its own.
      min_pixels, max_pixels: bounds on the area after smart_resize (Qwen2.5-VL's defaults).
    """

    size: tuple[int, int] | None = None
    min_pixels: int = 3136
    max_pixels: int = 12_845_056

    def __post_init__(self) -> None:
        problems = []
        bounds = self.min_pixels, self.max_pixels
        if not (_natural(*bounds) and bounds[0] <= bounds[1]):
            problems.append(
                f"min_pixels {self.min_pixels!r} and max_pixels {self.max_pixels!r}: need integers "
                "with 0 < min_pixels <= max_pixels"
            )
        if self.size is not None:
            sides = self.size if isinstance(self.size, tuple) else ()
            if not (len(sides) == 2 and _natural(*sides)):
                problems.append(
                    f"size {self.size!r}: need (height, width) in pixels, two integers above 0"
                )
            elif max(sides) > MAX_ASPECT_RATIO * min(sides):
                problems.append(
                    f"size {self.size}: the ratio of its sides is over {MAX_ASPECT_RATIO}"
                )
        if problems:
            raise ImageError("; ".join(problems))


def _natural(*values: object) -> bool:
    """Whether all are integers above 0 (a bool is none)."""
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)


def decode_image(
    source: bytes | str | Path | np.ndarray | Image.Image, name: str = ""
) -> np.ndarray:
    """Decodes any image that PIL reads; orientation tags (EXIF) are left alone.

    Args:
      source: encoded bytes, a file, u8[h,w,3] pixels (returned as they are) or a PIL image.
      name: what error messages call it; default: the file's path.

    Returns:
      u8[h,w,3] RGB; alpha, gray and palettes are converted by PIL's ``convert("RGB")``.

    Raises:
      ImageError: not an image, truncated, an array of another shape or dtype, or an image of more
        than 8 bits a channel that PIL would cut off.
      OSError: the file cannot be read; left as it is, since reading may be tried again.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ImageError(
                f"{name or 'image array'}: expected non-empty u8[h,w,3], got "
                f"{source.dtype}{list(source.shape)}"
            )
        return source
    if isinstance(source, (str, Path)):
        name, source = name or str(source), Path(source).read_bytes()
    try:
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        if image.mode not in _DEEP_MODES:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    # PIL raises SyntaxError on broken PNG chunks, ValueError and EOFError in other decoders.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise ImageError(f"{name or 'image bytes'}: not a readable image ({e})") from e
    raise ImageError(
        f"{name or 'image'}: mode {image.mode!r} has more than 8 bits a channel; convert it to 8 "
        "bits, scaled as its data need it"
    )


def smart_resize(height: int, width: int, cfg: ImageConfig, factor: int = _CELL) -> tuple[int, int]:
    """Nearest size with sides that are multiples of ``factor`` and an area within bounds.

    Equal to HF Qwen2-VL's smart_resize (spec upstream.md 1.2), rounding half to even included.

    Args:
      height: pixels of the image.
      width: pixels of the image.
      cfg: bounds on the area.
      factor: pixels a side of a cell.

    Returns:
      (height, width) in pixels.

    Raises:
      ImageError: the aspect ratio is over 200, or a side is not positive.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"image of height {height} and width {width}: the sides must be positive and their "
            f"ratio at most {MAX_ASPECT_RATIO}; crop it"
        )
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(rounded) > cfg.max_pixels:
        shrink = math.sqrt(height * width / cfg.max_pixels)
        sides = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif math.prod(rounded) < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / (height * width))
        sides = (math.ceil(side * grow / factor) for side in (height, width))
    else:
        return rounded
    new_height, new_width = (side * factor for side in sides)
    return new_height, new_width


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL bicubic resize of u8[h,w,3] to u8[height,width,3]; the same array if sizes are equal."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def prepare(image: np.ndarray, cfg: ImageConfig) -> np.ndarray:
    """Brings decoded u8[h,w,3] pixels to the vision tower's size; errors as in `smart_resize`."""
    if cfg.size is not None:
        image = resize(image, *cfg.size)
    return resize(image, *smart_resize(*image.shape[:2], cfg))


@dataclasses.dataclass(frozen=True)
class VisionSlots:
    """Patches of one sample in window order; P is a multiple of 64, 0 without images.

    Attributes:
      patches: u8[P,588] pixels, flattened (channel, row, column).
      patch_hw: i32[P,2] row and column in the image's patch grid.
      patch_image: i32[P] 1, 2, ... by image; 0 = padding.
      patch_window: i32[P] positive, one number for each window of the sample; 0 = padding.
      cells: for each image i32[gh*gw], the merged slot (slot // 4) of each cell in raster order.
      grids: for each image (gh, gw), its cells.
    """

    patches: np.ndarray
    patch_hw: np.ndarray
    patch_image: np.ndarray
    patch_window: np.ndarray
    cells: tuple[np.ndarray, ...]
    grids: tuple[tuple[int, int], ...]


def arrange(images: Sequence[np.ndarray]) -> VisionSlots:
    """Lays the patches of a sample's images into bins of 64 slots, one attention window in one bin.

    A full window fills a bin; the smaller windows at the edges of all images share bins
    (DESIGN.md D3).  The four patches of a cell are neighbours, in HF's order.

    Args:
      images: u8[h,w,3] from `prepare`.

    Raises:
      ImageError: an image whose sides are not multiples of 28.
    """
    grids = _grids([image.shape[:2] for image in images])
    places = _places(grids)
    slots = len(places.patch_image) // _CELL_PATCHES
    patches = np.zeros((slots, _CELL_PATCHES, _PATCH_BYTES), np.uint8)
    for image, (rows, cols), cell in zip(images, grids, places.cells, strict=True):
        patches[cell] = _cell_patches(image, rows, cols)
    return dataclasses.replace(places, patches=patches.reshape(-1, _PATCH_BYTES))


@functools.lru_cache(maxsize=4096)
def _places(grids: tuple[tuple[int, int], ...]) -> VisionSlots:
    """All of `arrange` but the pixels: it depends on the sizes only; read-only arrays."""
    areas = [_window_areas(*grid) for grid in grids]
    starts, bins = _place_windows(areas)
    slots = bins * _BIN_CELLS
    patch_hw = np.zeros((slots, _CELL_PATCHES, 2), np.int32)
    patch_image = np.zeros((slots, _CELL_PATCHES), np.int32)
    patch_window = np.zeros((slots, _CELL_PATCHES), np.int32)
    cells, first = [], 0
    for number, (rows, cols) in enumerate(grids):
        row, col = np.divmod(np.arange(rows * cols, dtype=np.int32), cols)
        window = first + row // _WINDOW * -(-cols // _WINDOW) + col // _WINDOW
        row_length = np.minimum(_WINDOW, cols - col // _WINDOW * _WINDOW)
        cell = starts[window] + row % _WINDOW * row_length + col % _WINDOW
        patch_hw[cell, :, 0] = _MERGE * row[:, None] + (0, 0, 1, 1)
        patch_hw[cell, :, 1] = _MERGE * col[:, None] + (0, 1, 0, 1)
        patch_image[cell] = number + 1
        patch_window[cell] = window[:, None] + 1
        cells.append(cell)
        first += len(areas[number])
    none = np.zeros((0, _PATCH_BYTES), np.uint8)
    flat = patch_hw.reshape(-1, 2), patch_image.reshape(-1), patch_window.reshape(-1)
    for array in (*flat, *cells):
        array.flags.writeable = False
    return VisionSlots(none, *flat, tuple(cells), grids)


def num_slots(sizes: Sequence[tuple[int, int]]) -> int:
    """Slots (P) that `arrange` gives to images of these prepared (height, width) pixels."""
    _, bins = _place_windows([_window_areas(*grid) for grid in _grids(sizes)])
    return bins * _BIN_CELLS * _CELL_PATCHES


def num_cells(height: int, width: int) -> int:
    """Language-model tokens of an image of prepared ``height`` x ``width`` pixels."""
    ((rows, cols),) = _grids([(height, width)])
    return rows * cols


def _grids(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Cells (rows, columns) of each image; raises ImageError listing sizes that do not divide."""
    bad = [f"{h}x{w}" for h, w in sizes if h % _CELL or w % _CELL or not h * w]
    if bad:
        raise ImageError(
            f"image sizes {', '.join(bad)} are not multiples of {_CELL} pixels; call prepare first"
        )
    return tuple((h // _CELL, w // _CELL) for h, w in sizes)


def _window_areas(rows: int, cols: int) -> list[int]:
    """Cells of each window of one image, windows in raster order."""
    heights = [min(_WINDOW, rows - i) for i in range(0, rows, _WINDOW)]
    widths = [min(_WINDOW, cols - i) for i in range(0, cols, _WINDOW)]
    return [height * width for height in heights for width in widths]


def _place_windows(areas: Sequence[list[int]]) -> tuple[np.ndarray, int]:
    """First-fit-decreasing of all windows of a sample into bins of 16 cells.

    Ties keep the order of images and windows, so that the result is deterministic.

    Returns:
      i32[windows] first merged slot of each window, and the number of bins.
    """
    flat = [area for image in areas for area in image]
    starts = np.zeros(len(flat), np.int32)
    free: list[int] = []
    candidate = previous = 0
    for i in sorted(range(len(flat)), key=lambda i: -flat[i]):
        area = flat[i]
        if area != previous:
            candidate, previous = 0, area
        # Room only shrinks, so a bin too full for one window is too full for the next equal one.
        while candidate < len(free) and free[candidate] < area:
            candidate += 1
        if candidate == len(free):
            free.append(_BIN_CELLS)
        starts[i] = (candidate + 1) * _BIN_CELLS - free[candidate]
        free[candidate] -= area
    return starts, len(free)


def _cell_patches(image: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """u8[h,w,3] -> u8[rows*cols,4,588]: cells in raster order, patches flat (channel, row, col)."""
    split = image.reshape(rows, _MERGE, _PATCH, cols, _MERGE, _PATCH, 3)
    return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, _CELL_PATCHES, _PATCH_BYTES)
