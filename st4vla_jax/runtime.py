"""How to compute, never what: precision, layout, rematerialisation, kernels, tile sizes."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax.numpy as jnp

from st4vla_jax.sharding import Rules

ATTENTION_KERNELS = ("auto", "xla", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class DTypes:
    """The one place for precision: ``params`` as stored for training, ``compute`` for matmuls.

    ``action`` is the DiT's matmul dtype: upstream runs it in float32 (spec 1.9).  Norms, softmax,
    losses and diffusion arithmetic are float32 always.
    """

    params: Any = jnp.float32
    compute: Any = jnp.bfloat16
    action: Any = jnp.float32


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How to compute.

    Attributes:
      remat: "none", "dots", "dots_decoder", "dots_decoder_mlp", "full" or "full_keep_weights"
        (models/layers.py).
      query_chunk: rows of queries that XLA's full attention handles at a time; 0 = all.
      vocab_tile: vocabulary entries of one tile of the next-token loss.
      attention: kernel of the language model and the vision tower (models/attention.py): "xla",
        "cudnn" (GPU), "splash" (TPU), or "auto", the platform's own.

    Raises:
      ValueError: ``attention`` is not one of these.
    """

    dtypes: DTypes = DTypes()
    rules: Rules = Rules()
    remat: str = "full"
    query_chunk: int = 1024
    vocab_tile: int = 16_384
    attention: str = "auto"

    def __post_init__(self):
        if self.attention not in ATTENTION_KERNELS:
            near = difflib.get_close_matches(self.attention, ATTENTION_KERNELS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            names = ", ".join(ATTENTION_KERNELS)
            raise ValueError(
                f"unknown attention kernel {self.attention!r}{hint} (there are {names})"
            )


FLOAT32 = Runtime(dtypes=DTypes(compute=jnp.float32))
