"""What PEFT adapts of a model, and the tensors that it keeps of each.

A module's `lora_A.weight` [R, in] is our `a` transposed, its `lora_B.weight` [out, R] our `b`
transposed. An embedding has `lora_embedding_A` [R, V] and `lora_embedding_B` [D, R] instead;
DoRA adds `lora_magnitude_vector` [out].

Transformers 5 holds the experts of a layer in two parameters, that of gate and up [E, 2F, D]
and that of down [E, D, F], which PEFT adapts by their names (`target_parameters`). The rows of
lora_A [E*R, in] lie expert by expert and the columns of lora_B [out, R*E] rank by rank. Where
two parameters of one module are adapted, the one that PEFT wraps first lies a `base_layer`
deeper.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ecomjax.hf.rules import STACKS, Rule, RuleTable

PREFIX = "base_model.model."
HEAD = "lm_head"

Kind = Literal["linear", "embedding", "tied head", "parameter"]


class Part(NamedTuple):
    """A leaf of ours, and the outputs it has in a target."""

    path: str
    d_out: int


@dataclasses.dataclass(frozen=True)
class Target:
    """A module in every layer, or a parameter of one, that PEFT adapts by itself.

    Attributes:
        template: its name, with the placeholders of `rules.STACKS`.
        kind: how its tensors are named and laid out.
        parts: what it holds of ours, outputs one behind the other.
        stack: how many there are, by placeholder.
        d_in: inputs of our matrices.
        experts: E where it holds those of all experts, else None.
        transposed: whether torch holds it [out, in].
    """

    template: str
    kind: Kind
    parts: tuple[Part, ...]
    stack: tuple[int, ...]
    d_in: int
    experts: int | None = None
    transposed: bool = True

    @property
    def d_out(self) -> int:
        return sum(part.d_out for part in self.parts)

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index into the stack, and the name that targets and patterns are held against."""
        kinds = _placeholders(self.template)
        for index in itertools.product(*map(range, self.stack)):
            yield index, self.template.format(**dict(zip(kinds, index, strict=True)))


def targets_of(table: RuleTable, parameters: bool) -> tuple[Target, ...]:
    """All that can be adapted.

    Where a table of token vectors has copies, as a tied head is one, they are targets too, of
    the same leaf.

    Args:
        table: of the model.
        parameters: whether experts are parameters, as in transformers 5, or modules.
    """
    fused = table.parameters if parameters else {}
    within = {path for paths in fused.values() for path in paths}
    rules = {rule.ours: rule for rule in table.rules}
    targets: list[Target] = []
    for rule in table.rules:
        if rule.embedding:
            targets += _embeddings(rule, table)
        elif rule.linear and rule.ours not in within:
            d_in, d_out = _matrix(rule, table)
            stack, parts = rule.stack(table.sizes), (Part(rule.ours, d_out),)
            name, transposed = rule.theirs.removesuffix(".weight"), rule.transposed
            targets.append(Target(name, "linear", parts, stack, d_in, None, transposed))
    for name, paths in fused.items():
        parts = tuple(Part(path, _matrix(rules[path], table)[1]) for path in paths)
        stack = tuple(table.sizes[STACKS[kind]] for kind in _placeholders(name))
        experts = table.sizes["E"] if "expert" in rules[paths[0]].placeholders else None
        d_in = _matrix(rules[paths[0]], table)[0]
        targets.append(Target(name, "parameter", parts, stack, d_in, experts))
    return tuple(targets)


def _embeddings(rule: Rule, table: RuleTable) -> list[Target]:
    """A table of token vectors in all its roles: those that read it, and a tied head."""
    rows, width = rule.shape(table.sizes)
    parts = (Part(rule.ours, width),)
    copies = [copy for copy, original in table.copies.items() if original == rule.theirs]
    names = [name.removesuffix(".weight") for name in copies]
    readers = [name for name in names if name != HEAD] or [rule.theirs.removesuffix(".weight")]
    made = [Target(name, "embedding", parts, (), rows) for name in readers]
    return made + [Target(name, "tied head", parts, (), rows) for name in names if name == HEAD]


def _matrix(rule: Rule, table: RuleTable) -> tuple[int, int]:
    """d_in and d_out of the matrix that a kernel is."""
    shape = rule.shape(table.sizes)
    return (shape[1], shape[0]) if rule.transposed else (shape[0], shape[1])


def _placeholders(template: str) -> list[str]:
    return [name for name in STACKS if f"{{{name}}}" in template]


def keys(target: Target, table: RuleTable, targets: Iterable[Target]) -> list[str]:
    """What PEFT finds a target by.

    It is the shortest end of its names that no other module's name ends with. Where that goes
    back to the number of the layer, as between encoder and decoder, it is all names.
    """
    if target.kind == "parameter":
        return [target.template.rpartition("}.")[2]]
    others = {rule.theirs.removesuffix(".weight") for rule in table.rules}
    others |= {other.template for other in targets}
    parts = target.template.split(".")
    ends = [other.split(".") for other in others - {target.template}]
    length = next(n for n in range(1, len(parts) + 1) if parts[-n:] not in [o[-n:] for o in ends])
    suffix = ".".join(parts[-length:])
    return [name for _, name in target.names()] if "{" in suffix else [suffix]


def stem(target: Target, name: str, adapted: Sequence[Target]) -> str:
    """How the names of the tensors of a target start; PEFT nests parameters of one module."""
    if target.kind != "parameter":
        return PREFIX + name
    module = target.template.rpartition(".")[0]
    beside = [t for t in adapted if t.template.rpartition(".")[0] == module]
    deeper = len(beside) - 1 - beside.index(target)
    return PREFIX + name.rpartition(".")[0] + ".base_layer" * deeper


def tensor_names(target: Target, start: str) -> tuple[str, str, str]:
    """Names of the tensors of a, b and the magnitude."""
    ends = {
        "linear": ("lora_A.weight", "lora_B.weight"),
        "parameter": ("lora_A.weight", "lora_B.weight"),
        "embedding": ("lora_embedding_A", "lora_embedding_B"),
        # Of the transposed matrix.
        "tied head": ("lora_B.weight", "lora_A.weight"),
    }
    a, b = ends[target.kind]
    return f"{start}.{a}", f"{start}.{b}", f"{start}.lora_magnitude_vector"


def tensor_shapes(target: Target, rank: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors of a, b and the magnitude."""
    a, b = (target.d_in, rank), (rank, target.d_out)
    if target.kind != "tied head":
        rows = rank * (target.experts or 1)
        a, b = (rows, target.d_in), (target.d_out, rows)
    return a, b, (target.d_out,)


def to_tensors(target: Target, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tensors of a and b, [d_in, R] and [R, d_out], or of experts [E, d_in, R] and so on."""
    if target.kind == "tied head":
        return a, b
    if target.experts is None:
        return a.T, b.T
    return (
        a.swapaxes(1, 2).reshape(-1, target.d_in),
        b.transpose(2, 1, 0).reshape(target.d_out, -1),
    )


def from_tensors(target: Target, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `to_tensors`."""
    if target.kind == "tied head":
        return a, b
    if target.experts is None:
        return a.T, b.T
    return (
        a.reshape(target.experts, -1, target.d_in).swapaxes(1, 2),
        b.reshape(target.d_out, -1, target.experts).transpose(2, 1, 0),
    )
