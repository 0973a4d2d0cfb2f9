"""Specification of a run's engines."""

from __future__ import annotations

from calm_ray.config import Config
from calm_ray.engines.spec import EngineSpec
from calm_ray.run.policies import RunModel


def engine_spec(config: Config, model: RunModel) -> EngineSpec:
    is_colocated = config.placement == "colocate" and config.device == "gpu"
    return EngineSpec(model, config.engines, config.train.lora, config.device, config.seed, is_colocated)
