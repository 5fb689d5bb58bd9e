"""Mixtures of robot data sets: weights as data, and the shares that they come to.

openvla's Open-X mixtures and InternVLA-M1's (spec data.md section 5, upstream.md 4.4).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from st4vla_jax.data.oxe import LIBERO_SUITES
from st4vla_jax.data.robot_spec import SpecError, nearest

_LOG = logging.getLogger(__name__)

_MAGIC_SOUP = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_orig": 1.0,
    "taco_play": 2.0,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "toto": 1.0,
    "language_table": 0.1,
    "stanford_hydra_dataset_converted_externally_to_rlds": 2.0,
    "austin_buds_dataset_converted_externally_to_rlds": 1.0,
    "nyu_franka_play_dataset_converted_externally_to_rlds": 3.0,
    "furniture_bench_dataset_converted_externally_to_rlds": 0.1,
    "ucsd_kitchen_dataset_converted_externally_to_rlds": 2.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 1.0,
    "austin_sirius_dataset_converted_externally_to_rlds": 1.0,
    "dlr_edan_shared_control_converted_externally_to_rlds": 1.0,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}
_MAGIC_SOUP_PLUS = {**_MAGIC_SOUP, "bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}

# Name -> data set -> weight.  openvla means these times the number of transitions (alpha = 1 in
# `shares`), InternVLA-M1 takes them as they are (alpha = 0).
MIXTURES: Mapping[str, Mapping[str, float]] = {
    "bridge": {"bridge_orig": 1.0},
    "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
    "rtx": {
        "fractal20220817_data": 0.54087122203,
        "kuka": 0.8341046294,
        "bridge_orig": 1.0,
        "taco_play": 2.0,
        "jaco_play": 2.0,
        "berkeley_cable_routing": 3.0,
        "roboturk": 1.0,
        "viola": 2.0,
        "berkeley_autolab_ur5": 1.0,
        "toto": 1.0,
    },
    "oxe_magic_soup": _MAGIC_SOUP,
    "oxe_magic_soup_plus": _MAGIC_SOUP_PLUS,
    "oxe_magic_soup_plus_minus": {
        **{k: v for k, v in _MAGIC_SOUP_PLUS.items() if k not in ("language_table", "droid")},
        "fractal20220817_data": 1.0,
    },
    **{f"libero_{suite}": {f"libero_{suite}_no_noops": 1.0} for suite in LIBERO_SUITES},
    "libero_all": {f"libero_{suite}_no_noops": 1.0 for suite in LIBERO_SUITES},
}


# What was not read in its source but remembered: check it before numbers are compared.  The rest is
# in spec data.md section 5 (magic_soup_plus' 27 weights, how many sets magic_soup and plus_minus
# have, what plus_minus leaves out) and upstream.md 4.4 (bridge_rt_1, libero_all).
FROM_MEMORY: Mapping[str, str] = {
    "rtx": "its members and their weights",
    "oxe_magic_soup": "which 23 of magic_soup_plus' sets it has, with the same weights",
}


def mixture(name: str) -> Mapping[str, float]:
    """Weights of a registered mixture by data set; an unknown name is a SpecError."""
    if name not in MIXTURES:
        raise SpecError(f"no mixture {name!r}{nearest(name, MIXTURES)}")
    if name in FROM_MEMORY:
        _LOG.warning("mixture %s: from memory is %s", name, FROM_MEMORY[name])
    return MIXTURES[name]


def shares(
    weights: Mapping[str, float], sizes: Mapping[str, int], alpha: float = 0.0
) -> dict[str, float]:
    """The share of samples that each data set of a mixture gets: weight * size**alpha, normalised.

    Args:
      weights: of each data set.
      sizes: its number of samples; only needed for ``alpha`` other than 0.
      alpha: 0 = weights are shares (InternVLA-M1), 1 = weights are per sample (openvla).

    Raises:
      SpecError: weights that are not positive, or sizes that are missing or not positive.
    """
    problems = [f"{name}: weight {w} is not positive" for name, w in weights.items() if not w > 0]
    if alpha:
        problems += [
            f"{name}: needs a size for alpha={alpha}, got {sizes.get(name)}"
            for name in weights
            if not sizes.get(name, 0) > 0
        ]
    if problems or not weights:
        raise SpecError("mixture:\n  " + "\n  ".join(problems or ["is empty"]))
    scale = [w * (sizes[name] ** alpha if alpha else 1.0) for name, w in weights.items()]
    return dict(zip(weights, (np.array(scale) / sum(scale)).tolist(), strict=True))
