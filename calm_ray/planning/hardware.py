"""The nodes available to a run: identical ones, those of a cluster launcher file, or this machine."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from calm_ray.cluster.machines import DEVICES, GB, GIB, MAX_NODES, Node, slots_in, with_slots
from calm_ray.core import safe_yaml
from calm_ray.core.errors import InputError
from calm_ray.core.safety import local_path

# (vCPUs, GPUs, GPU, host memory in GiB): https://aws.amazon.com/ec2/instance-types/p4/ and /p5/.
INSTANCES = {
    "p4d.24xlarge": (96, 8, "A100-40", 1152),
    "p4de.24xlarge": (96, 8, "A100-80", 1152),
    "p5.4xlarge": (16, 1, "H100", 256),
    "p5.48xlarge": (192, 8, "H100", 2048),
    "p5e.48xlarge": (192, 8, "H200", 2048),
    "p5en.48xlarge": (192, 8, "H200", 2048),
}
GIB_PER_CPU = {"c": 2, "m": 4, "r": 8}
"""GiB per vCPU of AWS instances without GPUs, by the first letter of their type. An `xlarge` has four vCPUs."""
_WITHOUT_GPU = re.compile(r"([cmr])\d\w*\.(?:(\d*)xlarge|large)")


def node_for_instance_type(instance: str, name: str, field: str) -> Node:
    """Node of an AWS instance type. Raises InputError naming `field` if the type is unknown."""
    if instance in INSTANCES:
        cpus, gpus, gpu, memory = INSTANCES[instance]
        return Node(name, cpus, gpus, DEVICES[gpu].memory, memory * GIB, gpu)
    if found := _WITHOUT_GPU.fullmatch(instance):
        cpus = 2 if found[2] is None else 4 * int(found[2] or 1)
        return Node(name, cpus, memory=cpus * GIB_PER_CPU[found[1]] * GIB)
    raise InputError(
        f"{field}: {instance!r} is not a known instance type (known: {', '.join(INSTANCES)}, and the c, m and r "
        "families); set CPU, GPU and memory in `resources`, or describe the nodes: --nodes, --gpus-per-node, ..."
    )


def identical_nodes(
    count: int,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    cpus: float | None = None,
    memory: float | None = None,
    gpu: str | None = None,
) -> list[Node]:
    """Identical nodes; memory is in GB. The default is a p4de.24xlarge: eight GPUs of 80 GB.

    `gpu` sets the default of `gpu_memory`; default CPUs and host memory scale with the number of GPUs. Raises
    InputError naming the bad value.
    """
    if gpu is not None and gpu not in DEVICES:
        raise InputError(f"gpu: unknown GPU {gpu!r}; known: {', '.join(DEVICES)}")
    gpus = 8 if gpus is None else gpus
    if gpu_memory is None:
        gpu_memory = 80 if gpu is None else DEVICES[gpu].memory / GB
    _count(count, "nodes", least=1)
    _count(gpus, "gpus-per-node")
    _positive("gpu-memory", gpu_memory)
    p4de_cpus, p4de_gpus, _, p4de_memory = INSTANCES["p4de.24xlarge"]
    cpus = p4de_cpus * max(gpus, 1) / p4de_gpus if cpus is None else cpus
    memory = p4de_memory * max(gpus, 1) / p4de_gpus * GIB / GB if memory is None else memory
    _positive("cpus-per-node", cpus)
    _positive("host-memory", memory)
    gpu_bytes = int(gpu_memory * GB) if gpus else None
    return [Node(f"node {i + 1}", cpus, gpus, gpu_bytes, int(memory * GB), gpu) for i in range(count)]


def local_node(min_cpus: float) -> list[Node]:
    """This machine as a local Ray cluster sees it, with at least `min_cpus` logical CPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Node("this machine", max(os.cpu_count() or 1, min_cpus), memory=memory)]


MAX_AMOUNT = 10**6
"""Sanity limit for the CPUs and the GB of one node."""


def _positive(field: str, value: float) -> None:
    if not 0 < value <= MAX_AMOUNT:
        raise InputError(f"{field}: must be above 0 and at most {MAX_AMOUNT:,} (got {value:g})")


def nodes_from_launcher_file(path: str | Path, gpu_memory: float | None = None) -> list[Node]:
    """All nodes that a Ray cluster launcher file may start, including the head.

    `gpu_memory` (GB per GPU) overrides that of the instance types. Raises InputError naming the bad field.
    """
    raw = _read_launcher(local_path(str(path), "cluster"))
    kinds = raw.get("available_node_types")
    if not isinstance(kinds, dict) or not kinds:
        raise InputError(f"{path}: available_node_types: missing or empty")
    head = raw.get("head_node_type")
    if not isinstance(head, str) or head not in kinds:
        raise InputError(f"{path}: head_node_type: {head!r} is not one of {', '.join(map(str, kinds))}")
    if gpu_memory is not None:
        _positive("gpu-memory", gpu_memory)
    left = _count(raw.get("max_workers", 2), f"{path}: max_workers")
    types: list[Node] = []
    counts: list[int] = []
    for name, kind in kinds.items():
        field = f"{path}: available_node_types.{name}"
        kind = kind if isinstance(kind, dict) else {}
        counts.append(min(left, _count(kind.get("max_workers", 0 if name == head else left), f"{field}.max_workers")))
        left -= counts[-1]
        types.append(_node_of_type(kind, str(name), field, gpu_memory))
    nodes: list[Node] = []
    for node, count in zip(with_slots(types), counts, strict=True):
        nodes += [node] * (node.name == head)
        nodes += [replace(node, name=f"{node.name} {i + 1}") for i in range(count)]
    return nodes


def _read_launcher(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"cluster: file not found: {path}")
    if path.stat().st_size > 10**6:
        raise InputError(f"cluster: {path} is larger than 1 MB, too large for a cluster launcher file")
    try:
        raw = safe_yaml.load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"cluster: {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"cluster: {path} is not a mapping")
    return raw


def _node_of_type(kind: dict[str, Any], name: str, field: str, gpu_memory: float | None) -> Node:
    resources = kind.get("resources") or {}
    config = kind.get("node_config") or {}
    if not isinstance(resources, dict) or not isinstance(config, dict):
        raise InputError(f"{field}: resources and node_config must be mappings")
    instance = config.get("InstanceType")
    if "CPU" not in resources:
        if not isinstance(instance, str):
            raise InputError(f"{field}: set resources.CPU or node_config.InstanceType")
        known = node_for_instance_type(instance, name, f"{field}.node_config.InstanceType")
    else:
        known = Node(name, 0)
        if isinstance(instance, str) and (instance in INSTANCES or _WITHOUT_GPU.fullmatch(instance)):
            known = node_for_instance_type(instance, name, field)
    amounts = {key: _amount(resources[key], f"{field}.resources.{key}") for key in resources}
    gpus = int(amounts.get("GPU", known.gpus))
    memory = known.gpu_memory if gpu_memory is None else int(gpu_memory * GB)
    return Node(
        name, amounts.get("CPU", known.cpus), gpus, memory if gpus else None,
        int(amounts["memory"]) if "memory" in amounts else known.memory, known.gpu if gpus else None,
        **slots_in(amounts),
    )  # fmt: skip


def _count(value: Any, field: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_NODES:
        raise InputError(f"{field}: must be an integer from {least} to {MAX_NODES} (got {value!r})")
    return value


def _amount(value: Any, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise InputError(f"{field}: must be a non-negative number (got {value!r})")
    return float(value)
