"""A tiny policy with random weights everywhere, and packed batches of made-up samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from st4vla_jax.config import FLOAT32, ModelConfig, model_config
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.packing import Capacity, RobotArrays, pack
from st4vla_jax.data.prompts import PromptConfig
from st4vla_jax.data.source import Turn
from st4vla_jax.data.tokenizer import byte_level_tokenizer
from st4vla_jax.data.transforms import dino_views, encode, encode_robot
from st4vla_jax.models.st4vla import ST4VLA
from st4vla_jax.sharding import unbox

TOKENIZER = byte_level_tokenizer()
PROMPT = PromptConfig(template="do {instruction}", system="hi")
IMAGES = ImageConfig(min_pixels=56 * 56)


def tiny_config(**bridge) -> ModelConfig:
    return model_config("tiny", "tiny", "tiny", bridge=bridge)


def tiny_policy(**bridge) -> ST4VLA:
    """In f32, without rematerialisation: half the program to compile."""
    return ST4VLA(tiny_config(**bridge), dataclasses.replace(FLOAT32, remat="none"))


def random_params(model: ST4VLA, seed: int = 0):
    """Random numbers in every leaf: nothing is zero, the DiT's final layer included."""
    rng = np.random.default_rng(seed)

    def fill(path, shape):
        spread = 0.1 * rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(spread + (path[-1].key in ("scale", "gamma")))

    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def picture(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def robot_sample(cfg: ModelConfig, seed: int, sizes=((56, 84),), views=None):
    """(Encoded, RobotArrays) with one image for each of ``sizes`` and a partly masked chunk."""
    rng = np.random.default_rng(seed)
    images = [picture(rng, *size) for size in sizes]
    shape = (cfg.dit.chunk, cfg.dit.action_dim)
    state = rng.standard_normal(cfg.bridge.state_dim) if cfg.bridge.state_dim else None
    encoded = encode_robot(
        f"take {'it ' * (seed % 4)}{seed}", images, PROMPT, TOKENIZER, image_config=IMAGES
    )
    return encoded, RobotArrays(
        dino_images=dino_views(images, cfg.dino.image_size),
        view_mask=np.ones(len(images), bool),
        state=None if state is None else state.astype(np.float32),
        actions=rng.uniform(-1, 1, shape).astype(np.float32),
        action_mask=np.arange(cfg.dit.chunk)[:, None].repeat(shape[1], 1) < 5 + seed % 4,
    )


def grounding_sample(seed: int, size=(84, 56)):
    rng = np.random.default_rng(seed)
    turns = [Turn("user", "<image>where?"), Turn("assistant", f"({seed}, {seed + 7})")]
    images = [picture(rng, *size)]
    return encode(
        turns, images, TOKENIZER, system="hi", image_config=IMAGES,
        add_generation_prompt=False, supervise=True,
    ), None  # fmt: skip


def tiny_rows(cfg: ModelConfig, rows: int = 2):
    """Rows of two robot samples (one with two views) and a grounding sample, in mixed order."""
    return [
        [
            robot_sample(cfg, 3 * i),
            grounding_sample(3 * i + 1),
            robot_sample(cfg, 3 * i + 2, sizes=((56, 56), (84, 56)) if i % 2 else ((84, 84),)),
        ]
        for i in range(rows)
    ]


def tiny_batch(cfg: ModelConfig, rows: int = 2, **kwargs):
    packed = tiny_rows(cfg, rows)
    capacity = Capacity.fit(packed, token_multiple=16)
    return jax.tree.map(jnp.asarray, pack(packed, capacity, pad_id=TOKENIZER.pad, **kwargs))
