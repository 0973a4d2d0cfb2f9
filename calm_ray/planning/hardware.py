"""The nodes that a run may have: alike ones, those of a launcher's file, or this machine."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from calm_ray.cluster.machines import DEVICES, GB, GIB, MOST_NODES, Node, slots_in, with_slots
from calm_ray.core import safe_yaml
from calm_ray.core.errors import InputError
from calm_ray.core.safety import local_path

# https://aws.amazon.com/ec2/instance-types/p4/ and /p5/: vCPUs, GPUs, GPU, host memory in GiB.
INSTANCES = {
    "p4d.24xlarge": (96, 8, "A100-40", 1152),
    "p4de.24xlarge": (96, 8, "A100-80", 1152),
    "p5.4xlarge": (16, 1, "H100", 256),
    "p5.48xlarge": (192, 8, "H100", 2048),
    "p5e.48xlarge": (192, 8, "H200", 2048),
    "p5en.48xlarge": (192, 8, "H200", 2048),
}
GIB_PER_CPU = {"c": 2, "m": 4, "r": 8}
"""Of AWS's machines without GPUs, by the first letter of their names; an `xlarge` has four vCPUs."""
_WITHOUT_GPU = re.compile(r"([cmr])\d\w*\.(?:(\d*)xlarge|large)")


def node_of_instance(instance: str, name: str, field: str) -> Node:
    """A machine of AWS by its type. Raises InputError naming `field` for one that is not known here."""
    if instance in INSTANCES:
        cpus, gpus, gpu, memory = INSTANCES[instance]
        return Node(name, cpus, gpus, DEVICES[gpu].memory, memory * GIB, gpu)
    if found := _WITHOUT_GPU.fullmatch(instance):
        cpus = 2 if found[2] is None else 4 * int(found[2] or 1)
        return Node(name, cpus, memory=cpus * GIB_PER_CPU[found[1]] * GIB)
    raise InputError(
        f"{field}: {instance!r} is not known here (known are {', '.join(INSTANCES)}, and types c, m and r without "
        "GPUs); write its CPU, GPU and memory into `resources`, or describe the nodes: --nodes, --gpus-per-node, ..."
    )


def nodes_alike(
    count: int,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    cpus: float | None = None,
    memory: float | None = None,
    gpu: str | None = None,
) -> list[Node]:
    """Nodes that are all the same, memory in GB; what is not given is as in a p4de.24xlarge: eight GPUs of 80 GB.

    A `gpu` brings its own memory. With other numbers of GPUs, CPUs and host memory are in proportion. Raises InputError
    naming what is no number of a machine.
    """
    if gpu is not None and gpu not in DEVICES:
        raise InputError(f"gpu: {gpu!r} is not known; known are {', '.join(DEVICES)}")
    gpus = 8 if gpus is None else gpus
    if gpu_memory is None:
        gpu_memory = 80 if gpu is None else DEVICES[gpu].memory / GB
    _count(count, "nodes", least=1)
    _count(gpus, "gpus-per-node")
    _positive("gpu-memory", gpu_memory)
    of_cpus, of_gpus, _, of_memory = INSTANCES["p4de.24xlarge"]
    cpus = of_cpus * max(gpus, 1) / of_gpus if cpus is None else cpus
    memory = of_memory * max(gpus, 1) / of_gpus * GIB / GB if memory is None else memory
    _positive("cpus-per-node", cpus)
    _positive("host-memory", memory)
    each = int(gpu_memory * GB) if gpus else None
    return [Node(f"node {i + 1}", cpus, gpus, each, int(memory * GB), gpu) for i in range(count)]


def this_machine(least_cpus: float) -> list[Node]:
    """What a local Ray would be: this machine, with as many logical CPUs as the run asks for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Node("this machine", max(os.cpu_count() or 1, least_cpus), memory=memory)]


MOST_OF_A_NODE = 10**6
"""The same of one machine's GB, and of its CPUs."""


def _positive(field: str, value: float) -> None:
    if not 0 < value <= MOST_OF_A_NODE:
        raise InputError(f"{field}: must be above 0, and {MOST_OF_A_NODE:,} at most (it is {value:g})")


def nodes_of_launcher(path: str | Path, gpu_memory: float | None = None) -> list[Node]:
    """The most machines that a file of Ray's cluster launcher may start, its head among them.

    `gpu_memory` (GB) is that of GPUs whose machine's type is not known here. Raises InputError naming the field.
    """
    raw = _read_launcher(local_path(str(path), "cluster"))
    kinds = raw.get("available_node_types")
    if not isinstance(kinds, dict) or not kinds:
        raise InputError(f"{path}: available_node_types: is missing; name the machines that may be started")
    head = raw.get("head_node_type")
    if not isinstance(head, str) or head not in kinds:
        raise InputError(f"{path}: head_node_type: {head!r} is none of {', '.join(map(str, kinds))}")
    if gpu_memory is not None:
        _positive("gpu-memory", gpu_memory)
    left = _count(raw.get("max_workers", 2), f"{path}: max_workers")
    ones: list[Node] = []
    counts: list[int] = []
    for name, kind in kinds.items():
        field = f"{path}: available_node_types.{name}"
        kind = kind if isinstance(kind, dict) else {}
        counts.append(min(left, _count(kind.get("max_workers", 0 if name == head else left), f"{field}.max_workers")))
        left -= counts[-1]
        ones.append(_node_of_kind(kind, str(name), field, gpu_memory))
    nodes: list[Node] = []
    for one, count in zip(with_slots(ones), counts, strict=True):
        nodes += [one] * (one.name == head)
        nodes += [replace(one, name=f"{one.name} {i + 1}") for i in range(count)]
    return nodes


def _read_launcher(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"cluster: there is no file {path}")
    if path.stat().st_size > 10**6:
        raise InputError(f"cluster: {path} is larger than 1 MB; that is no file of Ray's cluster launcher")
    try:
        raw = safe_yaml.load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"cluster: {path} is not readable as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"cluster: {path} is no mapping of keys to values")
    return raw


def _node_of_kind(kind: dict[str, Any], name: str, field: str, gpu_memory: float | None) -> Node:
    resources = kind.get("resources") or {}
    config = kind.get("node_config") or {}
    if not isinstance(resources, dict) or not isinstance(config, dict):
        raise InputError(f"{field}: resources and node_config must be mappings")
    instance = config.get("InstanceType")
    if "CPU" not in resources:
        if not isinstance(instance, str):
            raise InputError(f"{field}: names neither resources.CPU nor node_config.InstanceType")
        known = node_of_instance(instance, name, f"{field}.node_config.InstanceType")
    else:
        known = Node(name, 0)
        if isinstance(instance, str) and (instance in INSTANCES or _WITHOUT_GPU.fullmatch(instance)):
            known = node_of_instance(instance, name, field)
    amounts = {key: _amount(resources[key], f"{field}.resources.{key}") for key in resources}
    gpus = int(amounts.get("GPU", known.gpus))
    memory = known.gpu_memory if gpu_memory is None else int(gpu_memory * GB)
    return Node(
        name, amounts.get("CPU", known.cpus), gpus, memory if gpus else None,
        int(amounts["memory"]) if "memory" in amounts else known.memory, known.gpu if gpus else None,
        **slots_in(amounts),
    )  # fmt: skip


def _count(value: Any, field: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_NODES:
        raise InputError(f"{field}: must be a whole number from {least} to {MOST_NODES} (it is {value!r})")
    return value


def _amount(value: Any, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise InputError(f"{field}: must be a number, 0 or more (it is {value!r})")
    return float(value)
