"""Image augmentation that regions follow: random resized crop and colour jitter.

A crop is resized back to the image's own size, so the token grid planned for it stays (DESIGN.md
D6).  Images are never flipped: instructions and answers say left and right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from st4vla_jax.data.image import resize
from st4vla_jax.data.source import Region

Crop = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right, bottom exclusive

_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_TRIES = 10  # crops drawn before an image whose regions they would lose is left whole


class AugmentError(ValueError):
    """Settings out of range; lists every problem by its key."""


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is drawn for each image; the defaults are openvla's for Open-X.

    Attributes:
      scale: (low, high) share of the image's area that a crop keeps.
      aspect: (low, high) of a crop's aspect ratio over the image's; drawn evenly in its logarithm.
      min_visible: share of a box's area that must stay in view.
      brightness, contrast, saturation: each scales by a factor within 1 +- this.
      hue: turns by up to this share of the colour circle (of YIQ: luma stays), 0..0.5.
    """

    scale: tuple[float, float] = (0.9, 0.9)
    aspect: tuple[float, float] = (1.0, 1.0)
    min_visible: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self) -> None:
        limits = {"min_visible": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}
        checks = {
            f"scale {self.scale}: need 0 < low <= high <= 1": (
                0 < self.scale[0] <= self.scale[1] <= 1
            ),
            f"aspect {self.aspect}: need 0 < low <= high": 0 < self.aspect[0] <= self.aspect[1],
            **{
                f"{key} {getattr(self, key)}: need 0..{limit}": 0 <= getattr(self, key) <= limit
                for key, limit in limits.items()
            },
        }
        if problems := [text for text, good in checks.items() if not good]:
            raise AugmentError("augmentation: " + "; ".join(problems))

    def crop_box(self, rng: np.random.Generator, height: int, width: int) -> Crop:
        """Draws a crop of an image of height x width pixels; never empty."""
        area = rng.uniform(*self.scale)
        aspect = np.exp(rng.uniform(*np.log(self.aspect)))
        crop_h = _side(height, np.sqrt(area / aspect))
        crop_w = _side(width, np.sqrt(area * aspect))
        top = int(rng.integers(height - crop_h, endpoint=True))
        left = int(rng.integers(width - crop_w, endpoint=True))
        return left, top, left + crop_w, top + crop_h

    def jitter(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        """Colours of u8[h,w,3]: brightness, contrast, saturation, hue, in this order.

        All four are linear in the colours, so that one matrix does them (0.3 ms at 256x256, where
        PIL's enhancers and its HSV take 3.5 ms) and values are clipped once.
        """
        if not any((self.brightness, self.contrast, self.saturation, self.hue)):
            return image
        bright, contrast, saturation = (
            rng.uniform(1 - strength, 1 + strength)
            for strength in (self.brightness, self.contrast, self.saturation)
        )
        angle = 2 * np.pi * rng.uniform(-self.hue, self.hue)
        sine, cosine = np.sin(angle), np.cos(angle)
        turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
        scale = np.diag([1, saturation, saturation])
        colour = np.linalg.inv(_YIQ) @ turn @ scale @ _YIQ
        # A sixteenth of the pixels is enough for the mean grey that contrast spreads from.
        grey = bright * _YIQ[0] @ image[::4, ::4].mean(axis=(0, 1))
        matrix = np.empty((3, 4))
        matrix[:, :3] = bright * contrast * colour
        matrix[:, 3] = (1 - contrast) * grey
        return np.array(Image.fromarray(image).convert("RGB", tuple(matrix.ravel())))

    def apply(
        self,
        images: Sequence[np.ndarray],
        regions: Sequence[Region],
        rng: np.random.Generator,
        crop: bool = True,
    ) -> tuple[tuple[np.ndarray, ...], tuple[Region, ...]]:
        """Augments a sample, each image on its own.

        A crop that a point or way-point in the image would leave, or that keeps less than
        ``min_visible`` of a box, is not used: another is drawn, in the end none.

        Args:
          images: u8[h,w,3] each.
          regions: of all images, in their original pixels.
          rng: of this sample alone.
          crop: False leaves the images whole, and changes their colours only.

        Returns:
          Images of the same sizes, and the regions in their new pixels; boxes are clipped.
        """
        augmented, moved = [], list(regions)
        for number, image in enumerate(images):
            height, width = image.shape[:2]
            own = {i: region for i, region in enumerate(regions) if region.image == number}
            box = (0, 0, width, height)
            for _ in range(_TRIES if crop else 0):
                drawn = self.crop_box(rng, height, width)
                if all(self._keeps(region, drawn, (width, height)) for region in own.values()):
                    box = drawn
                    break
            left, top, right, bottom = box
            for i, region in own.items():
                moved[i] = _moved(region, box, (width, height))
            resized = resize(image[top:bottom, left:right], height, width)
            augmented.append(self.jitter(rng, resized))
        return tuple(augmented), tuple(moved)

    def _keeps(self, region: Region, crop: Crop, size: tuple[int, int]) -> bool:
        low, high = np.array(crop[:2]), np.array(crop[2:])
        points = region.coordinates
        if region.kind == "box":
            # Of what the image shows of it; without extent it must only be inside.
            box = np.clip(points, 0, size)
            kept = np.clip(points, np.maximum(low, 0), high)
            extent, left_over = (np.prod(corners[1] - corners[0]) for corners in (box, kept))
            if extent > 0:
                return bool(left_over >= self.min_visible * extent and left_over > 0)
        seen = ((points >= 0) & (points < size)).all(axis=1)
        return bool(((points >= low) & (points < high)).all(axis=1)[seen].all())


def _side(pixels: int, share: float) -> int:
    return min(pixels, max(1, round(pixels * float(share))))


def _moved(region: Region, crop: Crop, size: tuple[int, int]) -> Region:
    """The region in pixels of the crop after its resize to (width, height) ``size``."""
    origin, extent = np.array(crop[:2]), np.array(crop[2:]) - crop[:2]
    coordinates = (region.coordinates - origin) * (np.array(size) / extent)
    if region.kind == "box":
        coordinates = np.clip(coordinates, 0, size)
    return dataclasses.replace(region, coordinates=coordinates.astype(np.float32))
