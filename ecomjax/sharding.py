"""Where arrays lie: one mesh, and what each logical axis of a parameter means on it.

The only caller of mesh APIs. Programs are written for one device; `jax.jit` splits them
after the shardings of their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, Params

MESH_AXES = ("data", "fsdp", "tensor", "expert")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
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


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of all devices, or of those given; one of the sizes may be -1, for the rest.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor, expert]
    asked = ", ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and fixed > 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"a mesh of {asked} does not fit {len(devices)} devices",
            "mesh",
            "use sizes of 1 or more that multiply to the number of devices, one of them -1 "
            "for the rest",
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, types, devices=devices)


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
    axes: Params, shapes: Params, mesh: Mesh, most_replicated: int = 2**30
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
            spec, missed = _spec(path, names, array.shape, mesh)
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


def adapter_specs(adapter: Adapter, axes: Params, mesh: Mesh) -> Adapter:
    """How each array of an adapter is split: over experts, as its kernel; factors are whole."""
    described = trees.flatten(axes)

    def of_leaf(path: str, leaf: Any) -> Any:
        names = described[path].names[: described[path].stacked]
        return jax.tree.map(lambda x: _spec(path, names, x.shape, mesh)[0], leaf)

    flat = trees.flatten(adapter)
    return trees.unflatten({path: of_leaf(path, leaf) for path, leaf in flat.items()})


def _spec(
    path: str, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh
) -> tuple[PartitionSpec, list[Fallback]]:
    """Of the axes that have names, the leading ones of the shape; None is not split."""
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
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in own)
        if size % parts:
            fallbacks.append(Fallback(path, name, size, own, parts))
        spec.append(None if size % parts else rule)
    return PartitionSpec(*spec), fallbacks


def shardings(specs: Params, mesh: Mesh) -> Params:
    """The same tree with a `NamedSharding` in place of each spec."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def shard_params(params: Params, shardings: Params) -> Params:
    """The parameters on their devices."""
    return jax.device_put(params, shardings)


def shard_rows(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """A batch on its devices, rows split over data and fsdp.

    Args:
        batch: tree of arrays with the rows along `axis`.
        mesh: from `make_mesh`.
        axis: 1 where microbatches lead.

    Raises:
        UserError: the rows do not divide.
    """
    rows, over = jax.tree.leaves(batch)[0].shape[axis], RULES["batch"] or ()
    parts = math.prod(mesh.shape[name] for name in over)
    if rows % parts:
        raise UserError(
            f"{rows} rows do not divide over {parts} devices",
            "mesh",
            f"use a multiple of the sizes of {' and '.join(over)}, multiplied",
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(*[None] * axis, over)))


def build_array(
    shape: tuple[int, ...],
    sharding: Sharding,
    part: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array whose parts go to their devices one by one, so that the host holds one at a time.

    Args:
        shape: of the whole array.
        sharding: of the array.
        part: gives the part that slices cut out of the array; asked once for each part that
            devices of this process hold, however many hold it.
    """
    holders: dict[tuple, list[Any]] = {}
    cuts: dict[tuple, tuple[slice, ...]] = {}
    for device, cut in sharding.addressable_devices_indices_map(shape).items():
        key = tuple((s.start, s.stop) for s in cut or ())
        holders.setdefault(key, []).append(device)
        cuts[key] = cut or ()
    arrays = []
    for key, devices in holders.items():
        values = part(cuts[key])
        arrays += jax.block_until_ready([jax.device_put(values, device) for device in devices])
        del values
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
