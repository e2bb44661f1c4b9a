"""Two-way rule tables between the tensors of a checkpoint and our parameter tree.

A rule is data. Its layout says how one tensor is reshaped and transposed, in the axis
letters of `ecomjax.typing`:

    Rule("model.layers.{layer}.self_attn.q_proj.weight", "layers/attn/q/kernel",
         "(N H) D -> D N H")

reads: for every layer a matrix of N*H rows and D columns; split its rows by head, put D
first, and stack over layers. Parentheses join axes into one dimension of their tensor,
the sizes come from the table, and reading the arrow backwards gives the way out. Both
ways are strict: every tensor is consumed, every leaf is produced, every shape is
checked.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ecomjax import trees
from ecomjax.adapters.lowrank import Shape, factors_of
from ecomjax.errors import UserError
from ecomjax.placement import build_array
from ecomjax.typing import DoRA, LowRank, Params

DTYPES: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""The dtypes parameters may have."""

FLOATS = (*DTYPES.values(), np.dtype(np.float16))

STACKS = {"layer": "L", "encoder_layer": "encoder_L", "expert": "E"}
"""Placeholders of names and the axes they are stacked along, outermost first. Where an
encoder goes with a decoder, its sizes have names of their own."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf of ours, and the tensors of theirs it is stacked from."""

    theirs: str
    """Name of their tensor, with the placeholders of `STACKS`."""
    ours: str
    """Path of our leaf."""
    layout: str
    """`their axes -> our axes`, stacked axes left out."""

    @property
    def placeholders(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.theirs)

    def _sides(self) -> list[list[list[str]]]:
        """Axes of the two sides, grouped by dimension: [[N, H], [D]], [[D], [N], [H]]."""
        return [
            [re.findall(r"\w+", group) for group in re.findall(r"\([^)]*\)|\w+", side)]
            for side in self.layout.split("->")
        ]

    @property
    def linear(self) -> bool:
        """Whether theirs is the matrix of a linear layer, [out, in] or, in GPT-2, [in, out]."""
        return self.transposed or self.ours.endswith("/kernel")

    @property
    def transposed(self) -> bool:
        """Whether theirs is a matrix [out, in] of which ours is the transpose, axes split."""
        theirs, ours = self._sides()
        return len(theirs) == 2 and [*itertools.chain(*ours)] == theirs[1] + theirs[0]

    @property
    def embedding(self) -> bool:
        """Whether it is a table of token vectors [V, D]."""
        return self.layout == "V D -> V D"

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of each of their tensors."""
        return _joined(self._sides()[0], sizes)

    def stack(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Sizes of the leading axes that our leaf is stacked along."""
        return tuple(sizes[STACKS[name]] for name in self.placeholders)

    def names(self, sizes: Mapping[str, int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index into the stacked axes, and name of their tensor that lies there."""
        for index in itertools.product(*map(range, self.stack(sizes))):
            yield index, self.theirs.format(**dict(zip(self.placeholders, index, strict=True)))

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Their tensor in our layout."""
        theirs, ours = self._sides()
        return _relayout(tensor, theirs, ours, sizes)

    def to_theirs(self, leaf: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Our leaf, one entry of the stack, in their layout."""
        theirs, ours = self._sides()
        return _relayout(leaf, ours, theirs, sizes)

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of our leaf, stacked axes first."""
        return self.stack(sizes) + _joined(self._sides()[1], sizes)


def _joined(groups: list[list[str]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(np.prod([sizes[axis] for axis in group])) for group in groups)


def _relayout(array, source, target, sizes):
    source_axes = list(itertools.chain(*source))
    order = [source_axes.index(axis) for axis in itertools.chain(*target)]
    split = array.reshape([sizes[axis] for axis in source_axes])
    return split.transpose(order).reshape(_joined(target, sizes))


class _Renamed(Mapping[str, np.ndarray]):
    """Tensors under other names, still read one by one."""

    def __init__(self, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]):
        self._names, self._tensors = names, tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclasses.dataclass(frozen=True)
class RuleTable:
    """All the rules of one model, with its sizes."""

    rules: tuple[Rule, ...]
    sizes: Mapping[str, int]
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors that may be present if equal to another one, such as a tied head."""
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors that may be absent if equal to another one, or, where none is named, zero."""
    ignored: str = ""
    """Regular expression of whole names that carry nothing, such as saved constants."""
    prefix: str = ""
    """Start of names that checkpoints of the bare model leave out."""
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Regular expressions of parts of names that some checkpoints spell otherwise, and how the
    rules spell them."""
    parameters: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Parameters in which models of transformers 5 hold what checkpoints have by modules, in
    the order of their layers: to the paths of our leaves in each, outputs one behind the
    other."""

    def import_params(
        self,
        tensors: Mapping[str, np.ndarray],
        dtype: str,
        where: str,
        shardings: Params | None = None,
    ) -> Params:
        """Our tree from their tensors, as numpy arrays, or with shardings on their devices.

        With shardings the host holds one tensor and one part of a leaf at a time, whatever
        the model's size; two tensors where one is held against its copy.

        Args:
            tensors: name to array; each is read when it is needed, once, or with shardings
                once for each part of a leaf that needs some of it.
            dtype: a key of `DTYPES`.
            where: the file or folder, for error messages.
            shardings: a `jax.sharding.Sharding` for every leaf.
        """
        tensors = self._as_spelled(tensors, where)
        self._check_names(tensors, where)
        flat, own = {}, None if shardings is None else trees.flatten(shardings)
        for rule in self.rules:
            shape = rule.our_shape(self.sizes)
            part = partial(self._part, tensors, rule, DTYPES[dtype], where)
            if own is None:
                flat[rule.ours] = part((slice(None),) * len(shape))
            else:
                flat[rule.ours] = build_array(shape, own[rule.ours], part)
        self._check_copies(tensors, where)
        return trees.unflatten(flat)

    def read_first(
        self, tensors: Mapping[str, np.ndarray], dtype: str, where: str, pattern: str
    ) -> Iterator[np.ndarray]:
        """Leaves whose whole path matches, in the order of paths, one entry at a time.

        Of layers it is the first: one after the other, the entries of `leaf[0]`.
        """
        tensors = self._as_spelled(tensors, where)
        self._check_names(tensors, where)
        for rule in sorted(self.rules, key=lambda rule: rule.ours):
            if re.fullmatch(pattern, rule.ours):
                for index, name in rule.names(self.sizes):
                    if not index or index[0] == 0:
                        tensor = self._read(tensors, name, rule, where)
                        yield rule.to_ours(tensor, self.sizes).astype(DTYPES[dtype], copy=False)

    def fuse_tensors(
        self,
        tensors: Mapping[str, np.ndarray],
        leaves: Mapping[str, LowRank | DoRA],
        dtype: str,
        where: str,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Their tensors with the deltas of an adapter added, one at a time.

        A delta is added to the tensor as it is stored, in float32, and the sum is rounded once.

        Args:
            tensors: see `import_params`.
            leaves: kernels of an adapter by path, layers stacked; each is asked for once, when
                those before it are done.
            dtype: a key of `DTYPES`; of all that is yielded.
            where: the file or folder, for error messages.

        Raises:
            UserError: what `import_params` refuses; a path that no rule has.
        """
        foreign = sorted(set(leaves) - {rule.ours for rule in self.rules})
        if foreign:
            raise UserError(
                "adapter path that no parameter has",
                foreign[0],
                f"the parameters are {', '.join(rule.ours for rule in self.rules)}",
            )
        tensors = self._as_spelled(tensors, where)
        self._check_names(tensors, where)
        self._check_copies(tensors, where)

        def tensors_of(rule: Rule, leaf: LowRank | DoRA | None) -> Iterator[tuple[str, np.ndarray]]:
            for index, name in rule.names(self.sizes):
                tensor = self._read(tensors, name, rule, where)
                if leaf is not None:
                    tensor = self._fused(tensor, rule, leaf, index)
                tensor = np.ascontiguousarray(tensor.astype(DTYPES[dtype], copy=False))
                yield name, tensor
                del tensor  # before the next one is read

        for rule in self.rules:
            yield from tensors_of(rule, leaves[rule.ours] if rule.ours in leaves else None)

    def _fused(
        self, tensor: np.ndarray, rule: Rule, leaf: LowRank | DoRA, index: tuple[int, ...]
    ) -> np.ndarray:
        """tensor + delta in float32."""
        kernel = rule.to_ours(tensor, self.sizes)
        if isinstance(leaf, DoRA):
            own = jax.tree.map(lambda x: x[index], leaf)
            return rule.to_theirs(np.asarray(kernel + own.delta(kernel), np.float32), self.sizes)
        shape = Shape(rule.stack(self.sizes), leaf.a.shape[-2], leaf.b.shape[-1])
        factors = factors_of(leaf, shape, index)
        fused = (factors.a @ factors.b).reshape(kernel.shape)
        fused += kernel.astype(np.float32, copy=False)
        return rule.to_theirs(fused, self.sizes)

    def _check_copies(self, tensors: Mapping[str, np.ndarray], where: str) -> None:
        for copy, original in self.copies.items():
            if copy in tensors and not np.array_equal(tensors[copy], tensors[original]):
                raise UserError(
                    f"tensor {copy!r} differs from {original!r}, though the config ties them",
                    where,
                    "correct the config or the weights",
                )

    def _part(
        self, tensors, rule: Rule, dtype: Any, where: str, cut: tuple[slice, ...]
    ) -> np.ndarray:
        """What the slices cut out of a leaf; no two tensors are held at once."""
        sizes = rule.our_shape(self.sizes)
        kept = [range(*own.indices(size)) for own, size in zip(cut, sizes, strict=True)]
        part = np.empty([len(own) for own in kept], dtype)
        depth = len(rule.placeholders)
        for index, name in rule.names(self.sizes):
            if all(i in own for i, own in zip(index, kept[:depth], strict=True)):
                at = tuple(own.index(i) for i, own in zip(index, kept[:depth], strict=True))
                tensor = rule.to_ours(self._read(tensors, name, rule, where), self.sizes)
                part[at] = tensor[cut[depth:]]
                del tensor
        return part

    def _as_spelled(
        self, tensors: Mapping[str, np.ndarray], where: str
    ) -> Mapping[str, np.ndarray]:
        """The tensors under the names that the rules have for them."""
        bare = not any(name.startswith(self.prefix) for name in tensors)
        complete = {name for rule in self.rules for _, name in rule.names(self.sizes)}
        names: dict[str, str] = {}
        for name in tensors:
            spelled = self.prefix + name if bare and name not in complete else name
            for pattern, instead in self.spellings.items():
                spelled = re.sub(pattern, instead, spelled)
            if spelled in names:
                raise UserError(
                    f"tensors {names[spelled]!r} and {name!r} are both {spelled!r}",
                    where,
                    "use weights that hold each tensor once",
                )
            names[spelled] = name
        return _Renamed(names, tensors)

    def _check_names(self, tensors: Mapping[str, Any], where: str) -> None:
        expected = {name for rule in self.rules for _, name in rule.names(self.sizes)}
        optional = {name for name in tensors if re.fullmatch(self.ignored, name)}
        missing = sorted(expected - set(tensors) - set(self.absent))
        unknown = sorted(set(tensors) - expected - set(self.copies) - optional)
        for kind, names in (("missing", missing), ("unknown", unknown)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(
                    f"{kind} tensor {names[0]!r}{more}",
                    where,
                    "use weights and config of the same model, and of a family built here",
                )

    def _read(self, tensors, name: str, rule: Rule, where: str) -> np.ndarray:
        if name in self.absent and name not in tensors:
            if not self.absent[name]:
                return np.zeros(rule.shape(self.sizes), np.float32)
            name = self.absent[name]
        tensor = tensors[name]
        if tensor.shape != rule.shape(self.sizes):
            raise UserError(
                f"tensor {name!r} has shape {list(tensor.shape)}, "
                f"the config says {list(rule.shape(self.sizes))}",
                where,
                "use weights and config of the same model",
            )
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"tensor {name!r} has dtype {tensor.dtype}",
                where,
                "use weights in float32, float16 or bfloat16",
            )
        return tensor

    def export_shapes(self, dtypes: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of all their tensors, from the dtypes of our leaves by path."""
        return {
            name: jax.ShapeDtypeStruct(rule.shape(self.sizes), dtypes[rule.ours])
            for rule in self.rules
            for _, name in rule.names(self.sizes)
        }

    def export_tensors(self, params: Params) -> Iterator[tuple[str, np.ndarray]]:
        """Their tensors from our tree, one at a time, in the tree's dtype."""
        flat = trees.flatten(params)
        expected = {rule.ours: rule.our_shape(self.sizes) for rule in self.rules}
        if flat.keys() != expected.keys():
            raise ValueError(f"leaves and rules differ in {sorted(flat.keys() ^ expected.keys())}")
        for rule in self.rules:
            leaf = np.asarray(flat[rule.ours])
            if leaf.shape != expected[rule.ours]:
                raise ValueError(f"{rule.ours}: shape {leaf.shape} for {expected[rule.ours]}")
            for index, name in rule.names(self.sizes):
                yield name, np.ascontiguousarray(rule.to_theirs(leaf[index], self.sizes))
