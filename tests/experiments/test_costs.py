"""Operations, traffic and bytes sent: against arithmetic, XLA's own count, and the text of TPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ecomjax import sharding
from ecomjax.errors import UserError
from ecomjax.experiments.chips import CHIPS, Chip, chip_of
from ecomjax.experiments.costs import flops_of, measure, traffic_of
from ecomjax.experiments.hlo import Program

CHIP = Chip("toy", memory=2**30, flops=1e9, bandwidth=1e6, interconnect=1e5)


def compiled(function, *shapes):
    found = jax.jit(function).lower(*shapes).compile()
    return found, Program(found.as_text())


def shape(*sizes, dtype=jnp.float32, spec=None, mesh=None):
    lies = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=lies)


def test_flops_are_those_of_xla_where_there_is_no_loop():
    def f(x, y, z):
        return jnp.einsum("bij,bjk->bik", x @ y, z)

    found, program = compiled(f, shape(4, 16, 32), shape(32, 64), shape(4, 64, 8))
    costs = measure(program, CHIP)
    assert costs.flops == 2 * 4 * 16 * 32 * 64 + 2 * 4 * 16 * 64 * 8
    assert costs.flops == pytest.approx(found.cost_analysis()["flops"], rel=0.01)


def test_flops_of_a_scan_count_every_trip():
    def f(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    found, program = compiled(f, shape(16, 32), shape(5, 32, 32))
    assert measure(program, CHIP).flops == 5 * 2 * 16 * 32 * 32
    assert found.cost_analysis()["flops"] < 2 * 2 * 16 * 32 * 32, "XLA counts by trips now"


def test_every_device_counts_its_share_and_what_it_sends():
    """Kernels of a scan, split over 8 devices, are gathered layer by layer."""
    mesh = sharding.make_mesh(data=1, fsdp=8)

    def f(x, kernels):
        def body(x, kernel):
            return jnp.tanh(x @ kernel), jnp.sum(x)

        x, sums = jax.lax.scan(body, x, kernels)
        return x, sums

    x = shape(64, 32, spec=("fsdp",), mesh=mesh)
    kernels = shape(5, 32, 32, spec=(None, "fsdp"), mesh=mesh)
    costs = measure(compiled(f, x, kernels)[1], CHIP)
    assert costs.flops == 5 * 2 * 8 * 32 * 32
    # Every device sends its part of a kernel to 7 others, and sums are reduced twice around.
    assert costs.sent["all-gather"] == 5 * 7 * (32 * 32 * 4 / 8)
    assert costs.sent["all-reduce"] == 5 * 2 * 7 / 8 * 4
    assert costs.interconnect == sum(costs.sent.values()) / CHIP.interconnect


def test_traffic_of_a_scan_is_that_of_its_slices():
    def f(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x * kernel), None), x, kernels)[0]

    layers, size = 50, 64 * 64 * 4
    costs = measure(compiled(f, shape(64, 64), shape(layers, 64, 64))[1], CHIP)
    # A trip reads a slice and the carry and writes the carry, and may copy each of the three;
    # were the whole stack read in each, it would be 50 times as much.
    assert 3 * layers * size <= costs.traffic <= 9 * layers * size
    assert costs.seconds >= costs.busy >= costs.traffic / CHIP.bandwidth


def entry(body, before="", devices=4):
    """A program as XLA for TPU writes it."""
    return Program(
        f"HloModule jit_f, num_partitions={devices}\n\n{before}\n"
        f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        ("16,32", "32,64", "16,64", "dim_labels=bf_io->bf", 2 * 16 * 32 * 64),
        (
            "32,16,1",
            "8,24,32",
            "8,24,16",
            "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=fb0_0oi->0fb",
            2 * 8 * 16 * 24 * 32,
        ),
        (
            "16,2,32",
            "2,32,64",
            "16,64,1",
            "window={size=2}, dim_labels=b0f_0io->bf0",
            2 * 2 * 16 * 32 * 64,
        ),
        (
            "8,16,32",
            "8,32,64",
            "8,16,64",
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            2 * 8 * 16 * 32 * 64,
        ),
        (
            "8,16,32",
            "8,32,64",
            "8,16,64",
            "window={size=8 stride=8 pad=7_7 lhs_dilate=7 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            2 * 8 * 16 * 32 * 64,
        ),
    ],
)
def test_flops_of_products_written_as_convolutions(left, right, out, attributes, flops):
    program = entry(
        f"  %l = bf16[{left}] parameter(0)\n  %r = bf16[{right}] parameter(1)\n"
        f"  ROOT %c = bf16[{out}] convolution(%l, %r), {attributes}"
    )
    assert flops_of(program, program.entry, program.entry.instructions["c"]) == flops


def test_kernels_tell_what_they_cost():
    program = entry(
        "  %x = bf16[8,4] parameter(0)\n  %y = bf16[4,2] parameter(1)\n"
        '  %k = bf16[8,2] custom-call(%x, %y), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"640"}}}\n'
        '  ROOT %g = (bf16[8,2], s8[64]) custom-call(%x, %y), custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
    )
    found = {n: flops_of(program, program.entry, i) for n, i in program.entry.instructions.items()}
    assert found == {"x": 0, "y": 0, "k": 640, "g": 2 * 8 * 2 * 4}


def test_a_ragged_product_costs_the_rows_that_are_in_a_group():
    program = entry(
        "  %x = bf16[8,4] parameter(0)\n"
        '  ROOT %k = bf16[8,2] custom-call(%x), custom_call_target="tpu_custom_call", '
        'frontend_attributes={ragged_dot_tiling="8,4,2"}, '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"640"}}}'
    )
    assert measure(program, CHIP).flops == 640
    assert measure(program, CHIP, ragged=0.25).flops == 160


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[1,4]<=[4]", 4),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", 2),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", 4),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", 2),
        ("replica_groups={}", 4),
    ],
)
def test_bytes_sent_by_size_of_group(groups, size):
    """Of 32 bytes that each device gives."""
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute-start")
    lines = [f"  %{kind} = f32[8] {kind}(%x), {groups}, dimensions={{0}}" for kind in kinds]
    program = entry("\n".join(["  %x = f32[8] parameter(0)", *lines]))
    assert measure(program, CHIP).sent == {
        "all-gather": 32 * (size - 1),
        "all-reduce": 2 * 32 * (size - 1) / size,
        "all-to-all": 32 * (size - 1) / size,
        "collective-permute": 32,
    }


def test_a_reduction_of_which_each_keeps_a_slice_is_a_reduce_scatter():
    scatter = """%scatter (p: f32[8]) -> f32[2] {
  %p = f32[8] parameter(0)
  %sum = f32[8] all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %same = f32[8] bitcast(%sum)
  %id = u32[] partition-id()
  ROOT %own = f32[2] dynamic-slice(%same, %id), dynamic_slice_sizes={2}
}
"""
    body = "  %x = f32[8] parameter(0)\n  ROOT %f = f32[2] fusion(%x), kind=kCustom, calls=%scatter"
    assert measure(entry(body, scatter), CHIP).sent == {"reduce-scatter": 32 * 3 / 4}


def test_a_collective_spread_over_instructions_counts_where_it_starts():
    parts = """%begin (p: f32[8]) -> (f32[8], f32[32]) {
  %p = f32[8] parameter(0)
  %g = f32[32] all-gather(%p), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %s = (f32[8], f32[32]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%end (p.1: f32[8], q: f32[32]) -> f32[32] {
  %p.1 = f32[8] parameter(0)
  %q = f32[32] parameter(1)
  %g.1 = f32[32] all-gather(%p.1), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %d = f32[32] custom-call(%p.1, %q, %g.1), custom_call_target="AsyncCollectiveDone"
}
"""
    body = """  %x = f32[8] parameter(0)
  %b = (f32[8], f32[32]) fusion(%x), kind=kCustom, calls=%begin
  %own = f32[8] get-tuple-element(%b), index=0
  %all = f32[32] get-tuple-element(%b), index=1
  ROOT %e = f32[32] fusion(%own, %all), kind=kCustom, calls=%end"""
    assert measure(entry(body, parts), CHIP).sent == {"all-gather": 32 * 3}


def test_what_lies_on_the_chip_is_no_traffic():
    program = entry("""  %x = f32[8] parameter(0)
  %start = (f32[8]{0:S(1)}, f32[8], u32[]{:S(2)}) copy-start(%x)
  %here = f32[8]{0:S(1)} copy-done(%start)
  %twice = f32[8]{0:S(1)} add(%here, %here)
  ROOT %out = f32[8] multiply(%twice, %here)""")
    moved = {
        name: traffic_of(program, program.entry, each)
        for name, each in program.entry.instructions.items()
    }
    assert moved == {"x": 0, "start": 0, "here": 32, "twice": 0, "out": 32}


def test_chips_are_found_by_the_longest_name():
    assert chip_of("TPU v5 lite").name == "v5e"
    assert chip_of("TPU v5").name == "v5p"
    assert chip_of("NVIDIA H100 80GB HBM3").name == "H100"
    for chip in CHIPS.values():
        assert 1e9 < chip.interconnect < chip.bandwidth < chip.flops
    with pytest.raises(UserError, match=r"'cpu' are not known: .*; add them"):
        chip_of("cpu")
