"""Reads a compiled program's text: XLA's optimised HLO, scheduled, as the TPU compiler prints it.

XLA's own cost analysis counts the body of a loop once; here a loop's body counts as often as its
condition's constant says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all",
    "ragged-all-to-all",
)  # fmt: skip
_CALLERS = ("calls", "to_apply", "body", "condition", "branch_computations")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array; ``on_chip`` where its layout names another memory than HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        bits = int(re.search(r"\d+", self.dtype)[0]) if self.dtype != "pred" else 8
        return self.size * bits / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: results (the arrays of a tuple), names of operands, and what follows them."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    def called(self) -> list[str]:
        """Computations that it runs."""
        found = []
        for key in _CALLERS:
            if match := re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes):
                found += _NAME.findall(match[1])
        return found

    @property
    def channel(self) -> str:
        """Number of a collective; parts of one that were spread over fusions share it."""
        match = re.search(r"channel_id=(\d+)", self.attributes)
        return match[1] if match else self.name

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each in the order of its schedule."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation that has a schedule of its own runs; fusions have none."""
        runs: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            runs[name] = runs.get(name, 0) + times
            for instruction in self.computations[name]:
                if instruction.opcode in ("while", "call", "conditional", "async-start"):
                    trips = self.trips(instruction) if instruction.opcode == "while" else 1
                    for called in instruction.called():
                        visit(called, times * trips)

        visit(self.entry, 1)
        return runs

    def trips(self, loop: Instruction) -> int:
        """Rounds of a while loop that counts from 0; at least 1.

        The constant that its condition compares with, over what a round adds: unrolled loops add
        more than 1.
        """
        condition, body = (
            self.computations[re.search(rf"{key}=%([\w.\-]+)", loop.attributes)[1]]
            for key in ("condition", "body")
        )
        bound = max([1, *filter(None, map(_constant, condition))])
        return math.ceil(bound / _step(condition[-1], condition, body))

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """What is in a fusion, nested ones included, or in what a SparseCore runs; else itself."""
        if instruction.opcode not in ("fusion", "call-start"):
            yield instruction
            return
        for called in instruction.called():
            for inner in self.computations[called]:
                yield from self.inside(inner)


def _constant(instruction: Instruction) -> int | None:
    """The whole number that an instruction stands for."""
    text = ",".join(instruction.operands)
    found = re.match(r"\s*(\d+)\s*$", text) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None


def _step(test: Instruction, condition: list[Instruction], body: list[Instruction]) -> int:
    """What a round adds to the counter that the condition's test reads; 1 where it is not seen."""
    read = {i.name: i for i in condition}.get(test.operands[0])
    if not read or not (place := re.search(r"index=(\d+)", read.attributes)):
        return 1
    known = {i.name: i for i in body}
    following = known.get(body[-1].operands[int(place[1])])
    if not following or following.opcode != "add":
        return 1
    return max([1, *(n for name in following.operands if (n := _constant(known[name])))])


def parse_hlo(text: str) -> Module:
    """Reads ``compiled.as_text()``.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line.split("(")[0]:
            header = line.removeprefix("ENTRY ").split("(")[0].strip()
            if header.startswith("%"):
                name = header[1:]
                current = computations.setdefault(name, [])
                entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("  ") and " = " in line:
            current.append(_instruction(line.strip()))
    if not entry:
        raise ValueError("no HLO: the text has no entry computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].strip()
    opcode, _ = rest.split("(", 1)
    close = _closing(rest, len(opcode))
    inner = rest[len(opcode) + 1 : close]
    operands = tuple(_NAME.findall(inner)) if "%" in inner else (inner,)
    shapes = tuple(
        Shape(t, tuple(map(int, filter(None, dims.split(",")))), "S(" in (layout or ""))
        for t, dims, layout in _ARRAY.findall(types)
    )
    return Instruction(name.lstrip("%"), opcode, shapes, operands, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"no HLO: unbalanced brackets in {text[:80]!r}")


def groups_of(instruction: Instruction, num_devices: int) -> list[tuple[int, ...]]:
    """Groups of devices among which a collective travels, by their position in the mesh.

    All three notations are read: lists, iotas and meshes of axes.
    """
    text = instruction.attributes
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text):
        groups = re.findall(r"\{([\d, ]+)\}", found[1])
        return [tuple(map(int, group.split(","))) for group in groups]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        shape = tuple(map(int, found[1].split(",")))
        return [tuple(row) for row in _iota(found[2]).reshape(shape).tolist()]
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*?\](?:T\([\d,]+\))?)\))? "
        r"\{([^}]*)\}",
        text,
    ):
        return _mesh_groups(*found.groups())
    return [tuple(range(num_devices))]


def _iota(text: str) -> np.ndarray:
    """``[4,2]T(1,0)``: the numbers from 0 in that shape, transposed, flat."""
    dims, _, order = text.strip("[").partition("]")
    shape = tuple(map(int, dims.split(",")))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(i) for i in re.findall(r"\d+", order)]) if order else ids).ravel()


def _mesh_groups(axes: str, ids: str | None, along: str) -> list[tuple[int, ...]]:
    """``mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}``: groups along some of the axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = _iota(ids) if ids else np.arange(math.prod(sizes.values()))
    grid = order.reshape(tuple(sizes.values()))
    chosen = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", along)]
    rest = [i for i in range(len(sizes)) if i not in chosen]
    members = math.prod(grid.shape[i] for i in chosen)
    return [tuple(row) for row in grid.transpose(rest + chosen).reshape(-1, members).tolist()]
