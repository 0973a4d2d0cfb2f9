"""Starts engines in Ray actors; an engine with several GPUs gets a placement group."""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from calm_ray.cluster.connection import max_resources
from calm_ray.cluster.resources import ENGINE_SLOT
from calm_ray.engines.actor import Engine
from calm_ray.engines.replica import EngineHandle
from calm_ray.engines.spec import EngineSpec


class Placement:
    def __init__(self, spec: EngineSpec, heartbeats_name: str) -> None:
        self._spec, self._heartbeats_name = spec, heartbeats_name
        self._groups: dict[int, PlacementGroup] = {}
        self._slot = {ENGINE_SLOT: 1.0} if ENGINE_SLOT in max_resources() else {}

    def start(self, number: int) -> EngineHandle:
        """Starts an actor for this engine. Ray restarts it whenever it dies, on another node if necessary."""
        spec = self._spec
        options: dict[str, Any] = {"max_restarts": -1}
        if spec.device == "cpu" or spec.engines.tensor_parallel_size == 1:
            options |= {"num_cpus": spec.needs["CPU"], "num_gpus": spec.needs.get("GPU", 0), "resources": self._slot}
        else:
            options |= {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": self._in_group(number)}
        return EngineHandle(Engine.options(**options).remote(spec, number, self._heartbeats_name))

    def _in_group(self, number: int) -> PlacementGroupSchedulingStrategy:
        """One bundle per GPU, all on one node; vLLM starts its workers inside this group."""
        if number not in self._groups:
            bundle = {"GPU": self._spec.gpu_fraction, "CPU": 1.0}
            bundles = [bundle | self._slot, *[bundle] * (self._spec.engines.tensor_parallel_size - 1)]
            self._groups[number] = placement_group(bundles, strategy="STRICT_PACK", name=f"engine-{number}")
        return PlacementGroupSchedulingStrategy(self._groups[number], 0, placement_group_capture_child_tasks=True)

    def close(self) -> None:
        """Removes the placement groups."""
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups = {}
