"""Arrays reach the devices that their shardings name."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ecomjax import placement, sharding
from ecomjax.errors import UserError


def test_rows_are_split_over_data_and_fsdp():
    mesh, rows = sharding.make_mesh(2, 2, 2, 1), np.arange(32).reshape(4, 8)
    assert placement.shard_rows(rows, mesh).addressable_shards[0].data.shape == (1, 8)
    placed = placement.shard_rows(rows[None], mesh, axis=1)
    assert placed.sharding.spec == PartitionSpec(None, ("data", "fsdp", "expert"))
    with pytest.raises(UserError, match="3 rows do not divide over 4"):
        placement.shard_rows(rows[:3], mesh)


def test_arrays_are_built_part_by_part():
    """Each distinct part is asked for once, and goes to all devices that hold it."""
    mesh, asked = sharding.make_mesh(1, 2, 4, 1), []
    values = np.arange(48, dtype=np.float32).reshape(4, 12)
    specs = {
        "rows": PartitionSpec("fsdp"),
        "both": PartitionSpec("fsdp", "tensor"),
        "whole": PartitionSpec(),
    }
    for (name, spec), parts in zip(specs.items(), (2, 8, 1), strict=True):
        asked.clear()

        def part(cut):
            asked.append(cut)
            return values[cut]

        own = sharding.shardings({name: spec}, mesh)[name]
        array = placement.build_array(values.shape, own, part)
        np.testing.assert_array_equal(array, values)
        assert array.sharding == own and len(asked) == parts
