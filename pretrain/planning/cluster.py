"""The machines of a plan: GPUs by name, how they are linked, and how much of their peaks a training reaches."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, from its vendor's data sheet.

    Attributes:
        peaks: the name under which `monitor.throughput` has its peaks.
        memory_bytes: its memory.
        bandwidth: of its memory, in bytes per second.
        link: to the GPUs of its node, in bytes per second and direction.
    """

    peaks: str
    memory_bytes: float
    bandwidth: float
    link: float


GPUS = {
    "a100": Gpu("A100", 80e9, 2.04e12, 300e9),
    "h100": Gpu("H100", 80e9, 3.35e12, 450e9),
    "h200": Gpu("H200", 141e9, 4.8e12, 450e9),
    "b200": Gpu("B200", 180e9, 8.0e12, 900e9),
    "mi300x": Gpu("MI300X", 192e9, 5.3e12, 448e9),
}

# The share of each peak that large kernels reach, from published kernels on an H100: products in bf16 650 of 989 TFLOP/s,
# attention some 470, streaming kernels 2.85 of 3.35 TB/s.
PRODUCTS, ATTENTION, STREAMING = 0.657, 0.475, 0.85
LINKS = 0.75  # of a link, in a large collective
WHOLE_STEPS = 0.87  # of the time that kernels alone would take
ROOM = 0.92  # of the memory: the rest is CUDA's own, and fragmentation


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs of one kind.

    Attributes:
        network: between nodes, in Gbit/s for each GPU.
    """

    name: str
    nodes: int
    gpus_per_node: int
    network: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpu(self) -> Gpu:
        """The kind of GPU. Raises UserError for an unknown name."""
        if self.name not in GPUS:
            raise UserError(f"--gpu {self.name} is not known. Known are: {', '.join(GPUS)}.")
        return GPUS[self.name]

    def rate(self, ranks: int) -> float:
        """Return the bytes per second that each of `ranks` consecutive ranks sends in a large collective."""
        slowest = self.gpu.link if ranks <= self.gpus_per_node else min(self.gpu.link, self.network * 1e9 / 8)
        return LINKS * slowest
