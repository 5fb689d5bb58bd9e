"""What ``bench step`` can run: presets of sizes, and jobs read from text."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from st4vla_jax.config import (
    FLOAT32,
    BridgeConfig,
    DinoConfig,
    ModelConfig,
    Runtime,
    TextConfig,
    VisionConfig,
    model_config,
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes and jobs.

    Attributes:
      cfg: model sizes.
      runtime: what jax jobs start from.
      device: torch's name of the device kind.
      jobs: run unless others are given.
    """

    cfg: ModelConfig
    runtime: Runtime
    device: str
    jobs: tuple[str, ...]


def _mid_size() -> ModelConfig:
    """About 100 M parameters in the proportions of the full size."""
    full = model_config("3b", "s", "s")
    vision = VisionConfig(
        depth=8, hidden_size=384, intermediate_size=1024, num_heads=6,
        fullatt_block_indexes=(3, 7), out_hidden_size=768,
    )  # fmt: skip
    text = TextConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=3072, num_hidden_layers=7,
        num_attention_heads=12, num_key_value_heads=2, head_dim=64, mrope_section=(8, 12, 12),
    )  # fmt: skip
    dino = DinoConfig(hidden_size=192, num_heads=3, mlp_size=768)
    bridge = BridgeConfig(start_layer=7, end_layer=8, hidden_size=384)
    return dataclasses.replace(full, vision=vision, text=text, dino=dino, bridge=bridge).check()


def presets() -> dict[str, Preset]:
    """By name."""
    cpu, tiny = "robot=8,grounding=2", "robot=4,grounding=2"
    none = dataclasses.replace(FLOAT32, remat="none")
    return {
        "cpu-100m": Preset(
            _mid_size(), none, "cpu",
            (f"torch:{cpu}", f"jax:{cpu}", f"jax:{cpu},layout=padded", f"jax:{cpu},layout=split",
             f"jax:{cpu},logits=all", f"torch:{cpu},idle_logits=0"),
        ),
        "tiny": Preset(
            model_config("tiny", "tiny", "tiny"), none, "cpu", (f"torch:{tiny}", f"jax:{tiny}")
        ),
        "gpu-3b": Preset(
            model_config("3b", "s", "b"), Runtime(remat="dots"), "cuda",
            ("torch:robot=32,grounding=8", "torch:robot=40,grounding=10",
             "torch:robot=128,grounding=32,checkpoint=1",
             "torch:robot=32,grounding=8,vision=varlen",
             "jax:robot=80,grounding=20", "jax:robot=32,grounding=8,remat=none",
             "jax:robot=256,grounding=64,remat=full"),
        ),
    }  # fmt: skip


class JobError(ValueError):
    """A job that cannot be understood; says what is."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One side with its options."""

    text: str
    side: str
    options: Any

    @classmethod
    def parse(cls, text: str) -> Job:
        """Reads "side:name=value,name=value"; raises JobError."""
        side, _, rest = text.partition(":")
        if side == "torch":
            from st4vla_jax.bench_torch_step import StepOptions
        elif side == "jax":
            from st4vla_jax.bench_jax_step import StepOptions
        else:
            raise JobError(f"job {text!r}: {side!r} is neither 'torch' nor 'jax'")
        fields = {f.name: f.type for f in dataclasses.fields(StepOptions)}
        values, problems = {}, []
        for pair in filter(None, rest.split(",")):
            name, _, value = pair.partition("=")
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = (
                    f"; did you mean {near[0]!r}?" if near else f" (there are {', '.join(fields)})"
                )
                problems.append(f"unknown option {name!r}{hint}")
            elif fields[name] != "str" and not value.isdigit():
                problems.append(f"{name} is {value!r}, expected a whole number")
            else:
                kinds = {"int": int, "bool": lambda v: bool(int(v)), "str": str}
                values[name] = kinds[fields[name]](value)
        problems += [f"{n} is missing" for n in ("robot", "grounding") if n not in values]
        if problems:
            raise JobError(f"job {text!r}: " + "; ".join(problems))
        return cls(text, side, StepOptions(**values))


def parse_jobs(texts: Sequence[str]) -> list[Job]:
    """All jobs; raises one JobError with every problem."""
    jobs, problems = [], []
    for text in texts:
        try:
            jobs.append(Job.parse(text))
        except JobError as error:
            problems.append(str(error))
    if problems:
        raise JobError("\n".join(problems))
    return jobs
