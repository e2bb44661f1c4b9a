"""Ahead-of-time plans: does a step fit a machine that is not at hand, and how fast may it be?

The step itself is compiled from shapes alone, by the compiler of the machine; what it takes is
read from the compiled program.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ecomjax import sharding
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import say
from ecomjax.experiments.chips import GIB, Chip, chip_of
from ecomjax.experiments.config import FinetuneConfig, IclConfig
from ecomjax.experiments.costs import Costs, measure
from ecomjax.experiments.hlo import Program
from ecomjax.experiments.steps import Prompts, Step, trace

LOCK = "launch/locks/tpu.txt"
CUDA = "cuda"
"""The topology that stands for the first CUDA device here."""

NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Keeps libtpu from asking the network which TPU this machine has, from telling that it has none,
and from keeping it from others; none of it matters to what is compiled."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be planned.

    Attributes:
        name: of the row.
        config: whose step it is.
        topology: as `jax.experimental.topologies` names it, such as v5e:2x4, or `CUDA`.
        prompts: of few-shot configs.
    """

    name: str
    config: FinetuneConfig | IclConfig
    topology: str
    prompts: Prompts = dataclasses.field(default_factory=Prompts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a wish takes.

    Attributes:
        wish: what it is of.
        slice: chip and size, as clouds name them: v5p-32 counts cores, two a chip.
        devices: chips.
        mesh: sizes of its axes that are not 1.
        step: what is compiled, in words.
        bytes_per_device: arguments, temporaries and results; of a program that does not fit,
            what the compiler says that it needs.
        memory_per_device: what a program can use.
        costs: on one device; None where it does not fit.
        chip: whose peaks estimates are held against.
        useful_flops: on all devices, see `steps.useful_flops_of`.
        fallbacks: axes that are not split though the rules say so.
        compile_seconds: how long the compiler took.
    """

    wish: Wish
    slice: str
    devices: int
    mesh: str
    step: str
    bytes_per_device: int
    memory_per_device: int
    costs: Costs | None
    chip: Chip
    useful_flops: float
    fallbacks: tuple[str, ...]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.costs is not None and self.bytes_per_device <= self.memory_per_device

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: useful operations over what the chips could do in the time."""
        if self.costs is None:
            return None
        return self.useful_flops / (self.devices * self.chip.flops * self.costs.seconds)

    def to_dict(self) -> dict[str, Any]:
        """A line of JSON."""
        c = self.costs
        return {
            "name": self.wish.name,
            "topology": self.wish.topology,
            "slice": self.slice,
            "chips": self.devices,
            "mesh": self.mesh,
            "step": self.step,
            "fits": self.fits,
            "bytes_per_device": self.bytes_per_device,
            "memory_per_device": self.memory_per_device,
            "flops": c and c.flops * self.devices,
            "useful_flops": self.useful_flops,
            "traffic_bytes_per_device": c and c.traffic,
            "sent_bytes_per_device": c and c.sent,
            "compute_seconds": c and c.flops / self.chip.flops,
            "memory_seconds": c and c.traffic / self.chip.bandwidth,
            "interconnect_seconds": c and c.interconnect,
            "estimated_seconds": c and c.seconds,
            "estimated_mfu": self.mfu,
            "loops_of_unknown_length": c and list(c.unbounded),
            "not_split": list(self.fallbacks),
            "compile_seconds": round(self.compile_seconds, 1),
        }


def run(wishes: Sequence[Wish]) -> Iterator[Plan]:
    """Plans one after the other, with the time that is left told on the way.

    Raises:
        UserError: an unknown topology, no compiler for it, or a mesh that does not fit it.
    """
    # Whatever accelerator this machine has is left alone, unless it is planned for.
    cuda = any(wish.topology == CUDA for wish in wishes)
    jax.config.update("jax_platforms", "cuda,cpu" if cuda else "cpu")
    devices = {wish.topology: devices_of(wish.topology) for wish in wishes}
    for wish in wishes:
        chip_of(devices[wish.topology][0].device_kind)
        _mesh_of(wish, devices[wish.topology])
    began = time.monotonic()
    for number, wish in enumerate(wishes):
        left = ""
        if number:
            each = (time.monotonic() - began) / number
            left = f", about {each * (len(wishes) - number):.0f} s left"
        say(f"{number + 1}/{len(wishes)} {wish.name} on {wish.topology}: compiling{left}")
        plan = make_plan(wish, devices[wish.topology])
        say(f"{wish.name}: compiled in {plan.compile_seconds:.0f} s; {_in_short(plan)}")
        yield plan


def make_plan(wish: Wish, devices: Sequence[Any]) -> Plan:
    """Compiles the step of a wish for devices, which need not be here."""
    chip = chip_of(devices[0].device_kind)
    mesh = _mesh_of(wish, devices)
    step, began = trace(wish.config, mesh, wish.prompts), time.monotonic()
    with sharding.use(mesh):
        # Rows go to the experts of each device, and as many to each in the long run.
        whole = any(fallback.axis == "experts" for fallback in step.fallbacks)
        needed, costs = _compile(step, chip, 1.0 if whole else 1 / mesh.shape["expert"])
    return Plan(
        wish=wish,
        slice=f"{chip.name}-{mesh.size * chip.cores}",
        devices=mesh.size,
        mesh=", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1",
        step=step.told,
        bytes_per_device=needed,
        memory_per_device=_memory_of(devices[0], chip),
        costs=costs,
        chip=chip,
        useful_flops=step.useful_flops,
        fallbacks=tuple(map(str, step.fallbacks)),
        compile_seconds=time.monotonic() - began,
    )


def _mesh_of(wish: Wish, devices: Sequence[Any]) -> Mesh:
    mesh = sharding.make_mesh(**dataclasses.asdict(wish.config.mesh), devices=devices)
    if mesh.size < len(devices):
        raise UserError(
            f"a mesh of {mesh.size} on a slice of {len(devices)} chips",
            wish.topology,
            "set a size of config.mesh to -1, for the rest",
        )
    return mesh


def _compile(step: Step, chip: Chip, ragged: float) -> tuple[int, Costs | None]:
    """Bytes that the program needs, and its costs; None where the compiler cannot place it."""
    try:
        compiled = step.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return needed, None
    found: Any = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    held += found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return held, measure(Program(str(compiled.as_text())), chip, ragged)


def _needed(message: str) -> int | None:
    """What the compiler says that a program needs which does not fit; None: it says no such."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    told = re.search(r"Used ([\d.]+)([KMG]) of|\(([\d.]+)([KMG])\) exceeds", message)
    if told is None:
        return None
    number, unit = (part for part in told.groups() if part)
    return int(float(number) * 1024 ** (1 + "KMG".index(unit)))


def _memory_of(device: Any, chip: Chip) -> int:
    """What a program can use: of a device that is here, what it says."""
    if device.platform != "gpu":
        return chip.memory
    return (device.memory_stats() or {}).get("bytes_limit", chip.memory)


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a topology; those of TPUs are only described.

    Raises:
        UserError: no such topology, or nothing here that compiles for it.
    """
    if topology == CUDA:
        try:
            return jax.devices("cuda")[:1]
        except RuntimeError as error:
            raise UserError(
                "no CUDA device here", "--topology=cuda", "plan for a TPU, such as v5e:2x4"
            ) from error
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the compiler for TPUs is not installed",
            "libtpu",
            f"python -m pip install --no-deps --require-hashes -r {LOCK}",
        )
    for name, value in NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(
            f"no TPU topology {topology!r}",
            "--topology",
            "use one such as v5e:2x4, v6e:4x4 or v5p:2x2x2",
        ) from error


def table(plans: Sequence[Plan]) -> str:
    """The plans in Markdown, one a row."""
    header = (
        *("plan", "slice", "mesh", "one step", "GiB a chip", "TFLOP a chip"),
        *("GiB sent by a chip", "seconds: compute, memory, interconnect", "at least", "MFU"),
    )
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for plan in plans:
        lines.append(f"| {' | '.join(_cells(plan))} |")
    for name in dict.fromkeys(plan.wish.name for plan in plans):
        tried = [plan for plan in plans if plan.wish.name == name]
        fitting = [plan for plan in tried if plan.fits]
        if len({plan.devices for plan in tried}) > 1 and fitting:
            least = min(fitting, key=lambda plan: plan.devices)
            lines += ["", f"`{name}`: {least.slice} is the smallest of these slices that fits."]
    return "\n".join(lines)


def _cells(plan: Plan) -> list[str]:
    """Of a row of the table."""
    memory = plan.memory_per_device / GIB
    held = f"{plan.bytes_per_device / GIB:.1f} of {memory:.1f}"
    chips = f"{plan.slice} ({plan.devices} chips)"
    first = [f"`{plan.wish.name}`", chips, plan.mesh, plan.step]
    if not plan.fits or plan.costs is None or plan.mfu is None:
        return [*first, f"{held}: **does not fit**", *["–"] * 5]
    c, chip = plan.costs, plan.chip
    sent = ", ".join(
        f"{kind} {size / GIB:.1f}"
        for kind, size in sorted(c.sent.items(), key=lambda item: -item[1])
        if size >= 0.05 * GIB
    )
    seconds = (c.flops / chip.flops, c.traffic / chip.bandwidth, c.interconnect)
    return [
        *first,
        held,
        f"{c.flops / 1e12:.1f}",
        sent or "–",
        ", ".join(f"{value:.3f}" for value in seconds),
        f"{c.seconds:.3f}" + " (a loop of unknown length counts once)" * bool(c.unbounded),
        f"{100 * plan.mfu:.0f} %",
    ]


def _in_short(plan: Plan) -> str:
    held = f"{plan.bytes_per_device / GIB:.2f} of {plan.memory_per_device / GIB:.2f} GiB a chip"
    if not plan.fits or plan.costs is None or plan.mfu is None:
        return f"does not fit, {held}"
    return f"fits, {held}; at least {plan.costs.seconds:.3f} s a step, MFU {100 * plan.mfu:.1f} %"
