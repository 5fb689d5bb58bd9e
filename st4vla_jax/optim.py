"""AdamW, or Muon, with learning rate, weight decay and schedule by parameter path.

One table decides for every parameter: the `Group` whose pattern matches most of its path, from the
start, owns it; a parameter that none matches, or two equally, is an error.  The optimizer itself is
`optax.scale_by_adam`; what a group says enters as scalars, one for each leaf, so that moments keep
the parameters' tree (DESIGN.md D7: no multi_transform, no MaskedNode).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from st4vla_jax.config import ConfigError
from st4vla_jax.state import Params, leaves_by_path, map_with_path

SCHEDULES = ("cosine", "linear", "constant")
RULES = ("adam", "muon")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Group:
    """What one group of parameters gets.

    Attributes:
      pattern: regular expression for the start of a path, e.g. "vlm/visual/|dino/".
      lr: peak learning rate.
      weight_decay: decoupled, times the learning rate (torch AdamW).
      rule: "adam", or "muon": kernels move by their orthogonalised momentum (`orthogonal`), all
        else by Adam.
      freeze: never updated: no gradient, no moments.
      schedule: one of SCHEDULES, from the peak to ``min_ratio`` of it.
      warmup: updates of linear warm-up from 0; -1 = the optimizer's.
      min_ratio: of the peak, at the last update.
    """

    pattern: str
    lr: float = 0.0
    weight_decay: float = 0.0
    rule: str = "adam"
    freeze: bool = False
    schedule: str = "cosine"
    warmup: int = -1
    min_ratio: float = 0.01

    def problems(self, name: str) -> list[str]:
        key = f"optim.groups.{name}"
        problems = []
        try:
            re.compile(self.pattern)
        except re.error as error:
            problems.append(f"{key}.pattern {self.pattern!r} is no regular expression ({error})")
        checks = {
            f"{key}.schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}": (
                self.schedule not in SCHEDULES
            ),
            f"{key}.rule {self.rule!r} must be one of {', '.join(RULES)}": self.rule not in RULES,
            f"{key}.lr {self.lr} must be positive (freeze = True keeps parameters as they are)": (
                not self.freeze and not 0 < self.lr < math.inf
            ),
            f"{key}.weight_decay {self.weight_decay} is negative": self.weight_decay < 0,
            f"{key}.min_ratio {self.min_ratio} is not in 0..1": not 0 <= self.min_ratio <= 1,
            f"{key}.warmup {self.warmup} is below -1": self.warmup < -1,
        }
        return problems + [text for text, bad in checks.items() if bad]

    def learning_rate(self, step: jax.Array | int, steps: int, warmup: int) -> jax.Array:
        """f32[] rate of update number ``step`` (from 0) of ``steps`` (spec upstream.md 3.2)."""
        warmup = warmup if self.warmup < 0 else self.warmup
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
        shape = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - progress,
            "constant": jnp.ones(()),
        }[self.schedule]
        factor = self.min_ratio + (1 - self.min_ratio) * shape
        return self.lr * jnp.where(step < warmup, step / max(1, warmup), factor)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (upstream's values; spec upstream.md 3.2) and what surrounds it.

    Attributes:
      groups: by name; the longest match owns a parameter, whatever their order.
      warmup: updates of linear warm-up.
      b1, b2, eps: Adam.
      clip: largest global norm of the trainable parameters' gradient; 0 = no clip.
      mu_dtype: dtype of the first moment; the second stays float32, as its small changes would
        round away.
      ema: decay of a moving average of the parameters; 0 keeps none.
      max_skipped: updates in a row that may be skipped because a gradient is not finite.
    """

    groups: Mapping[str, Group]
    warmup: int = 5000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    mu_dtype: str = "float32"
    ema: float = 0.0
    max_skipped: int = 10

    def problems(self) -> list[str]:
        found = [text for name, group in self.groups.items() for text in group.problems(name)]
        checks = {
            "optim.groups is empty": not self.groups,
            f"optim.b1 {self.b1} and b2 {self.b2} must be in [0, 1)": not (
                0 <= self.b1 < 1 and 0 <= self.b2 < 1
            ),
            f"optim.eps {self.eps} must be positive": self.eps <= 0,
            f"optim.clip {self.clip}, warmup {self.warmup} or max_skipped {self.max_skipped} is "
            "negative": min(self.clip, self.warmup, self.max_skipped) < 0,
            f"optim.ema {self.ema} is not in [0, 1)": not 0 <= self.ema < 1,
            f"optim.mu_dtype {self.mu_dtype!r} must be one of {', '.join(MOMENT_DTYPES)}": (
                self.mu_dtype not in MOMENT_DTYPES
            ),
        }
        return found + [text for text, bad in checks.items() if bad]


def matching(path: str, groups: Mapping[str, Group]) -> list[str]:
    """Names of the groups that match the longest part of a path; one, unless it is a mistake."""
    found = {name: re.match(group.pattern, path) for name, group in groups.items()}
    lengths = {name: match.end() for name, match in found.items() if match}
    return [name for name, end in lengths.items() if end == max(lengths.values())]


def group_of(path: str, groups: Mapping[str, Group]) -> str:
    """Name of the group that owns a path.

    Raises:
      ConfigError: none does, or two match equally much of it.
    """
    owners = matching(path, groups)
    if len(owners) != 1:
        raise ConfigError("\n".join(_path_problems(path, owners)))
    return owners[0]


def _path_problems(path: str, owners: Sequence[str]) -> list[str]:
    if len(owners) == 1:
        return []
    if not owners:
        return [f"optim.groups: no pattern matches parameter {path}"]
    return [f"optim.groups: {' and '.join(owners)} match equally much of parameter {path}"]


def coverage_problems(paths: Sequence[str], groups: Mapping[str, Group]) -> list[str]:
    """Parameters without a group and groups without a parameter."""
    owners = {path: matching(path, groups) for path in paths}
    problems = [text for path, own in owners.items() for text in _path_problems(path, own)]
    used = {name for own in owners.values() for name in own}
    problems += [
        f"optim.groups.{name}: {group.pattern!r} owns no parameter (a pattern matches from the "
        "start of a path, and the longest match owns it)"
        for name, group in groups.items()
        if name not in used
    ]
    if used and all(groups[name].freeze for name in used):
        problems.append("optim.groups: every parameter is frozen")
    return problems


def matrix_of(path: str, shape: Sequence[int]) -> MuonDimensionNumbers | None:
    """How a kernel is a matrix, or a stack of them; None for what is no kernel.

    Kernels are [in...,out...], those of stacked blocks with the blocks first.  Where several axes
    are the input (heads, head_dim of an output projection) is not told by the shape: the split that
    is most nearly square is taken.
    """
    axes = range(int("/blocks/" in path), len(shape))
    if path.rsplit("/", 1)[-1] != "kernel" or len(axes) < 2:
        return None
    sizes = [shape[axis] for axis in axes]
    cuts = range(1, len(sizes))
    cut = min(cuts, key=lambda c: abs(math.log(math.prod(sizes[:c]) / math.prod(sizes[c:]))))
    return MuonDimensionNumbers(tuple(axes)[:cut], tuple(axes)[cut:])


def orthogonal(momentum: jax.Array, matrix: MuonDimensionNumbers) -> jax.Array:
    """Muon's update: the momentum with all singular values near 1, scaled to Adam's size.

    Source: Jordan 2024 (five Newton-Schulz iterations, `optax.contrib.scale_by_muon`); by the
    factor 0.2 sqrt(larger side) of Liu et al. 2025 (arXiv 2502.16982) the learning rates of AdamW
    fit.  A kernel that is cut over devices is gathered for it.
    """
    whole = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=matrix)
    update, _ = whole.update(momentum, whole.init(momentum))
    sides = [
        math.prod(momentum.shape[axis] for axis in side)
        for side in (matrix.reduction_axis, matrix.output_axis)
    ]
    return update * 0.2 * math.sqrt(max(sides))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and Muon over the trainable parameters of a run of ``steps`` updates.

    Attributes:
      cfg: the table; steps: length of the schedules.
    """

    cfg: OptimConfig
    steps: int

    def is_trainable(self, path: str) -> bool:
        """True if a parameter is updated.

        Raises:
          ConfigError: see `group_of`.
        """
        name = group_of(path, self.cfg.groups)
        return not self.cfg.groups[name].freeze

    @property
    def adam(self) -> optax.GradientTransformation:
        cfg = self.cfg
        return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.dtype(cfg.mu_dtype))

    def init(self, params: Params) -> Any:
        """Zero moments for the trainable parameters."""
        return self.adam.init(params)

    def learning_rates(self, step: jax.Array | int) -> dict[str, jax.Array]:
        """{group: f32[]} at update number ``step``; frozen groups have none."""
        return {
            name: group.learning_rate(step, self.steps, self.cfg.warmup)
            for name, group in self.cfg.groups.items()
            if not group.freeze
        }

    def update(
        self, grads: Params, norm: jax.Array, opt_state: Any, params: Params, step: jax.Array
    ) -> tuple[Params, Any]:
        """One update: p <- p - lr (m / (sqrt(v) + eps) + wd p), after the clip.

        Of groups with the rule "muon" kernels have Nesterov's momentum, made orthogonal, in place
        of m / (sqrt(v) + eps); their second moments are kept, unread: all moments have one tree.

        Args:
          grads: gradients, like ``params``.
          norm: f32[] their global norm.
          opt_state: from `init` or the last update.
          params: trainable parameters.
          step: i32[] number of this update, from 0.

        Returns:
          new parameters and new moments.
        """
        if self.cfg.clip:
            factor = jnp.minimum(1.0, self.cfg.clip / (norm + 1e-6))  # torch's clip_grad_norm_
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, opt_state = self.adam.update(grads, opt_state, params)
        rates = self.learning_rates(step)

        def new_value(path, p, u, g, m):
            name = group_of(path, self.cfg.groups)
            group = self.cfg.groups[name]
            if group.rule == "muon" and (matrix := matrix_of(path, p.shape)):
                u = orthogonal(self.cfg.b1 * m + (1 - self.cfg.b1) * g, matrix)
            decayed = u + group.weight_decay * p
            return (p - rates[name] * decayed).astype(p.dtype)

        return map_with_path(new_value, params, updates, grads, opt_state.mu), opt_state


def group_table(params: Params, cfg: OptimConfig) -> list[tuple[str, int, str]]:
    """(group, number of parameters, what it gets) for the lines printed at start."""
    sizes = dict.fromkeys(cfg.groups, 0)
    for path, leaf in leaves_by_path(params):
        sizes[group_of(path, cfg.groups)] += math.prod(leaf.shape)

    def told(group: Group) -> str:
        if group.freeze:
            return "frozen"
        rate = f"lr {group.lr:g} ({group.schedule}), weight decay {group.weight_decay:g}"
        return rate if group.rule == "adam" else f"{group.rule}, {rate}"

    return [(name, sizes[name], told(group)) for name, group in cfg.groups.items()]
