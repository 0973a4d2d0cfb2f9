"""Hardware as the planner sees it: GPUs and nodes.

GB are 10^9 bytes, as in data sheets; a GPU of "80 GB" has a few percent more, which the planner does not rely on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from calm_ray.cluster.resources import ENGINE_SLOT, TRAIN_SLOT

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Device:
    """A GPU, according to its data sheet."""

    name: str
    memory: int
    """Bytes."""
    flops: float
    """Peak FLOP/s in bfloat16 on dense matrices."""
    bandwidth: float
    """Memory bandwidth in bytes/s."""


# NVIDIA's data sheets for the SXM modules: A100 (nvidia-a100-datasheet-us-nvidia-1758950: 312 TFLOPS; 1,555 and 2,039
# GB/s), H100 (989 TFLOPS dense, half of the 1,979 with sparsity; 3.35 TB/s), H200 (the same; 141 GB, 4.8 TB/s).
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40", 40 * GB, 312e12, 1.555e12),
        Device("A100-80", 80 * GB, 312e12, 2.039e12),
        Device("H100", 80 * GB, 989e12, 3.35e12),
        Device("H200", 141 * GB, 989e12, 4.8e12),
    )
}


@dataclass(frozen=True)
class Node:
    """A node as Ray sees it."""

    name: str
    cpus: float
    gpus: int = 0
    gpu_memory: int | None = None
    """Bytes per GPU; None if unknown, in which case it is not checked."""
    memory: int | None = None
    """Bytes of host memory; None if unknown, in which case it is not checked."""
    gpu: str | None = None
    """A key of `DEVICES`."""
    train_slots: int | None = None
    """Training workers it accepts; None if no node of the cluster declares slots (`TRAIN_SLOT`)."""
    engine_slots: int | None = None
    """Engines it accepts; None if no node of the cluster declares slots (`ENGINE_SLOT`)."""

    @property
    def device(self) -> Device:
        """The GPU by name, or guessed from its memory: an A100 up to 96 GB or if unknown, else an H200."""
        if self.gpu is not None:
            return DEVICES[self.gpu]
        memory = 80 * GB if self.gpu_memory is None else self.gpu_memory
        return DEVICES["A100-40" if memory <= 48 * GB else "A100-80" if memory <= 96 * GB else "H200"]


MAX_NODES = 4096
"""Larger node counts are taken for a typo."""


def slots_in(resources: Mapping[str, float]) -> dict[str, int | None]:
    """The slots for workers and engines that a node declares, as fields of `Node`."""
    names = {"train_slots": TRAIN_SLOT, "engine_slots": ENGINE_SLOT}
    return {field: int(resources[name]) if name in resources else None for field, name in names.items()}


def with_slots(kinds: Sequence[Node]) -> list[Node]:
    """If any kind of node declares slots for workers (or engines), kinds that declare none get 0 of them."""
    train, engine = any(kind.train_slots for kind in kinds), any(kind.engine_slots for kind in kinds)
    return [
        replace(
            kind,
            train_slots=(kind.train_slots or 0) if train else None,
            engine_slots=(kind.engine_slots or 0) if engine else None,
        )
        for kind in kinds
    ]
