"""What a compiled program costs one device: operations, memory traffic, bytes sent, seconds.

Counted from the text of the program, every computation as often as it runs (see `hlo`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict

from ecomjax.experiments.chips import Chip
from ecomjax.experiments.hlo import Computation, Instruction, Program

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
)
"""What moves nothing, or what stands for computations that count themselves."""
_VIEWS = ("bitcast", "get-tuple-element", "reshape")
_PARTS = ("dynamic-slice", "slice", "gather")
"""What reads of its first operand only what it returns."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one run of a program, on one device.

    Attributes:
        flops: of matrix products, 2 M N K each; those that are computed again count again.
        traffic: bytes between memory and chip, as far as instructions name them: what stays
            in memory on the chip is left out, as is what a fused instruction keeps to itself.
        sent: bytes sent to other devices by kind of collective, each as its ring algorithm
            does: of an all-gather (g - 1) times the own part, of a reduce-scatter or
            all-to-all (g - 1) / g of it, of an all-reduce twice that, g devices in a group.
        busy: seconds of instructions one after another, each at the peak of operations or of
            bandwidth, whichever takes longer.
        interconnect: seconds of all bytes sent at the chip's bandwidth along one axis.
        unbounded: loops whose trip count the text does not tell, counted once.
    """

    flops: float
    traffic: float
    sent: dict[str, float]
    busy: float
    interconnect: float
    unbounded: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """The roofline: what is sent travels while the rest is computed."""
        return max(self.busy, self.interconnect)


def measure(program: Program, chip: Chip, ragged: float = 1.0) -> Costs:
    """Walks through all that runs.

    Args:
        program: of one device.
        chip: whose peaks bound it.
        ragged: of the rows of a ragged product, how many are in one of its groups; its kernel
            says what all of them would cost, and leaves out the rest.
    """
    flops = traffic = busy = 0.0
    sent: dict[str, float] = defaultdict(float)
    for run in program.runs():
        for each in run.computation.instructions.values():
            if found := _sent(program, run.computation, each, run.fused):
                sent[found[0]] += run.times * found[1]
            if run.fused:
                continue
            operations = flops_of(program, run.computation, each)
            if "ragged_dot_tiling=" in each.rest:
                operations *= ragged
            moved = traffic_of(program, run.computation, each)
            flops += run.times * operations
            traffic += run.times * moved
            busy += run.times * max(operations / chip.flops, moved / chip.bandwidth)
    interconnect = sum(sent.values()) / chip.interconnect
    return Costs(flops, traffic, dict(sent), busy, interconnect, tuple(program.unbounded))


def flops_of(program: Program, inside: Computation, each: Instruction) -> float:
    """Of the matrix products in an instruction; other arithmetic is not counted.

    Kernels that are programs of their own say what they cost, or count as nothing.
    """
    if each.opcode == "fusion":
        called = program.computations[str(each.named("calls"))]
        return sum(flops_of(program, called, own) for own in called.instructions.values())
    if each.opcode == "dot":
        left = inside.instructions[each.operands[0]].arrays[0].shape
        summed = [left[axis] for axis in each.numbers("lhs_contracting_dims")]
        return 2.0 * each.arrays[0].size * math.prod(summed)
    if each.opcode == "convolution":
        return _convolution(inside, each)
    if each.opcode == "custom-call":
        told = re.search(r'"cost_estimate":\{"flops":"?(\d+)', each.rest)
        if told:
            return float(told[1])
        if '"__cublas$' in each.rest and (
            found := re.search(r'"dot_dimension_numbers":', each.rest)
        ):
            numbers = json.JSONDecoder().raw_decode(each.rest, found.end())[0]
            left = inside.instructions[each.operands[0]].arrays[0].shape
            summed = [left[int(axis)] for axis in numbers["lhs_contracting_dimensions"]]
            return 2.0 * each.arrays[0].size * math.prod(summed)
    return 0.0


def _convolution(inside: Computation, each: Instruction) -> float:
    """2 x batch x features x the pairs of input and kernel positions that meet.

    XLA for TPU writes every matrix product as a convolution. Batched ones have windows with
    holes or padding, in which each position of the output meets one of the kernel's.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
    assert labels is not None, each
    left, right = (inside.instructions[name].arrays[0].shape for name in each.operands[:2])
    of_left, of_right, of_out = (
        dict(zip(part, range(9), strict=False)) for part in labels.groups()
    )
    groups = {
        name: int(found[1]) if (found := re.search(rf"{name}_group_count=(\d+)", each.rest)) else 1
        for name in ("feature", "batch")
    }
    flops = 2.0 * left[of_left["b"]] / groups["batch"]
    flops *= right[of_right["i"]] * right[of_right["o"]]
    spatial = sorted(label for label in of_left if label.isdigit())
    window = re.search(r"window=\{([^}]*)\}", each.rest)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    for number, label in enumerate(spatial):

        def of(key: str, default: str, number: int = number) -> str:
            return given[key].split("x")[number] if key in given else default

        flops *= _meetings(
            inputs=left[of_left[label]],
            outputs=each.arrays[0].shape[of_out[label]],
            window=int(of("size", "1")),
            stride=int(of("stride", "1")),
            padding=int(of("pad", "0_0").split("_")[0]),
            base_dilation=int(of("lhs_dilate", "1")),
            window_dilation=int(of("rhs_dilate", "1")),
        )
    return flops


def _meetings(
    inputs: int,
    outputs: int,
    window: int,
    stride: int,
    padding: int,
    base_dilation: int,
    window_dilation: int,
) -> int:
    """How many positions of kernel and output meet a position of the input, along one axis."""
    count = 0
    for position in range(window):
        for output in range(outputs):
            at = output * stride - padding + position * window_dilation
            count += at % base_dilation == 0 and 0 <= at // base_dilation < inputs
    return count


def traffic_of(program: Program, inside: Computation, each: Instruction) -> float:
    """Bytes that an instruction reads from memory and writes to it."""
    if each.opcode in _FREE or each.opcode.endswith(("-start", "-update")) or _is_mark(each):
        return 0.0
    if each.opcode.endswith("-done"):
        # Reads what it writes, or what was given to what it ends.
        given = inside.instructions[each.operands[0]].operands
        read = sum(_far(inside.instructions[name]) for name in given)
        return min(read, each.bytes) + _far(each)
    read = sum(
        _read(program, inside, each, name)
        for name in dict.fromkeys(each.operands)
        if _far(inside.instructions[name])
    )
    if each.opcode != "fusion":
        return read + min(_far(each), _written(program, inside, each.name))
    called = program.computations[str(each.named("calls"))]
    root = called.instructions[called.root]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    if len(results) != len(each.arrays):
        return read + _far(each)
    return read + sum(
        min(array.bytes, _written(program, called, result))
        for result, array in zip(results, each.arrays, strict=True)
        if not array.near
    )


def _far(each: Instruction) -> float:
    """Bytes of it that do not lie on the chip."""
    return sum(array.bytes for array in each.arrays if not array.near)


def _is_mark(each: Instruction) -> bool:
    """Whether it is a mark or a buffer of the compiler, and no kernel."""
    kernel = re.search(r'custom_call_target="(\w*custom_call|__cu|__triton)', each.rest)
    return each.opcode == "custom-call" and kernel is None


def _read(program: Program, inside: Computation, user: Instruction, name: str) -> float:
    """Bytes of a value that an instruction looks at: of what is sliced, the slice."""
    whole, first = inside.instructions[name].bytes, user.operands[0] == name
    if user.opcode in _PARTS and first:
        return min(whole, user.bytes)
    if user.opcode == "dynamic-update-slice" and first:
        return 0.0  # It is updated where it lies.
    if user.opcode == "tuple" or _is_mark(user) or _continues(inside, user):
        return 0.0  # It is passed on.
    if user.opcode in _VIEWS:
        users = inside.users[user.name]
        return min(whole, sum(_read(program, inside, each, user.name) for each in users))
    if user.opcode != "fusion":
        return whole
    called = program.computations[str(user.named("calls"))]
    own = [
        p for p, operand in zip(called.parameters, user.operands, strict=True) if operand == name
    ]
    read = (_read(program, called, each, p) for p in own for each in called.users[p])
    return min(whole, sum(read))


def _written(program: Program, inside: Computation, name: str) -> float:
    """Bytes that are new in a value: of what is updated, the update."""
    each = inside.instructions[name]
    if each.opcode == "parameter" or _is_mark(each):
        return 0.0
    if each.opcode == "tuple":
        return sum(_written(program, inside, operand) for operand in each.operands)
    if each.opcode == "dynamic-update-slice":
        return inside.instructions[each.operands[1]].bytes
    if each.opcode in _VIEWS:
        return min(each.bytes, _written(program, inside, each.operands[0]))
    if each.opcode == "fusion":
        called = program.computations[str(each.named("calls"))]
        return min(each.bytes, _written(program, called, called.root))
    return each.bytes


def _sent(
    program: Program, inside: Computation, each: Instruction, fused: bool
) -> tuple[str, float] | None:
    """Kind of a collective, and the bytes that each device sends in it."""
    kind = each.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or _continues(inside, each):
        return None
    given = sum(inside.instructions[name].bytes for name in each.operands)
    if kind in ("collective-permute", "collective-broadcast"):
        return kind, given
    others = _group_size(program, each) - 1
    if kind == "all-gather":
        return kind, given * others
    share = given * others / (others + 1)
    if kind != "all-reduce":
        return kind, share
    if fused and _is_sliced(inside, each):
        return "reduce-scatter", share
    return kind, 2 * share


def _continues(inside: Computation, each: Instruction) -> bool:
    """Whether it is a collective that began in an earlier instruction.

    XLA for TPU fuses a collective into several instructions, between which it goes on; all
    name it, and the first one is marked.
    """
    if "chain_id=" not in each.rest or each.opcode not in COLLECTIVES:
        return False
    return not any('"AsyncCollectiveStart"' in user.rest for user in inside.users[each.name])


def _is_sliced(inside: Computation, each: Instruction) -> bool:
    """Whether every device keeps but its part of the result: so XLA for TPU scatters."""
    users, seen = list(inside.users[each.name]), []
    while users:
        user = users.pop()
        seen.append(user.opcode)
        if user.opcode in _VIEWS:
            users += inside.users[user.name]
    return "dynamic-slice" in seen and set(seen) <= {*_VIEWS, "dynamic-slice"}


def _group_size(program: Program, each: Instruction) -> int:
    """How many devices a collective is among, in any of the three ways that XLA writes it."""
    if found := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", each.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", each.rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", each.rest):
        return len(found[1].split(","))
    return program.devices
