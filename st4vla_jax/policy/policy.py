"""A policy loaded from a checkpoint: images and words in, an action chunk or an answer out.

Everything that decides what the model sees (prompt template, image size, tokenizer, statistics)
comes from the checkpoint's meta, so that what serves is what was trained (DESIGN.md D11).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from st4vla_jax.batch import Batch
from st4vla_jax.checkpoint import STATISTICS, Meta, read_meta, read_params
from st4vla_jax.config import DTypes, Runtime
from st4vla_jax.data.image import ImageConfig, prepare
from st4vla_jax.data.normalize import EmbodimentStatistics, Statistics
from st4vla_jax.data.packing import Capacity, RobotArrays, pack
from st4vla_jax.data.prompts import IMAGE
from st4vla_jax.data.source import Turn
from st4vla_jax.data.tokenizer import Tokenizer
from st4vla_jax.data.transforms import Encoded, dino_views, encode, encode_robot, sized_views
from st4vla_jax.eval.parse import Answer, parse_answer
from st4vla_jax.models.decode import generate
from st4vla_jax.models.diffusion import ddim_indices
from st4vla_jax.models.st4vla import ST4VLA

NOISE_LIMIT = 100.0  # standard deviations: anything beyond is not noise
TOKEN_MULTIPLE = 64  # prompts are padded to it, so that a few words more do not recompile


class PolicyError(ValueError):
    """A request that this checkpoint cannot serve; says what it could."""


@dataclasses.dataclass(frozen=True)
class ActionResult:
    """One action chunk.

    Attributes:
      normalized_actions: f32[1,C,A] as the model gives them.
      actions: f32[1,C,A] in raw units.
      embodiment: whose statistics were used; mode: their normalisation mode.
      timings: seconds by phase; "compile" is 0 once a prompt of this padded length was seen.
    """

    normalized_actions: np.ndarray
    actions: np.ndarray
    embodiment: str
    mode: str
    timings: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ChatResult:
    """One answer.

    Attributes:
      text: the answer without control tokens.
      answer: boxes and points in it, in pixels of the resized images.
      scales: for each image, (x, y) factors from the resized to the original pixels.
      timings: seconds by phase.
    """

    text: str
    answer: Answer
    scales: tuple[tuple[float, float], ...]
    timings: dict[str, float]


def default_runtime() -> Runtime:
    """bfloat16 matmuls on accelerators; float32 on CPU, where bfloat16 is not faster."""
    compute = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return Runtime(dtypes=DTypes(compute=compute), remat="none")


class Policy:
    """A model with its parameters, tokenizer and statistics.

    Attributes:
      model: the functions; params: the plain parameter dict; meta: what the checkpoint says.
      tokenizer: the one it was trained with; statistics: by embodiment, None for a VLM alone.
    """

    def __init__(
        self,
        model: ST4VLA,
        params: dict[str, Any],
        meta: Meta,
        tokenizer: Tokenizer,
        statistics: Statistics | None = None,
    ) -> None:
        self.model, self.params, self.meta = model, params, meta
        self.tokenizer, self.statistics = tokenizer, statistics
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def load(cls, directory: Path | str, runtime: Runtime | None = None) -> Policy:
        """Reads a checkpoint onto the first device, in its stored dtypes (float32 on CPU).

        Raises:
          CheckpointError: no complete checkpoint there, or one of a newer format.
          TokenizerError: its tokenizer is missing or not Qwen's.
          StatisticsError: its statistics are unusable.
        """
        directory = Path(directory)
        meta = read_meta(directory)
        tokenizer = Tokenizer.load(directory / "meta" / "tokenizer")
        path = directory / "meta" / STATISTICS
        statistics = Statistics.load(path) if path.is_file() else None
        model = ST4VLA(meta.model, runtime or default_runtime())
        # XLA's CPU backend has no bfloat16 matmul: it would keep a float32 copy of every layer
        # beside the stored one (22 GB for a 3B model instead of 15).
        dtype = jnp.float32 if jax.default_backend() == "cpu" else None
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = read_params(directory, device, dtype)
        return cls(model, params, meta, tokenizer, statistics)

    def act(
        self,
        images: Sequence[np.ndarray],
        instruction: str,
        *,
        embodiment: str | None = None,
        state: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        seed: int = 0,
        cfg_scale: float = 1.5,
        ddim_steps: int = 10,
    ) -> ActionResult:
        """Samples one action chunk.

        Args:
          images: u8[h,w,3] views, in the order that the policy was trained with.
          instruction: the task; the checkpoint's prompt template is put around it.
          embodiment: key of the statistics; None if the checkpoint has one only.
          state: f32[S] raw proprioception, for a model with a state encoder.
          noise: f32[1,C,A] start of the sampler; None draws it from ``seed``.
          seed: of the noise.
          cfg_scale: guidance scale, at least 1.
          ddim_steps: denoising steps.

        Raises:
          PolicyError, StatisticsError, PromptError, ImageError, ValueError: what is wrong with
            the request and what the checkpoint has.
        """
        start = time.perf_counter()
        cfg = self.meta.model
        if IMAGE in instruction:
            raise PolicyError(f"the instruction contains {IMAGE}; views are put before it already")
        if not cfg.has_action:
            raise PolicyError("this checkpoint is a vision-language model alone: it has no actions")
        ddim_indices(ddim_steps, cfg.dit.diffusion_steps)
        embodiment, statistics = self.choose_embodiment(embodiment)
        noise = self._noise(noise, seed)
        mode = self.meta.action.mode
        state = self.normalize_state(state, statistics)
        batch = self._pack([self.encode_observation(images, instruction, state)])
        prepared = time.perf_counter()
        sample = functools.partial(
            self.model.sample_actions, cfg_scale=cfg_scale, num_steps=ddim_steps
        )
        run, compile_s = self._compile(("act", cfg_scale, ddim_steps), sample, batch, noise[None])
        started = time.perf_counter()
        normalized = np.asarray(run(self.params, batch, noise[None]))[0]
        timings = {
            "preprocess": prepared - start,
            "compile": compile_s,
            "policy": time.perf_counter() - started,
        }
        if not np.isfinite(normalized).all():
            raise PolicyError(
                "the model gave actions that are not finite: its parameters are damaged, or its "
                "tokenizer has ids beyond its vocabulary (python -m convert_weights.verify)"
            )
        actions = statistics.action.unnormalize(normalized, mode)
        return ActionResult(normalized, actions, embodiment, mode, timings)

    def chat(
        self,
        images: Sequence[np.ndarray],
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> ChatResult:
        """Answers a prompt about images; without ``<image>`` in it, the images come first.

        Raises:
          PromptError, ImageError, ValueError: what is wrong with the request.
        """
        start = time.perf_counter()
        text = prompt if IMAGE in prompt else IMAGE * len(images) + prompt
        # The fixed size is for robots' views: grounding was trained on whole images.
        image_config = dataclasses.replace(self.meta.image, size=None)
        encoded = encode(
            [Turn("user", text)], images, self.tokenizer, system=self.meta.prompt.system,
            image_config=image_config, add_generation_prompt=True, supervise=False,
            record="--prompt",
        )  # fmt: skip
        batch = self._pack([(encoded, None)])
        prepared = time.perf_counter()
        options = {
            "max_new_tokens": max_new_tokens,
            "stop_ids": (self.tokenizer.im_end, self.tokenizer.pad),
            "temperature": temperature,
            "top_p": top_p,
        }

        def answer(params, batch, key):
            return generate(self.model.vlm, params["vlm"], batch.vlm, key=key, **options)

        key = jax.random.key(seed)
        run, compile_s = self._compile(("chat", *options.values()), answer, batch, key)
        started = time.perf_counter()
        out = jax.device_get(run(self.params, batch, key))
        timings = {
            "preprocess": prepared - start,
            "compile": compile_s,
            "generate": time.perf_counter() - started,
        }
        text = self.tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist()).strip()
        return ChatResult(text, parse_answer(text), _scales(images, image_config), timings)

    def _compile(self, name: Any, fn: Any, batch: Batch, extra: Any) -> tuple[Any, float]:
        """Compiled ``fn(params, batch, extra)`` for these shapes, and the seconds that it took."""
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (batch, extra))
        key = (name, str(shapes))
        if key in self._compiled:
            return self._compiled[key], 0.0
        start = time.perf_counter()
        self._compiled[key] = jax.jit(fn).lower(self.params, batch, extra).compile()
        return self._compiled[key], time.perf_counter() - start

    def choose_embodiment(self, embodiment: str | None) -> tuple[str, EmbodimentStatistics]:
        """Key and statistics; None is the only one there is.  Raises as `act`."""
        if self.statistics is None:
            raise PolicyError(
                "this checkpoint has no dataset_statistics.json: actions cannot be un-normalised "
                "(convert it again with --statistics)"
            )
        if embodiment is None:
            if len(self.statistics) != 1:
                raise PolicyError(
                    f"--embodiment is needed, one of {', '.join(sorted(self.statistics))}"
                )
            (embodiment,) = self.statistics
        return embodiment, self.statistics[embodiment]

    def _noise(self, noise: np.ndarray | None, seed: int) -> np.ndarray:
        shape = (1, self.meta.model.dit.chunk, self.meta.model.dit.action_dim)
        if noise is None:
            return np.random.default_rng(seed).standard_normal(shape, np.float32)
        if noise.shape != shape or noise.dtype.kind != "f":
            raise PolicyError(
                f"noise of shape {noise.shape} and dtype {noise.dtype}, this policy needs floats "
                f"of shape {shape}"
            )
        if not np.abs(noise).max() < NOISE_LIMIT:
            raise PolicyError(f"noise must be standard normal; it has values beyond {NOISE_LIMIT}")
        return noise.astype(np.float32)

    def normalize_state(
        self, state: np.ndarray | None, statistics: EmbodimentStatistics
    ) -> np.ndarray | None:
        """Raw proprioception f32[S] as the model takes it; None without a state encoder."""
        size = self.meta.model.bridge.state_dim
        if not size:
            if state is not None:
                raise PolicyError("this policy has no state encoder, but a state is given")
            return None
        if state is None or np.shape(state) != (size,) or statistics.state is None:
            given = "none" if state is None else str(np.shape(state))
            raise PolicyError(
                f"this policy needs a state of shape ({size},) and statistics of it; "
                f"state given: {given}, statistics: {statistics.state is not None}"
            )
        return statistics.state.normalize(np.asarray(state, np.float32), self.meta.action.mode)

    def encode_observation(
        self, images: Sequence[np.ndarray], instruction: str, state: np.ndarray | None
    ) -> tuple[Encoded, RobotArrays]:
        """One robot sample to pack: u8[h,w,3] views, the bare instruction, normalised state."""
        meta = self.meta
        images = sized_views(images, meta.image)
        encoded = encode_robot(
            instruction, images, meta.prompt, self.tokenizer, image_config=meta.image,
            record="--instruction",
        )  # fmt: skip
        shape = (meta.model.dit.chunk, meta.model.dit.action_dim)
        robot = RobotArrays(
            dino_images=dino_views(images, meta.model.dino.image_size),
            view_mask=np.ones(len(images), bool),
            state=state,
            actions=np.zeros(shape, np.float32),
            action_mask=np.ones(shape, bool),
        )
        return encoded, robot

    def _pack(self, row: list[tuple[Encoded, RobotArrays | None]]) -> Batch:
        capacity = Capacity.fit([row], token_multiple=TOKEN_MULTIPLE)
        if capacity.robot:
            capacity = dataclasses.replace(capacity, sample_tokens=capacity.tokens)
        return pack([row], capacity, pad_id=self.tokenizer.pad)


def _scales(images: Sequence[np.ndarray], cfg: ImageConfig) -> tuple[tuple[float, float], ...]:
    """(x, y) factors from each resized image to its original pixels."""
    sizes = [(image.shape, prepare(image, cfg).shape) for image in images]
    return tuple((old[1] / new[1], old[0] / new[0]) for old, new in sizes)
