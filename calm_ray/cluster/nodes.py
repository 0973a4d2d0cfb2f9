"""The nodes of a cluster as a plan sees them: what Ray knows of them, and what they find out when they are asked."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._common.utils import get_system_memory
from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from calm_ray.cluster.machines import DEVICES, MOST_NODES, Node, slots_in, with_slots
from calm_ray.cluster.resources import Resources

ASK_SECONDS = 60.0
"""A node that has not answered by then is planned by what Ray knows of it."""
GROUP_LABEL = "ray.io/node-group"
"""Where Ray notes which kind of its cluster's configuration a node is of."""

# Ray's names of GPUs, where these tell their memory, and ours. Most A100 are called just that, whatever they hold.
DEVICE_OF = {"A100-40G": "A100-40", "A100-80G": "A100-80", "H100": "H100", "H200": "H200"}


@dataclass(frozen=True)
class Memory:
    """What a machine finds out about itself, in bytes."""

    host: int
    """As far as this container may use it."""
    gpu: int | None
    """Of its smallest GPU; None where it has none, or cannot tell."""


@dataclass(frozen=True)
class Kind:
    """A kind of nodes that a cluster may start by itself."""

    name: str
    resources: Resources
    most: int


def nodes_of_cluster() -> list[Node]:
    """The nodes that are there, and those that may be started."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return planned(alive, kinds_of_cluster(), _ask([str(node["NodeID"]) for node in alive]))


def kinds_of_cluster() -> list[Kind]:
    """The nodes that the cluster may start by itself; none where it does not grow."""
    config = ray_state.get_cluster_config()
    groups = config.node_group_configs if config else []
    return [Kind(group.name, dict(group.resources), min(group.max_count, MOST_NODES)) for group in groups]


def planned(alive: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], memory: Mapping[str, Memory]) -> list[Node]:
    """Nodes for a plan: those alive, as `ray.nodes()` has them, and those of each kind that may still be started.

    `memory` is what nodes said of themselves, by their ids; a node that is not there yet is taken to be like one of its
    kind that is.
    """
    groups = [str(node.get("Labels", {}).get(GROUP_LABEL, "")) for node in alive]
    count, known = Counter(groups), dict[str, Memory | None]()
    there: list[tuple[Resources, Memory | None]] = []
    for node, group in zip(alive, groups, strict=True):
        said = memory.get(node["NodeID"])
        there.append((dict(node["Resources"]), said))
        known[group] = known.get(group) or said
    for kind in kinds:
        there += [(kind.resources, known.get(kind.name))] * (kind.most - count[kind.name])
    return with_slots([_node(f"node {number}", *one) for number, one in enumerate(there, start=1)])


def _node(name: str, resources: Resources, said: Memory | None) -> Node:
    labels = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
    gpu = next((DEVICE_OF[label] for label in labels if label in DEVICE_OF), None)
    gpu_memory = said.gpu if said is not None else None
    if gpu_memory is None and gpu is not None:
        gpu_memory = DEVICES[gpu].memory
    return Node(
        name,
        resources.get("CPU", 0.0),
        int(resources.get("GPU", 0)),
        gpu_memory,
        said.host if said is not None else None,
        gpu,
        **slots_in(resources),
    )


def _ask(node_ids: Sequence[str]) -> dict[str, Memory]:
    """The memory of the nodes that answer, by their ids."""
    here = ray.get_runtime_context().get_node_id()
    look = ray.remote(num_cpus=0, max_retries=0)(memory_here)
    calls = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in node_ids
        if node != here
    }
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=ASK_SECONDS) if calls else ([], [])
    found = {here: memory_here()}
    for call in done:
        try:
            found[calls[call]] = ray.get(call)
        except RayError:  # it went meanwhile
            continue
    return found


def memory_here() -> Memory:
    """What this machine has."""
    return Memory(get_system_memory(), _gpu_memory())


def _gpu_memory() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(int(line) for line in found.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
