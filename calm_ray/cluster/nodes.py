"""The cluster's nodes as the planner sees them, from Ray's data and from probes that run on them."""

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

from calm_ray.cluster.machines import DEVICES, MAX_NODES, Node, slots_in, with_slots
from calm_ray.cluster.resources import Resources

PROBE_SECONDS = 60.0
"""For nodes that have not answered by then, the planner uses only Ray's data."""
GROUP_LABEL = "ray.io/node-group"
"""Label that names the node group, in the cluster's configuration, that a node belongs to."""

# Ray's GPU names that imply a memory size, and ours. Ray calls most A100s just that, whatever their memory.
DEVICE_OF = {"A100-40G": "A100-40", "A100-80G": "A100-80", "H100": "H100", "H200": "H200"}


@dataclass(frozen=True)
class Memory:
    """Memory of a node as it reports it, in bytes."""

    host: int
    """As much as the container may use."""
    gpu: int | None
    """Of the smallest GPU; None if there is none or it is unknown."""


@dataclass(frozen=True)
class Kind:
    """A kind of node that the autoscaler may start."""

    name: str
    resources: Resources
    most: int


def nodes_of_cluster() -> list[Node]:
    """The nodes that are alive, and those the autoscaler may start."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return planned(alive, kinds_of_cluster(), _probe([str(node["NodeID"]) for node in alive]))


def kinds_of_cluster() -> list[Kind]:
    """The kinds of nodes that the autoscaler may start; empty without one."""
    config = ray_state.get_cluster_config()
    groups = config.node_group_configs if config else []
    return [Kind(group.name, dict(group.resources), min(group.max_count, MAX_NODES)) for group in groups]


def planned(alive: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], memory: Mapping[str, Memory]) -> list[Node]:
    """Nodes for the planner: those alive, in the format of `ray.nodes()`, and those that may still be started.

    `memory` holds what nodes reported, by id. A node that is not alive yet is assumed to match a live one of its kind.
    """
    groups = [str(node.get("Labels", {}).get(GROUP_LABEL, "")) for node in alive]
    count, known = Counter(groups), dict[str, Memory | None]()
    nodes: list[tuple[Resources, Memory | None]] = []
    for node, group in zip(alive, groups, strict=True):
        reported = memory.get(node["NodeID"])
        nodes.append((dict(node["Resources"]), reported))
        known[group] = known.get(group) or reported
    for kind in kinds:
        nodes += [(kind.resources, known.get(kind.name))] * (kind.most - count[kind.name])
    return with_slots([_node(f"node {number}", *one) for number, one in enumerate(nodes, start=1)])


def _node(name: str, resources: Resources, reported: Memory | None) -> Node:
    labels = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
    gpu = next((DEVICE_OF[label] for label in labels if label in DEVICE_OF), None)
    gpu_memory = reported.gpu if reported is not None else None
    if gpu_memory is None and gpu is not None:
        gpu_memory = DEVICES[gpu].memory
    return Node(
        name,
        resources.get("CPU", 0.0),
        int(resources.get("GPU", 0)),
        gpu_memory,
        reported.host if reported is not None else None,
        gpu,
        **slots_in(resources),
    )


def _probe(node_ids: Sequence[str]) -> dict[str, Memory]:
    """Asks nodes for their memory; returns it by id for those that answer."""
    here = ray.get_runtime_context().get_node_id()
    probe = ray.remote(num_cpus=0, max_retries=0)(memory_here)
    calls = {
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in node_ids
        if node != here
    }
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=PROBE_SECONDS) if calls else ([], [])
    found = {here: memory_here()}
    for call in done:
        try:
            found[calls[call]] = ray.get(call)
        except RayError:  # the node was lost meanwhile
            continue
    return found


def memory_here() -> Memory:
    """Memory of the node that this runs on."""
    return Memory(get_system_memory(), _gpu_memory())


def _gpu_memory() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(int(line) for line in found.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
