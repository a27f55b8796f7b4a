"""The machines that a plan is for."""

from __future__ import annotations

import dataclasses

from megaseq.base.errors import must


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices and links; defaults are those of a DGX H100 (NVIDIA's data sheets, 2023) with NDR InfiniBand."""

    devices: int
    memory_gib: float = 80.0
    """Of a device."""
    tflops: float = 989.0
    """Dense products in bfloat16, 10^12 operations a second; fp32 products run at half of the TF32 rate, a quarter."""
    efficiency: float = 0.5
    """Share of `tflops` that products of these sizes reach."""
    memory_bandwidth: float = 3350.0
    """10^9 bytes a second between a device and its memory."""
    link_bandwidth: float = 450.0
    """10^9 bytes a second that a device sends to others in its machine (NVLink 4)."""
    bandwidth: float = 50.0
    """10^9 bytes a second that a device sends to other machines (400 Gbit/s)."""
    host_link_bandwidth: float = 55.0
    """10^9 bytes a second between a device and its host (PCI Express 5.0)."""
    host_memory_bandwidth: float = 75.0
    """10^9 bytes a second of the host's memory, a device's part of it (16 channels of DDR5-4800 for 8 devices)."""
    disk_bandwidth: float = 6.0
    """10^9 bytes a second of the host's disks, a device's part of them (8 NVMe drives)."""
    latency_us: float = 15.0
    """Microseconds of a message, however short."""
    launch_us: float = 4.0
    """Microseconds from one operation to the next, however small they are."""
    devices_per_machine: int = 8
    reserved: float = 0.08
    """Share of the memory that is not to be used: the driver's, the collectives', and what lies between tensors."""

    def __post_init__(self) -> None:
        """Raises ParamsError for a figure that is not positive."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0 and field.name not in ("latency_us", "reserved"):
                flag = "--" + field.name.replace("_", "-")
                raise must(flag, "be positive", value, "Give the figure of your machines")

    @property
    def usable_bytes(self) -> float:
        """Bytes of a device that a run may have."""
        return self.memory_gib * (1 - self.reserved) * (1 << 30)

    def operations(self, precision: str) -> float:
        """Returns the operations a second that a device reaches."""
        share = 0.25 if precision == "fp32" else 1.0
        return self.tflops * 1e12 * self.efficiency * share

    def speed(self, *, stride: int, size: int) -> float:
        """Returns the bytes a second that a rank of a ring of `size` ranks, `stride` apart, sends.

        Between machines a ring has the links of all its members in a machine, each to its own member elsewhere.
        """
        if stride * size <= self.devices_per_machine:
            return self.link_bandwidth * 1e9
        members = max(1, min(size, self.devices_per_machine // stride))
        return min(self.link_bandwidth, self.bandwidth * members) * 1e9
