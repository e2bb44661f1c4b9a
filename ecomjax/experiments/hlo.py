"""The text of a compiled program, read into instructions: what runs, and how often.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and so counts
one layer of a scanned model; here every computation counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1.0),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("s2", "u2"), 0.25),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
    "c128": 16.0,
}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """An array as a program has it; `near` says whether it lies in memory on the chip."""

    dtype: str
    shape: tuple[int, ...]
    near: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        width = 1.0 if self.dtype.startswith("f8") else _BYTES.get(self.dtype, 0.0)
        return self.size * width


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        arrays: its result, flat if it is a tuple.
        operands: names of instructions of the same computation.
        literal: what stands in the brackets, which is the value of a constant.
        rest: attributes, behind the brackets.
    """

    name: str
    opcode: str
    arrays: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    def named(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        return found and found[1]

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The list of numbers that an attribute is; empty without it."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.rest)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order that they run."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters, in the order of the operands of who calls it."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return tuple(i.name for i in sorted(found, key=lambda i: int(i.literal)))


@dataclasses.dataclass(frozen=True)
class Run:
    """A computation that a program runs.

    Attributes:
        times: how often.
        fused: whether it is the inside of one instruction, whose values are in registers.
    """

    computation: Computation
    times: int
    fused: bool


class Program:
    """A compiled program, of one device.

    Attributes:
        computations: by name.
        entry: the one that is called.
        devices: how many run it together.
        unbounded: names of loops whose trip count the text does not tell; they count once.
    """

    def __init__(self, text: str):
        """Reads `jax.stages.Compiled.as_text()`.

        Raises:
            ValueError: no program.
        """
        self.computations: dict[str, Computation] = {}
        self.unbounded: list[str] = []
        shares = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
        self.devices = math.prod(map(int, shares))
        entry, name, found, root = "", "", {}, ""
        for line in text.splitlines():
            if header := _HEADER.fullmatch(line):
                name, found, root = header[2], {}, ""
                entry = name if header[1] else entry
            elif line == "}" and found:
                self.computations[name] = Computation(name, found, root)
            elif name and (match := _INSTRUCTION.fullmatch(line)):
                found[match[2]] = _instruction(match[2], match[3])
                root = match[2] if match[1] else root
        if entry not in self.computations:
            raise ValueError("text of no compiled program")
        self.entry = self.computations[entry]

    def runs(self) -> Iterator[Run]:
        """Every computation that runs, once for each place that it is called from.

        The body of a loop runs as often as its trip count says, inside an outer loop as often
        as the two multiplied; every branch of a conditional runs once, since which of them
        does depends on data. What reductions and sorts apply to pairs of elements is left out.
        """
        self.unbounded.clear()
        yield from self._runs(self.entry, 1, False)

    def _runs(self, computation: Computation, times: int, fused: bool) -> Iterator[Run]:
        yield Run(computation, times, fused)
        for each in computation.instructions.values():
            if each.opcode == "while":
                trips = self.trip_count(computation, each)
                if trips is None:
                    self.unbounded.append(each.name)
                body = self.computations[str(each.named("body"))]
                yield from self._runs(body, times * (1 if trips is None else trips), fused)
                continue
            for name in _called(each):
                yield from self._runs(
                    self.computations[name], times, fused or each.opcode == "fusion"
                )

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop runs, at most; None where it cannot be told.

        XLA writes it beside the loop on CPU and GPU. Elsewhere it follows from the constant
        that the condition compares a counter to, the constant that the counter starts from (0
        where it is none) and what the body adds to it (1 where that is not seen).
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        body = self.computations[str(loop.named("body"))]
        first, last = computation.instructions[loop.operands[0]], body.instructions[body.root]
        trips = []
        for index, bound in self._bounds(self.computations[str(loop.named("condition"))], {}):
            start, step = None, None
            if first.opcode == "tuple":
                start = self._linear(computation, first.operands[index], {})
            if last.opcode == "tuple":
                step = self._linear(body, last.operands[index], {})
            begin = start.constant if start and start.state is None else 0
            by = step.constant if step and step.state == index and step.constant > 0 else 1
            trips.append(max(math.ceil((bound - begin) / by), 0))
        return min(trips) if trips else None

    def _bounds(
        self, inside: Computation, given: Mapping[str, _Linear | None]
    ) -> Iterator[tuple[int, int]]:
        """(index in the state, bound) wherever part of the state is compared to a constant."""
        for each in inside.instructions.values():
            operands = [self._linear(inside, name, given) for name in each.operands]
            if each.opcode == "fusion":
                called = self.computations[str(each.named("calls"))]
                yield from self._bounds(called, dict(zip(called.parameters, operands, strict=True)))
            direction = re.search(r"direction=(L[TE])", each.rest)
            if each.opcode != "compare" or direction is None:
                continue
            counter, bound = operands
            if counter and bound and counter.state is not None and bound.state is None:
                yield counter.state, bound.constant - counter.constant + (direction[1] == "LE")

    def _linear(
        self, inside: Computation, name: str, given: Mapping[str, _Linear | None]
    ) -> _Linear | None:
        """A whole number as an element of the state of a loop plus a constant, if it is one.

        Args:
            inside: where it is computed.
            name: of the instruction.
            given: what parameters stand for, if they are not the state.
        """
        each = inside.instructions[name]
        if each.opcode == "parameter":
            return given.get(name)
        if each.opcode == "constant":
            return _Linear(None, int(each.literal)) if each.literal.lstrip("-").isdigit() else None
        operands = [self._linear(inside, operand, given) for operand in each.operands]
        if each.opcode == "get-tuple-element":
            state = inside.instructions[each.operands[0]].opcode == "parameter"
            index = re.search(r"index=(\d+)", each.rest)
            return _Linear(int(index[1]), 0) if state and index else None
        if each.opcode in ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"):
            return operands[0]
        if each.opcode == "fusion":
            called = self.computations[str(each.named("calls"))]
            own = dict(zip(called.parameters, operands, strict=True))
            return self._linear(called, called.root, own)
        if each.opcode == "add" and None not in operands:
            left, right = (o for o in operands if o)
            if left.state is None or right.state is None:
                state = right.state if left.state is None else left.state
                return _Linear(state, left.constant + right.constant)
        return None


class _Linear(NamedTuple):
    """An element of the state of a loop, or nothing, plus a constant."""

    state: int | None
    constant: int


def _called(each: Instruction) -> list[str]:
    """What an instruction calls, other than a loop and what is applied to elements."""
    if each.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", each.rest)
        if listed:
            return [name.strip().lstrip("%") for name in listed[1].split(",")]
        names = (each.named("true_computation"), each.named("false_computation"))
        return [name for name in names if name]
    attribute = {"call": "to_apply"}.get(each.opcode, "calls")
    called = each.named(attribute)
    return [called] if called else []


def _instruction(name: str, text: str) -> Instruction:
    """What stands behind the `=` of a line."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    types, behind = text[:end], text[end:].lstrip()
    opcode = behind[: (opening := behind.index("("))]
    closing = _closing(behind, opening)
    inside = behind[opening + 1 : closing]
    operands: list[str] = []
    if opcode not in ("parameter", "constant"):
        operands = re.findall(r"%([\w.-]+)", inside)
    return Instruction(name, opcode, _arrays(types), tuple(operands), inside, behind[closing + 1 :])


def _arrays(types: str) -> tuple[ArrayType, ...]:
    """The arrays of a type; on TPU `S(1)` and higher in a layout are memories on the chip."""
    return tuple(
        ArrayType(
            dtype,
            tuple(int(size.strip(" <=")) for size in shape.split(",") if size),
            bool(re.search(r"S\([1-9]\d*\)", layout)),
        )
        for dtype, shape, layout in _ARRAY.findall(types)
    )


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"brackets that do not close: {text[:80]}")
