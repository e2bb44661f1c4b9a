"""What a chip can do at most: the peaks that estimates are held against."""

from __future__ import annotations

import dataclasses

from ecomjax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device, as vendors publish them.

    Attributes:
        name: as people call it.
        memory: bytes that a program can use.
        flops: floating-point operations a second, bfloat16 factors, dense.
        bandwidth: bytes a second between memory and chip.
        interconnect: bytes a second that it sends along one axis of the torus, in both
            directions together; of a GPU over NVLink. Collectives over several axes may be
            faster than that.
        cores: that its names count, as in v5p-32.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    interconnect: float
    cores: int = 1


CHIPS: dict[str, Chip] = {
    # https://cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 800 GB/s, 1,600 Gbit/s over
    # the 4 links of a 2D torus.
    "TPU v5 lite": Chip("v5e", int(15.75 * GIB), 197e12, 0.8e12, 100e9),
    # .../v5p: 459 TFLOP/s, 95 GiB at 2,765 GB/s, 1,200 GB/s (sent and received) over 6 links.
    "TPU v5": Chip("v5p", int(95.74 * GIB), 459e12, 2.765e12, 200e9, cores=2),
    # .../v6e: 918 TFLOP/s, 32 GB at 1,600 GB/s, 3,200 Gbit/s over the 4 links of a 2D torus.
    "TPU v6 lite": Chip("v6e", int(31.25 * GIB), 918e12, 1.6e12, 200e9),
    # Data sheets of NVIDIA; NVLink one way. The memory is what jax reports, see `chip_of`.
    "NVIDIA A100": Chip("A100", 80 * GIB, 312e12, 2.0e12, 300e9),
    "NVIDIA H100": Chip("H100", 80 * GIB, 989e12, 3.35e12, 450e9),
    "NVIDIA H200": Chip("H200", 141 * 10**9, 989e12, 4.8e12, 450e9),
}
"""By the first words of `jax.Device.device_kind`. The memory of TPUs is what XLA gives a program
of what there is."""


def chip_of(device_kind: str) -> Chip:
    """The chip of a device.

    Raises:
        UserError: a chip that the table lacks.
    """
    known = [kind for kind in CHIPS if device_kind.startswith(kind)]
    if not known:
        raise UserError(
            f"the peaks of device {device_kind!r} are not known",
            "ecomjax/experiments/chips.py",
            f"add them to the table, which has {', '.join(chip.name for chip in CHIPS.values())}",
        )
    return CHIPS[max(known, key=len)]
