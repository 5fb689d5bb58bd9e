"""Time of a compiled step on a slice: compute, interconnect and HBM, and what hides what.

A model of the hardware, not a measurement: every instruction takes the longer of its products at
the peak rate and its bytes at HBM's bandwidth, every collective its bytes over the links that its
group reaches.  A collective is hidden as far as there is work between its start and its done in the
compiler's schedule; work hides one collective at a time, or two permutations in opposite ways.
Otherwise it is exposed, and two that are exposed at a time in opposite ways count once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from st4vla_jax.chips import Slice
from st4vla_jax.plan_hlo import COLLECTIVES, Instruction, Module, groups_of

# What moves nothing by itself.
_FREE = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "copy-start",
    "add-dependency", "call-start", "call-done",
    "slice-start", "slice-done",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of COLLECTIVES.
      runs: in a step.
      bytes: of one run, whole: what a device has after an all-gather, before a reduction.
      group: devices that it joins.
      shapes: for people.
      origin: path of the operation that asked for it.
      asynchronous: has a start and a done.
      seconds, exposed: of one run, and what of it nothing hides.
    """

    kind: str
    runs: int
    bytes: float
    group: tuple[int, ...]
    shapes: tuple[str, ...]
    dims: tuple[tuple[int, ...], ...]
    origin: str
    asynchronous: bool
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step on one chip; seconds.

    Attributes:
      products: matrix products at the peak rate, as the program has them.
      exposed_hbm: memory traffic beyond the products beside it.
      collectives: all that move something.
    """

    products: float
    exposed_hbm: float
    collectives: tuple[Collective, ...]

    @property
    def interconnect(self) -> float:
        return sum(c.runs * c.seconds for c in self.collectives)

    @property
    def exposed_interconnect(self) -> float:
        return sum(c.runs * c.exposed for c in self.collectives)


def step_cost(module: Module, tpu: Slice, devices: Sequence[Any]) -> Cost:
    """Cost of a compiled step.

    Args:
      module: the program.
      tpu: gives rates and links.
      devices: of the mesh, flat; their coordinates say which links a group has.
    """
    model = _Model(module, tpu, devices)
    products = hbm = 0.0
    collectives = []
    for name, runs in module.runs.items():
        own_products, own_hbm = model.computation(name)
        products += runs * own_products
        hbm += runs * own_hbm
        collectives += model.collectives(name, runs)
    return Cost(products, hbm, tuple(collectives))


class _Model:
    def __init__(self, module: Module, tpu: Slice, devices: Sequence[Any]) -> None:
        self._module, self._tpu, self._devices = module, tpu, devices
        self._by_name = {i.name: i for c in module.computations.values() for i in c}
        self._seconds = functools.cache(self._seconds_of)
        self.computation = functools.cache(self._computation)

    def _computation(self, name: str) -> tuple[float, float]:
        """Seconds of one run: products, and memory traffic that nothing of its schedule hides."""
        products = exposed = slack = copies = 0.0
        for instruction in self._module.computations[name]:
            own, memory = self._seconds(instruction.name)
            products += own
            exposed += max(0.0, memory - own)
            slack += max(0.0, own - memory)
            if instruction.opcode in ("copy-start", "slice-start"):
                copies += self._copy_bytes(instruction) / self._tpu.chip.hbm_bandwidth
        return products, exposed + max(0.0, copies - slack)

    def _seconds_of(self, name: str) -> tuple[float, float]:
        """Products and memory traffic of one instruction."""
        instruction = self._by_name[name]
        inner = list(self._module.inside(instruction))
        flops = sum(self._flops(i) for i in inner if i.opcode in ("convolution", "dot"))
        traffic = self._traffic(instruction)
        return flops / self._tpu.chip.peak_flops, traffic / self._tpu.chip.hbm_bandwidth

    def _duration(self, instruction: Instruction) -> float:
        """Seconds that can hide a collective; a loop's are those of all its rounds."""
        if instruction.opcode == "while":
            body = re.search(r"body=%([\w.\-]+)", instruction.attributes)[1]
            return self._module.trips(instruction) * sum(self.computation(body))
        return max(self._seconds(instruction.name))

    def _flops(self, product: Instruction) -> float:
        left, right = (self._by_name[name].shapes[0].dims for name in product.operands[:2])
        out = product.shapes[0]
        if product.opcode == "dot":
            contract = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)[1]
            return 2.0 * out.size * math.prod(left[int(i)] for i in contract.split(",") if i)
        return _convolution_flops(product.attributes, left, right, out.dims)

    def _traffic(self, instruction: Instruction) -> float:
        """Bytes of HBM that an instruction reads and writes."""
        if instruction.opcode in _FREE or instruction.opcode.startswith(COLLECTIVES):
            return 0.0
        if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
            return 0.0  # of memory that is not written
        written = sum(s.bytes for s in instruction.shapes if not s.on_chip)
        reads: dict[int, float] = {}
        if instruction.opcode == "fusion":
            body = self._module.computations[instruction.called()[0]]
            if any(i.opcode.startswith(COLLECTIVES) for i in self._module.inside(instruction)):
                # Buffers of the collective, which is counted as such, pass through the fusion.
                return 0.0
            reads = dict(_partial_reads(self._module, body))
            written = self._fusion_writes(instruction, body[-1])
        elif instruction.opcode == "dynamic-slice":
            reads = {0: written}
        elif instruction.opcode == "dynamic-update-slice":
            written = self._by_name[instruction.operands[1]].bytes
            reads = {0: 0.0}
        for number, name in enumerate(instruction.operands):
            operand = self._by_name.get(name)
            if operand is None:
                continue
            whole = sum(s.bytes for s in operand.shapes if not s.on_chip)
            written += min(whole, reads.get(number, whole))
        return written

    def _fusion_writes(self, fusion: Instruction, root: Instruction) -> float:
        """Bytes of HBM that a fusion writes; updates of slices are made in place."""
        names = root.operands if root.opcode == "tuple" else (root.name,)
        return sum(
            self._update_bytes(name, shape.bytes)
            for name, shape in zip(names, fusion.shapes, strict=True)
            if not shape.on_chip
        )

    def _update_bytes(self, name: str, whole: float) -> float:
        """Bytes that an instruction of a fusion changes of a result of so many."""
        instruction = self._by_name[name]
        if instruction.opcode == "bitcast":
            return self._update_bytes(instruction.operands[0], whole)
        if instruction.opcode == "fusion":
            root = self._module.computations[instruction.called()[0]][-1]
            return self._update_bytes(root.name, whole)
        if instruction.opcode == "dynamic-update-slice":
            return self._by_name[instruction.operands[1]].bytes
        return whole

    def _copy_bytes(self, start: Instruction) -> float:
        """HBM's part of a copy, or a copy of a slice, between HBM and a chip's own memory."""
        if start.opcode == "slice-start":
            result = start.shapes[1]
            return result.bytes * (1 if result.on_chip else 2)
        return sum(s.bytes for s in start.shapes[:2] if not s.on_chip)

    def collectives(self, name: str, runs: int) -> Iterator[Collective]:
        """Those of one computation's schedule."""
        schedule = self._module.computations[name]
        spans: dict[tuple[str, str], list[int]] = {}
        example: dict[tuple[str, str], Instruction] = {}
        begun = set()
        for number, instruction in enumerate(schedule):
            # In these a collective goes on that began before, perhaps outside of this loop.
            goes_on = any(c.startswith("async_collective_fusion") for c in instruction.called())
            for inner in self._module.inside(instruction):
                if inner.opcode.removesuffix("-start") in COLLECTIVES:
                    key = _key(instruction, inner)
                    spans.setdefault(key, []).append(number)
                    example.setdefault(key, inner)
                    begun.update(() if goes_on else (key,))
            if instruction.opcode.endswith("-done"):
                start = self._by_name[instruction.operands[0]]
                for inner in self._module.inside(start):
                    if _key(start, inner) in spans:
                        spans[_key(start, inner)].append(number)
        left = np.array([[self._duration(i)] * 2 for i in schedule])
        for key in [key for key in spans if key in begun]:
            numbers = spans[key]
            first, last = min(numbers), max(numbers)
            yield self._collective(example[key], schedule, first, last, left, runs)

    def _collective(
        self,
        inner: Instruction,
        schedule: list[Instruction],
        first: int,
        last: int,
        left: np.ndarray,
        runs: int,
    ) -> Collective:
        groups = groups_of(inner, len(self._devices))
        kind = inner.opcode.removesuffix("-start")
        scattered = any("all-reduce-scatter" in c for c in schedule[first].called())
        if kind == "all-reduce" and scattered:
            kind = "reduce-scatter"
        shapes = inner.shapes
        if kind in ("reduce-scatter", "all-to-all") and not scattered:
            operands = (self._by_name.get(name) for name in inner.operands)
            shapes = tuple(s for o in operands if o for s in o.shapes) or shapes
        elif inner.opcode.endswith("-start") and len(shapes) > 1:
            shapes = shapes[len(shapes) // 2 :] if kind == "all-gather" else shapes[:1]
        size = sum(s.bytes for s in shapes)
        seconds = exposed = self._transfer(kind, size, groups)
        ways = _ways(kind, groups)
        for number in range(first, last + 1) if last > first else ():
            used = min(exposed, left[number, ways].min())
            exposed -= used
            left[number, ways] -= used
        if last > first:  # while the chip waits for it, what goes the other way goes on
            left[last, [way for way in (0, 1) if way not in ways]] += exposed
        origin = re.search(r'op_name="([^"]*)"', inner.attributes)
        return Collective(
            kind, runs, size, groups[0], tuple(map(str, shapes)), tuple(s.dims for s in shapes),
            origin[1] if origin else "", last > first, seconds, exposed,
        )  # fmt: skip

    def _transfer(self, kind: str, size: float, groups: list[tuple[int, ...]]) -> float:
        """Seconds of a collective over the links that its group can use."""
        chip, group = self._tpu.chip, groups[0]
        if kind == "collective-permute":
            return size / chip.link_bandwidth
        members = len(group)
        if members == 1:
            return 0.0
        slices = len({getattr(self._devices[i], "slice_index", 0) for i in group})
        local = members // slices
        passes = 2 if kind == "all-reduce" else 1
        seconds = 0.0
        if local > 1:
            received = passes * size * (local - 1) / local
            if kind.endswith("all-to-all"):
                received = size * max(1.0, local / 4)
            seconds += received / (self._links(group) * chip.link_bandwidth)
        if slices > 1:
            seconds += passes * size / local * (slices - 1) / slices / chip.dcn_bandwidth
        return seconds

    def _links(self, group: tuple[int, ...]) -> int:
        """Links into a chip along the axes that a group spans; both ways round a whole ring."""
        coords = np.array([self._devices[i].coords for i in group])
        links = 0
        for axis, size in enumerate(self._tpu.shape):
            extent = len(set(coords[:, axis]))
            if extent > 1:
                links += 2 if extent == size and self._tpu.is_ring(axis) else 1
        return max(1, links)


def _ways(kind: str, groups: list[tuple[int, ...]]) -> list[int]:
    """Ways along its links that a collective takes; permutations that go up or down take one."""
    if kind != "collective-permute":
        return [0, 1]
    return [int(sum(np.sign(target - source) for source, target in groups) < 0)]


def _key(instruction: Instruction, inner: Instruction) -> tuple[str, str]:
    """What the parts of one collective share: a channel, where it is spread over several fusions.

    Elsewhere channels tell nothing: all collectives of shard_map have the same one.
    """
    spread = any(c.startswith("async_collective_fusion") for c in instruction.called())
    if spread or instruction.name.startswith("async-collective"):
        return "", inner.channel
    return instruction.name, inner.name


def _partial_reads(module: Module, body: list[Instruction]) -> Iterator[tuple[int, float]]:
    """(number of a fusion's parameter, bytes) where no more than slices of it are read."""
    for parameter in body:
        if parameter.opcode != "parameter":
            continue
        users = [i for i in body if parameter.name in i.operands]
        sizes = [_sliced(module, user, parameter.name) for user in users]
        if users and None not in sizes:
            yield int(parameter.operands[0]), sum(sizes)


def _sliced(module: Module, user: Instruction, name: str) -> float | None:
    """Bytes that an instruction of a fusion reads of an operand; None where it is all of it."""
    if user.opcode in ("dynamic-slice", "slice", "gather"):
        return user.bytes
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0.0
    if user.opcode == "fusion":  # fusions are nested
        inner = dict(_partial_reads(module, module.computations[user.called()[0]]))
        return inner.get(user.operands.index(name))
    return None


def _convolution_flops(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """FLOPs of a convolution, which on TPUs is every product, batched ones by strides and dilation.

    Only window positions that hit an element of the input count, as in XLA's own cost analysis.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    left_labels, right_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
    taps, spatial_out = 1, 1
    spatial = sorted(c for c in out_labels if c.isdigit())
    for number, label in enumerate(spatial):

        def field(name: str, default: str, number: int = number) -> str:
            return fields[name].split("x")[number] if name in fields else default

        size_out = out[out_labels.index(label)]
        size_in = left[left_labels.index(label)]
        low = int(field("pad", "0_0").split("_")[0])
        dilate = int(field("lhs_dilate", "1"))
        position = (
            np.arange(size_out)[:, None] * int(field("stride", "1"))
            + np.arange(int(field("size", "1"))) * int(field("rhs_dilate", "1"))
            - low
        )
        inside = (position >= 0) & (position <= (size_in - 1) * dilate) & (position % dilate == 0)
        taps *= int(inside.sum())
        spatial_out *= size_out
    inputs = right[right_labels.index("i")]
    return 2.0 * math.prod(out) / spatial_out * taps * inputs
