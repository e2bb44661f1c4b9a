"""Arrays onto the devices of a mesh, by one process or by several, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ecomjax.errors import UserError
from ecomjax.sharding import MESH_AXES, RULES, row_parts, rows_sharding, whole
from ecomjax.typing import Params


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


def shard_params(params: Params, shardings: Params) -> Params:
    """The parameters, of which every process has all or its part, on their devices."""
    if jax.process_count() == 1:
        return jax.device_put(params, shardings)

    def place(x: Any, sharding: Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        held = np.asarray(x)
        return build_array(held.shape, sharding, lambda cut: held[cut])

    return jax.tree.map(place, params, shardings)


def shard_rows(batch: Any, mesh: Mesh, axis: int = 0, share: bool = False) -> Any:
    """A batch on its devices, rows split over data, fsdp and expert.

    Args:
        batch: tree of arrays with the rows along `axis`.
        mesh: from `make_mesh`.
        axis: 1 where microbatches lead.
        share: whether the batch is this process's share of the rows (`row_share`), not all.

    Raises:
        UserError: the rows do not divide.
    """
    rows, parts = jax.tree.leaves(batch)[0].shape[axis], row_parts(mesh)
    of = row_share(mesh)[1] if share else 1
    if rows * of % parts:
        raise UserError(
            f"{rows * of} rows do not divide over {parts} devices",
            "config.mesh",
            f"use a multiple of the sizes of {', '.join(RULES['batch'] or ())}, multiplied",
        )
    sharding = rows_sharding(mesh, axis)

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        if not share:
            return build_array(x.shape, sharding, lambda cut: x[cut])
        shape = (*x.shape[:axis], x.shape[axis] * of, *x.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, batch)


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of all rows the devices of this process hold, and of how many parts.

    Processes may hold the same part, where their devices split the model alone.

    Raises:
        UserError: the rows of this process do not lie side by side.
    """
    parts = row_parts(mesh)
    held = rows_sharding(mesh).addressable_devices_indices_map((parts,))
    first = {(cut or (slice(0),))[0].start or 0 for cut in held.values()}
    start, count = min(first), len(first)
    if first != set(range(start, start + count)) or start % count or parts % count:
        raise UserError(
            f"process {jax.process_index()} holds the parts {sorted(first)} of {parts} of the rows",
            "config.mesh",
            "use sizes with which the devices of a process hold neighbouring rows",
        )
    return start // count, parts // count


def gather(tree: Any, mesh: Mesh) -> Any:
    """The same arrays, whole on every device, so that every process can read them."""
    return jax.jit(lambda x: x, out_shardings=whole(mesh))(tree)


def bytes_per_device(tree: Any) -> int:
    """Of arrays that are on their devices, what each of these holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def meet(mesh: Mesh) -> None:
    """Connects the processes of a mesh along all of its axes, while none is ahead of the others.

    On CPUs a first collective fails where a process is half a minute late, which the compilation
    of a step may well take; once connected, they wait for each other.
    """
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices("mesh")
    groups = [*MESH_AXES, RULES["batch"], MESH_AXES]
    spec = PartitionSpec(MESH_AXES)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def add(x: Any) -> Any:
        return x + sum(jax.lax.psum(x, axes) for axes in groups)

    sharding = NamedSharding(mesh, spec)
    ones = build_array((mesh.size,), sharding, lambda cut: np.ones(mesh.size, np.float32)[cut])
    jax.block_until_ready(jax.jit(add)(ones))
