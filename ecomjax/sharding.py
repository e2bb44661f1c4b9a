"""Where arrays are to lie: one mesh, and what each logical axis of a parameter means on it.

With `placement`, which puts them there, the only caller of mesh APIs. Programs are written for
one device; `jax.jit` splits them after the shardings of their arguments.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, Params

MESH_AXES = ("data", "fsdp", "tensor", "expert")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "experts": "expert",
    "layers": None,
    "head_dim": None,
    "qkv": None,
    "positions": None,
    "types": None,
    "classes": None,
    "routes": None,
}
"""The mesh axes that each logical axis is split over; None where every device holds all of it."""

PARAMETERS_ALONE = ("embed", "experts")
"""Logical axes that activations are not split over: the mesh axes of their rules hold rows."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of the devices given, or of all; one of the sizes may be -1, for the rest.

    Sizes that multiply to fewer devices take the first ones, where one process has them all.

    Raises:
        UserError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor, expert]
    asked = ", ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and 0 < fixed and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    used = math.prod(sizes)
    if min(sizes) < 1 or used > len(devices) or (used < len(devices) and jax.process_count() > 1):
        raise UserError(
            f"a mesh of {asked} does not fit {len(devices)} devices",
            "config.mesh",
            "use sizes of 1 or more that multiply to the number of devices, one of them -1 "
            "for the rest",
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, types, devices=devices[:used])


def use(mesh: Mesh) -> Any:
    """Context in which `constrain` means this mesh; one of a single device means nothing to it."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def in_use() -> Any:
    """The mesh in use, to programs that are written for all of it; else None."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def constrain(x: Array, names: Sequence[str | None]) -> Array:
    """The same values, split over the mesh in use as the logical axes of an activation say.

    Without a mesh, x as it is. What does not divide is whole, as it is in the parameters,
    where that is told.

    Args:
        x: any array.
        names: a key of `RULES` for each axis, or None for one that is not split.

    Raises:
        ValueError: another number of axes, or an unknown one.
    """
    spec = spec_of(names, x.shape)
    return x if in_use() is None else jax.lax.with_sharding_constraint(x, spec)


def spec_of(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """How `constrain` splits an activation of this shape.

    Raises:
        ValueError: see there.
    """
    if len(names) != len(shape):
        raise ValueError(f"axes {tuple(names)} of an activation of shape {tuple(shape)}")
    mesh = in_use()
    split = [None if name in PARAMETERS_ALONE else name for name in names]
    return _spec("activation", split, shape, {} if mesh is None else mesh.shape)[0]


class Fallback(NamedTuple):
    """An axis of a parameter that every device holds whole, since it does not divide."""

    path: str
    axis: str
    size: int
    mesh_axes: tuple[str, ...]
    parts: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.axis} of {self.size} does not divide over {self.parts} devices "
            f"of mesh axis {' and '.join(self.mesh_axes)}, so each holds all of it"
        )


def specs(
    axes: Params, shapes: Params, mesh: Mesh | AbstractMesh, most_replicated: int = 2**30
) -> tuple[Params, list[Fallback]]:
    """How each parameter is split, and which axes are not, though `RULES` say so.

    Each array of a quantized kernel is split as the kernel that it stands for.

    Args:
        axes, shapes: what `models.registry.describe` returns, or arrays for the shapes.
        mesh: from `make_mesh`.
        most_replicated: bytes that each device may hold in excess because axes do not divide.

    Raises:
        ValueError: a logical axis that `RULES` lack, or two of a parameter on one mesh axis.
        UserError: more bytes are replicated than allowed.
    """
    fallbacks: dict[Fallback, None] = {}
    excess, flat = 0.0, {}
    described = trees.flatten(shapes)
    for path, leaf in trees.flatten(axes).items():
        arrays, struct = jax.tree.flatten(described[path])
        specs_of_leaf = []
        for array in arrays:
            # Scales have axes of 1 where the kernel has many: nothing to split, nothing to tell.
            whole = zip(leaf.names, array.shape, described[path].shape, strict=True)
            names = [None if size == 1 < full else name for name, size, full in whole]
            spec, missed = _spec(path, names, array.shape, mesh.shape)
            fallbacks |= dict.fromkeys(missed)
            held = math.prod(NamedSharding(mesh, spec).shard_shape(array.shape))
            lost = math.prod(fallback.parts for fallback in missed)
            excess += held * (1 - 1 / lost) * np.dtype(array.dtype).itemsize
            specs_of_leaf.append(spec)
        flat[path] = jax.tree.unflatten(struct, specs_of_leaf)
    if excess > most_replicated:
        raise UserError(
            f"{excess / 2**30:.1f} GiB are replicated on every device: {next(iter(fallbacks))}"
            + (f" and {len(fallbacks) - 1} more" if len(fallbacks) > 1 else ""),
            "mesh",
            "use a mesh whose sizes divide the model's",
        )
    return trees.unflatten(flat), list(fallbacks)


def adapter_specs(
    adapter: Adapter, axes: Params, shapes: Params, mesh: Mesh | AbstractMesh
) -> Adapter:
    """How each array of an adapter is split: as its kernel, along the axes that both have.

    Factors have the stack of the kernel; along its inputs (`a`) or outputs (`b`, magnitudes),
    which lie flat in them, they are split as the first of these is. The rank is not.

    Args:
        adapter: arrays, or their shapes.
        axes, shapes: of the parameters, see `specs`.
        mesh: from `make_mesh`.
    """
    described, kernels = trees.flatten(axes), trees.flatten(shapes)

    def of_leaf(path: str, leaf: Any) -> Any:
        own = described[path]
        of_kernel, _ = _spec(path, own.names, kernels[path].shape, mesh.shape)
        stack, d_in = of_kernel[: own.stacked], of_kernel[own.stacked]
        d_out = of_kernel[own.stacked + own.inputs]
        rest = {"a": (d_in, None), "b": (None, d_out), "magnitude": (d_out,)}
        # Several adapters lie along an axis behind the stack.
        held = (None,) * (leaf.scale.ndim - own.stacked)

        def of_array(field: Any, _: Any) -> PartitionSpec:
            return PartitionSpec(*stack, *held, *rest.get(field[0].name, ()))

        return jax.tree_util.tree_map_with_path(of_array, leaf)

    flat = trees.flatten(adapter)
    return trees.unflatten({path: of_leaf(path, leaf) for path, leaf in flat.items()})


def state_shardings(state: Any, trained: Any, mesh: Mesh) -> Any:
    """Where the arrays of a training state lie: as the parameter whose path theirs ends with.

    Moments of an optimizer have the shapes of the parameters they are of; all else, such as
    the counts of steps, every device holds.

    Args:
        state: any tree of arrays or shapes.
        trained: a `NamedSharding` for each trained parameter.
        mesh: that all of them are on.
    """
    own = {tuple(path): s for path, s in jax.tree_util.tree_flatten_with_path(trained)[0]}

    def of(path: Any, leaf: Any) -> NamedSharding:
        ends = (own.get(tuple(path[i:])) for i in range(len(path)))
        found = next((end for end in ends if end is not None and len(end.spec) <= leaf.ndim), None)
        return found or whole(mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def whole(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def _spec(
    path: str, names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> tuple[PartitionSpec, list[Fallback]]:
    """Of the axes that have names, the leading ones of the shape; None is not split.

    Sizes are those of the mesh axes, 1 where there are none.
    """
    spec: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    fallbacks: list[Fallback] = []
    for name, size in zip(names, shape, strict=False):
        if name is None:
            spec.append(None)
            continue
        if name not in RULES:
            raise ValueError(f"{path}: no rule for the logical axis {name!r}")
        rule = RULES[name]
        own = (rule,) if isinstance(rule, str) else rule or ()
        for mesh_axis in own:
            if mesh_axis in taken:
                raise ValueError(
                    f"{path}: {taken[mesh_axis]!r} and {name!r} are both split over {mesh_axis!r}"
                )
            taken[mesh_axis] = name
        parts = math.prod(sizes.get(mesh_axis, 1) for mesh_axis in own)
        if size % parts:
            fallbacks.append(Fallback(path, name, size, own, parts))
        spec.append(None if size % parts else rule)
    return PartitionSpec(*spec), fallbacks


def shardings(specs: Params, mesh: Mesh) -> Params:
    """The same tree with a `NamedSharding` in place of each spec."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def row_parts(mesh: Mesh | None = None) -> int:
    """Over how many parts rows are split, by this mesh or the one in use; 1 without a mesh."""
    mesh = in_use() if mesh is None else mesh
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def rows_spec(rows: int) -> PartitionSpec:
    """How so many rows are split over the mesh in use: not at all where they do not divide."""
    return PartitionSpec(RULES["batch"]) if rows % row_parts() == 0 else PartitionSpec()


def rows_sharding(mesh: Any, axis: int = 0) -> NamedSharding:
    """Rows along `axis` are split, and nothing else."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["batch"]))
