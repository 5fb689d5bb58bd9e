"""TPU chips and slices: what planning needs to know, and the names that they go by."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from st4vla_jax.flops import PEAK_FLOPS


class TopologyError(ValueError):
    """A slice that does not exist, or that cannot be compiled for here; says what can."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    cloud.google.com/tpu/docs, the page of each version: HBM, its bandwidth, shapes, chips a host.
    Links: jax-ml.github.io/scaling-book/tpus, one way and as measured there (v5p: 90 of the 100
    GB/s of the data sheet).  Data-centre network: the same table, egress of one chip.

    Attributes:
      name: prefix of a topology.
      device_kind: of its jax devices, key of PEAK_FLOPS.
      hbm_bytes: what the compiler lets a program use, by its own out-of-memory message.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link of the interconnect (ICI), one way.
      dcn_bandwidth: bytes/s that a chip sends to other slices.
      chips_per_host: of slices with several hosts.
      ring: an axis whose size this divides is a ring, another a line.
      cores_named: what the number in a marketing name counts, for each chip.
      aliases: first part of marketing names.
      shapes: slices that can be rented.
    """

    name: str
    device_kind: str
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    chips_per_host: int
    ring: int
    cores_named: int
    aliases: tuple[str, ...]
    shapes: tuple[str, ...]

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return PEAK_FLOPS[self.device_kind]


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip
GIB = 2**30

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 30.75 * GIB, 1.228e12, 4.5e10, 6.25e9, 4, 4, 2, ("v4",), _CUBES),
        Chip(
            "v5e", "TPU v5 lite", 15.75 * GIB, 8.19e11, 4.5e10, 3.125e9, 4, 16, 1,
            ("v5e", "v5litepod"), _FLAT,
        ),
        Chip("v5p", "TPU v5", 95.74 * GIB, 2.765e12, 9e10, 6.25e9, 4, 4, 2, ("v5p",), _CUBES),
        Chip("v6e", "TPU v6 lite", 31.25 * GIB, 1.64e12, 9e10, 1.25e10, 4, 16, 1, ("v6e",), _FLAT),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips joined by one interconnect, ``slices`` times over the data-centre network.

    Attributes:
      shape: chips along each axis.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        return -(-self.chips // self.chip.chips_per_host)

    def is_ring(self, axis: int) -> bool:
        return self.shape[axis] % self.chip.ring == 0


def parse_slice(text: str, slices: int = 1) -> Slice:
    """Reads ``v5p:4x4x4`` or a marketing name as ``v5p-128``, ``v5e-64``, ``v6e-256``.

    Raises:
      TopologyError: there is no such slice; lists those of the generation.
    """
    if slices < 1:
        raise TopologyError(f"{slices} slices: need at least 1")
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
    if not found:
        raise TopologyError(
            f"topology {text!r}: write NAME:AxB[xC] or NAME-SIZE, as v5p:4x4x4, v5p-128, v5e-64"
        )
    chip = _chip(found[1], text)
    if found[2]:
        shape = found[2]
    else:
        count = int(found[3]) / chip.cores_named
        sizes = {math.prod(map(int, s.split("x"))): s for s in chip.shapes}
        shape = sizes.get(count, "")
    if shape not in chip.shapes:
        names = ", ".join(f"{chip.name}:{s} ({marketing_name(chip, s)})" for s in chip.shapes)
        raise TopologyError(f"topology {text!r} does not exist; {chip.name} has {names}")
    return Slice(chip, tuple(map(int, shape.split("x"))), slices)


def marketing_name(chip: Chip, shape: str) -> str:
    """What a cloud's price list calls a slice."""
    return f"{chip.aliases[-1]}-{math.prod(map(int, shape.split('x'))) * chip.cores_named}"


def _chip(name: str, text: str) -> Chip:
    for chip in CHIPS.values():
        if name in chip.aliases:
            return chip
    known = [alias for chip in CHIPS.values() for alias in chip.aliases]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise TopologyError(f"topology {text!r}: {hint}There are {', '.join(known)}")


# Without them libtpu looks for a TPU's metadata, writes logs, and lets one process in at a time.
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def slice_devices(tpu: Slice) -> Sequence[jax.Device]:
    """Devices that programs can be compiled for, slice after slice, host after host.

    Raises:
      TopologyError: libtpu is absent, locked by another process, or does not know the slice.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    options = {"num_slices": tpu.slices} if tpu.slices > 1 else {}
    if tpu.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # else a device is half a chip
    try:
        found = topologies.get_topology_desc(tpu.name, "tpu", **options).devices
    except Exception as error:  # noqa: BLE001 (jax raises what libtpu makes of it)
        raise TopologyError(_why_not(tpu, str(error))) from error
    return list(found)


def _why_not(tpu: Slice, error: str) -> str:
    if "not installed" in error or "libtpu.so" in error:
        return (
            "compiling for a TPU needs libtpu, which runs on any x86 machine: "
            "pip install '.[tpu]'; without --topology the table of sizes needs none"
        )
    if "lockfile" in error or "already in use" in error:
        return (
            f"libtpu is held by another process ({error.splitlines()[0]}); set "
            "ALLOW_MULTIPLE_LIBTPU_LOAD=1, or wait for it to end"
        )
    return f"libtpu cannot compile for {tpu.name}: {error}"
