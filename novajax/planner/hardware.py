"""What the machines are: chips by their published figures, and a booking of hosts full of them.

Rates are dense, one direction, per GPU, at the data sheet's clocks: nothing that runs is faster. Memory is what a program
can see, read from OpenXLA's target descriptions (xla/backends/gpu/target_config/specs/*.txtpb, device_memory_size).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import msgspec

from novajax.core.errors import ConfigError

Arithmetic = Literal["float32", "bfloat16", "int8", "fp8"]
"""What a matrix unit multiplies; float32 runs as TF32."""


class Chip(msgspec.Struct, frozen=True, kw_only=True):
    """One accelerator."""

    name: str
    hbm_bytes: int
    hbm_bytes_per_s: float
    flop_per_s: dict[Arithmetic, float]
    nvlink_bytes_per_s: float
    """To all GPUs of the host together, one direction."""
    pcie_bytes_per_s: float
    network_bytes_per_s: float
    """One GPU's share of its host's network, one direction, where the booking does not say."""
    gpus_per_host: int
    sources: str


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A booking: `nodes` hosts of `gpus_per_host` equal chips. Devices are numbered host by host."""

    chip: Chip
    nodes: int
    gpus_per_host: int
    network_bytes_per_s: float
    """One GPU's share, one direction."""

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus_per_host

    def name(self) -> str:
        """For people: '16 hosts of 8 h100'."""
        hosts = "host" if self.nodes == 1 else "hosts"
        return f"{self.nodes} {hosts} of {self.gpus_per_host} {self.chip.name}"


USABLE_SHARE = 0.92
"""Share of an accelerator's memory that weights, pages and activations may fill, here and in `engine.capacity`; the rest is the
runtime's (contexts, NCCL, fragmentation)."""

HOP_S: Mapping[str, float] = MappingProxyType({"nvlink": 0.6e-6, "network": 2.7e-6})
"""Seconds that the smallest message takes from one device to the next, by link: the lowest entries of NCCL's own cost table
(NVIDIA/nccl src/graph/tuning.cc, hwLatencies, Ring LL)."""

_HOPPER: dict[Arithmetic, float] = {"float32": 494.7e12, "bfloat16": 989.4e12, "int8": 1978.9e12, "fp8": 1978.9e12}
"""NVIDIA H100 data sheet, SXM column, halved where it says "with sparsity"; H200's is equal."""


def chips() -> dict[str, Chip]:
    """The chips that can be planned for, by the name on the command line."""
    return {
        "h100": Chip(
            name="h100",
            hbm_bytes=84_942_979_072,
            hbm_bytes_per_s=3.35e12,
            flop_per_s=_HOPPER,
            nvlink_bytes_per_s=450e9,
            pcie_bytes_per_s=64e9,
            network_bytes_per_s=50e9,
            gpus_per_host=8,
            sources="NVIDIA H100 data sheet (SXM), DGX H100 (eight 400 Gb/s ports for eight GPUs), OpenXLA h100_sxm.txtpb",
        ),
        "h200": Chip(
            name="h200",
            hbm_bytes=151_397_597_184,
            hbm_bytes_per_s=4.8e12,
            flop_per_s=_HOPPER,
            nvlink_bytes_per_s=450e9,
            pcie_bytes_per_s=64e9,
            network_bytes_per_s=50e9,
            gpus_per_host=8,
            sources="NVIDIA H200 data sheet (SXM), DGX H200 (eight 400 Gb/s ports for eight GPUs), OpenXLA h200.txtpb",
        ),
        "b200": Chip(
            name="b200",
            hbm_bytes=191_514_411_008,
            hbm_bytes_per_s=8.0e12,
            flop_per_s={"float32": 1.125e15, "bfloat16": 2.25e15, "int8": 4.5e15, "fp8": 4.5e15},
            nvlink_bytes_per_s=900e9,
            pcie_bytes_per_s=64e9,
            network_bytes_per_s=50e9,
            gpus_per_host=8,
            sources="NVIDIA DGX B200 data sheet (an eighth of the system's figures, without sparsity), OpenXLA b200.txtpb",
        ),
    }


def chip(name: str) -> Chip:
    """By name. Raises ConfigError for a chip that is not in the table."""
    known = chips()
    if name.lower() not in known:
        raise ConfigError(f"chip {name!r} is not known; known: {', '.join(known)}", param="chip")
    return known[name.lower()]


def cluster(chip_name: str, nodes: int, gpus_per_host: int | None = None, host_network_bytes_per_s: float | None = None) -> Cluster:
    """A booking; what is None comes from the chip's usual host. Raises ConfigError for a size below one."""
    kind = chip(chip_name)
    per_host = kind.gpus_per_host if gpus_per_host is None else gpus_per_host
    if nodes < 1 or per_host < 1:
        raise ConfigError(f"a booking of {nodes} hosts with {per_host} GPUs each has no devices", param="nodes")
    share = kind.network_bytes_per_s if host_network_bytes_per_s is None else host_network_bytes_per_s / per_host
    return Cluster(chip=kind, nodes=nodes, gpus_per_host=per_host, network_bytes_per_s=share)
