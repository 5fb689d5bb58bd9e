"""Lengths of real samples under the paper's settings, measured with Qwen's own tokenizer.

The source of the constants in st4vla_jax/bench_mixture.py.  Robot samples and questions are read
from ../shared/data; records of the spatial formats cannot be had here, so theirs are written below
after each data set's protocol (spec data.md section 6): phrases of RefCOCO's kind over COCO's
usual image sizes, RoboPoint's question with its list of points, A0's five way-points.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from st4vla_jax.data.answers import answer_text
from st4vla_jax.data.encoder import SampleEncoder, prepared_size
from st4vla_jax.data.image import ImageConfig, num_cells
from st4vla_jax.data.oxe import SPECS
from st4vla_jax.data.rlds import RldsSource
from st4vla_jax.data.source import Region, Turn
from st4vla_jax.data.tokenizer import Tokenizer

IMAGES = ImageConfig(size=(224, 224), min_pixels=784, max_pixels=50_176)  # upstream.md 3.3

COCO = ((480, 640), (640, 480), (427, 640), (640, 427), (375, 500), (480, 640))
PHRASES = (
    "the cup", "left man", "red car on the right", "woman in white shirt holding an umbrella",
    "a brown and white cow standing behind the fence", "pizza closest to us",
    "second zebra from left",
    "the silver laptop that is open on the wooden desk next to a mug", "guy with glasses",
    "bottom right donut with sprinkles", "a boy riding a skateboard down a set of stairs",
    "blue bus",
)  # fmt: skip
SPOTS = (
    "the vacant area to the left of the bowl", "the free space between the two plates",
    "a place on the table in front of the kettle", "the handle of the drawer",
    "an empty spot on the middle shelf", "the area behind the blue mug",
)  # fmt: skip
TASKS = (
    "pick up the apple and place it into the basket", "open the drawer", "push the red button",
    "move the spoon to the left of the pot", "stack the green block on the yellow block",
    "close the lid of the box",
)  # fmt: skip


def _region(kind: str, rng: np.random.Generator, count: int, size, label: str = "") -> Region:
    height, width = size
    points = np.sort(rng.uniform(0.05, 0.95, (count, 2)), axis=0) * (width, height)
    return Region(kind, points.astype(np.float32), label=label)


def conversations() -> dict[str, list[tuple[tuple[Turn, ...], tuple[int, int]]]]:
    """{kind: [(turns, (height, width) of the image)]}."""
    rng = np.random.default_rng(0)
    found: dict[str, list] = {"box": [], "point": [], "trajectory": []}
    for i, phrase in enumerate(PHRASES):
        size = COCO[i % len(COCO)]
        box = _region("box", rng, 2, size, phrase)
        question = f"<image>Locate {phrase}, output its bbox coordinates in JSON format."
        found["box"].append(
            ((Turn("user", question), Turn("assistant", answer_text(1), (box,))), size)
        )
    for i, spot in enumerate(SPOTS):
        count = 3 + i
        points = tuple(_region("point", rng, 1, COCO[i]) for _ in range(count))
        question = (
            f"<image>Find {count} points within {spot}. Your answer should be formatted as a list "
            "of tuples, i.e. [(x1, y1), (x2, y2), ...], where each tuple contains the x and y "
            "coordinates of a point satisfying the conditions above."
        )
        answer = "[" + ", ".join(["<coordinates>"] * count) + "]"
        turns = (Turn("user", question), Turn("assistant", answer, points))
        found["point"].append((turns, COCO[i]))
    for task in TASKS:
        path = _region("trajectory", rng, 5, (480, 640), task)
        question = f"<image>Predict the trajectory of the end effector to {task}."
        turns = (Turn("user", question), Turn("assistant", answer_text(1), (path,)))
        found["trajectory"].append((turns, (480, 640)))
    return found


def _questions(folder: Path) -> list[tuple[tuple[Turn, ...], tuple[int, int]]]:
    roles = {"human": "user", "gpt": "assistant"}
    found = []
    for record in json.loads((folder / "single_images.json").read_text()):
        turns = tuple(Turn(roles[t["from"]], t["value"]) for t in record["conversations"])
        with Image.open(folder / record["image"]) as image:
            found.append((turns, image.size[::-1]))
    return found


def measured(shared: Path, index_dir: Path) -> tuple[dict[int, int], dict[str, list[tuple]]]:
    """Robot {text tokens: samples}; grounding {kind: [(height, width, text, targets)]}.

    Heights and widths are those after smart_resize; text tokens leave out the image's cells.
    """
    data = shared / "data"
    encoder = SampleEncoder(Tokenizer.load(data / "qwen2_5_tokenizer"), image_config=IMAGES)
    bridge = RldsSource(data / "bridge_dataset", SPECS["bridge_orig"], index_dir=index_dir)
    robot = Counter((bridge.lengths(encoder).tokens - 64).tolist())
    spoken = conversations() | {"question": _questions(data / "llava_demo")}
    grounding = {}
    for kind, pairs in spoken.items():
        lengths = encoder.conversation_lengths([t for t, _ in pairs], [[s] for _, s in pairs])
        sizes = [prepared_size(*size, encoder.conversation_images) for _, size in pairs]
        grounding[kind] = [
            (h, w, int(n) - num_cells(h, w), int(m))
            for (h, w), n, m in zip(sizes, lengths.tokens, lengths.targets, strict=True)
        ]
    return dict(sorted(robot.items())), grounding
