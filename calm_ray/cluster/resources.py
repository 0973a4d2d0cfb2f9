"""Resources that a run needs, in Ray's terms: engines and workers, with CPUs and GPUs for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DATA_CPUS = 0.5
"""Logical CPUs per Ray Data task."""

TRAIN_SLOT = "calm_ray_train"
"""Custom Ray resource: a slot for one training worker. Nodes reserved for engines have none."""

ENGINE_SLOT = "calm_ray_engine"
"""Custom Ray resource: a slot for one engine. If any node has it, engines run only on nodes that do."""

Resources = dict[str, float]


@dataclass(frozen=True)
class Group:
    """A number of identical processes that a run starts."""

    what: Literal["engine", "worker", "data task"]
    count: int
    takes: Resources
    """Resources of each, all on one node."""


@dataclass(frozen=True)
class Needs:
    """Everything that a run needs at the same time."""

    parts: list[Group]

    @property
    def total(self) -> Resources:
        names = ("CPU", "GPU")
        return {name: sum(part.count * part.takes.get(name, 0.0) for part in self.parts) for name in names}

    def count(self, what: str) -> int:
        return sum(part.count for part in self.parts if part.what == what)


def shortage(needs: Needs, most: Resources, nodes: Sequence[Resources]) -> str | None:
    """Why a cluster of these nodes, with at most `most` in total, cannot hold a run; None if it can."""
    short = {name: amount for name, amount in needs.total.items() if amount > most[name]}
    if short:
        wants = ", ".join(
            f"{amount:g} {name} (the cluster has at most {most[name]:g})" for name, amount in short.items()
        )
        return (
            f"this run needs {wants}. Lower engines.per_language, engines.shared, engines.cpus, train.workers or "
            "train.cpus_per_worker, use a larger cluster, or set device=cpu if there are no GPUs."
        )
    for part in needs.parts:
        if not any(all(node.get(name, 0.0) >= amount for name, amount in part.takes.items()) for node in nodes):
            wants = " and ".join(f"{amount:g} {name}" for name, amount in part.takes.items() if amount)
            return (
                f"an engine or a worker needs {wants} on one node, but no node has that much. "
                "Lower engines.tensor_parallel_size, engines.cpus or train.cpus_per_worker."
            )
    return None
