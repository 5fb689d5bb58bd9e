"""In-memory sources: robot episodes and grounding records, made from their index alone."""

import hashlib
import json

import numpy as np

from st4vla_jax.data.encoder import SampleEncoder
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import (
    ActionSpec,
    EmbodimentStatistics,
    FieldStatistics,
    Statistics,
)
from st4vla_jax.data.prompts import TEMPLATES, PromptConfig
from st4vla_jax.data.source import Lengths, Region, RobotStep, Sample, Turn
from st4vla_jax.data.tokenizer import byte_level_tokenizer

CHUNK = 4
IMAGES = ImageConfig(min_pixels=784, max_pixels=50176)


def field(size, mask):
    moments = {"mean": 0.0, "std": 1.0, "max": 2.0, "min": -2.0, "q01": -1.0, "q99": 1.0}
    values = {name: np.full(size, value) for name, value in moments.items()}
    return FieldStatistics(**values, mask=np.array(mask))


STATISTICS = Statistics(
    {"arm": EmbodimentStatistics(field(7, [True] * 6 + [False]), field(5, [True] * 5), 100, 10)}
)


def encoder(template="paper", **settings) -> SampleEncoder:
    defaults = {
        "image_config": IMAGES, "dino_size": 28, "statistics": STATISTICS,
        "embodiments": {"arm": ActionSpec()}, "chunk": CHUNK, "state_dim": 5,
        "groups": ("arm", "boxes", "talk"),
    }  # fmt: skip
    prompt = PromptConfig(TEMPLATES.get(template, template))
    return SampleEncoder(byte_level_tokenizer(), prompt, **{**defaults, **settings})


class ArmSource:
    """Episodes of 5 to 14 steps, one instruction each; pixels tell the step."""

    def __init__(self, episodes=30, name="arm", side=56, seed=0):
        rng = np.random.default_rng(seed)
        self.name, self.side, self.seed = name, side, seed
        self.lengths_of = rng.integers(5, 15, episodes)
        self.instructions = ["move " + "x" * int(n) for n in rng.integers(0, 12, episodes)]
        self.episode = np.repeat(np.arange(episodes), self.lengths_of)

    def __len__(self):
        return len(self.episode)

    def episodes(self):
        return self.episode

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        return Sample(
            images=(rng.integers(0, 256, (self.side, self.side, 3), np.uint8),),
            turns=(Turn("user", self.instructions[self.episode[index]]),),
            robot=RobotStep(
                actions=rng.normal(size=(CHUNK, 7)).astype(np.float32),
                action_mask=np.ones(CHUNK, bool),
                state=rng.normal(size=5).astype(np.float32),
                embodiment="arm",
            ),
            group="arm",
            record=f"{self.name} step {index}",
        )

    def lengths(self, encoder) -> Lengths:
        sizes = np.full((len(self), 1, 2), self.side, np.int32)
        return encoder.robot_lengths(self.instructions, self.episode, sizes)

    def fingerprint(self):
        return digest(self.name, self.seed, len(self.lengths_of), self.side)


class BoxSource:
    """Grounding records of several sizes, questions and numbers of boxes."""

    def __init__(self, count=120, name="boxes", group="boxes", seed=1):
        self.name, self.group, self.count, self.seed = name, group, count, seed

    def __len__(self):
        return self.count

    def _content(self, index):
        rng = np.random.default_rng([self.seed, index])
        size = [(56, 84), (112, 56), (84, 84)][rng.integers(3)]
        boxes = tuple(
            Region("box", np.sort(rng.uniform(0, 50, (2, 2)), axis=0).astype(np.float32))
            for _ in range(rng.integers(1, 4))
        )
        turns = (
            Turn("user", "<image>Where" + "?" * int(rng.integers(1, 40))),
            Turn("assistant", "<region>" * len(boxes), boxes),
        )
        return rng, size, turns

    def __getitem__(self, index):
        rng, size, turns = self._content(index)
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        return Sample((image,), turns, None, self.group, f"{self.name} line {index}")

    def lengths(self, encoder) -> Lengths:
        contents = [self._content(i) for i in range(self.count)]
        return encoder.conversation_lengths([c[2] for c in contents], [[c[1]] for c in contents])

    def fingerprint(self):
        return digest(self.name, self.group, self.count, self.seed)


def digest(*settings) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()
