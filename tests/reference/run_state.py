"""A small train state with moments, and an update that numpy can follow bit by bit."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from st4vla_jax.checkpoint import Meta
from st4vla_jax.config import model_config
from st4vla_jax.data.image import ImageConfig
from st4vla_jax.data.normalize import ActionSpec
from st4vla_jax.data.prompts import PromptConfig
from st4vla_jax.state import TrainState
from st4vla_jax.train_checkpoints import CheckpointSettings, TrainCheckpoints

META = Meta(
    model=model_config("tiny", "tiny", "tiny"),
    prompt=PromptConfig("Do {instruction}!"),
    image=ImageConfig(size=(56, 84)),
    action=ActionSpec(mode="min_max"),
)
FILES = {"dataset_statistics.json": b"{}", "tokenizer/tokenizer.json": b"[]"}
RUN = {"config": {"seed": 1}, "data_fingerprint": "ab", "trainable": ["vlm/a"]}


def numpy_state(step: int = 0, ema: bool = True) -> TrainState:
    """Distinct numbers in every leaf; bf16 moments; some parameters frozen beside trained ones."""
    rng = np.random.default_rng(step)
    params = {
        "vlm": {"a": rng.standard_normal((16, 8), np.float32), "b": np.ones(3, np.float32)},
        "dit": {"c": rng.standard_normal((2, 8), np.float32)},
    }
    frozen = {"vlm": {"visual": {"d": rng.standard_normal((8, 4), np.float32)}}}
    moments = optax.adamw(1e-3, mu_dtype=jnp.bfloat16).init(jax.tree.map(jnp.asarray, params))
    moments = jax.tree.map(lambda x: np.asarray(x) + np.asarray(step + 1, x.dtype), moments)
    state = TrainState(np.int32(step), params, frozen, moments, None, np.int32(step % 5))
    return state.replace(ema=jax.tree.map(np.negative, params)) if ema else state


def update(state: TrainState) -> TrainState:
    """Exact in f32: halves and adds one, so that numpy makes the same bits."""
    params = jax.tree.map(lambda x: x * 0.5 + 1, state.params)
    return state.replace(step=state.step + 1, params=params)


def sharding(mesh: jax.sharding.Mesh, leaf) -> NamedSharding:
    """First axis over fsdp where it divides."""
    split = np.ndim(leaf) > 0 and np.shape(leaf)[0] % mesh.shape["fsdp"] == 0
    return NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())


def on_mesh(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """The same state as arrays of a mesh, which may span processes."""

    def put(x):
        return jax.make_array_from_callback(np.shape(x), sharding(mesh, x), lambda i: x[i])

    return jax.tree.map(put, state)


def abstract(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding(mesh, x)), state
    )


def open_checkpoints(workdir: Path, **settings) -> TrainCheckpoints:
    settings = dataclasses.replace(CheckpointSettings(), **settings)
    return TrainCheckpoints(workdir, settings, META, FILES)


def assert_same(found: TrainState, wanted: TrainState) -> None:
    """Structure, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, x), y in pairs:
        assert x.dtype == y.dtype, path
        assert np.array_equal(np.asarray(x), np.asarray(y)), path
