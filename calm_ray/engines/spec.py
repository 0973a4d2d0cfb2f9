"""Configuration and resources of an engine actor."""

from __future__ import annotations

from dataclasses import dataclass

from calm_ray.core.sections import Engines, Lora
from calm_ray.run.policies import RunModel

ENGINE_GPU_FRACTION = 0.6


SIZES = frozenset((
    "block_size", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len",
    "max_num_batched_tokens", "max_num_seqs",
))  # fmt: skip
"""Arguments of vLLM that do not change what a model computes."""


@dataclass(frozen=True)
class EngineSpec:
    """Everything an engine actor needs to start."""

    model: RunModel
    engines: Engines
    lora: Lora | None
    device: str
    seed: int
    is_colocated: bool = False
    """Shares its GPUs with training workers and sleeps while they work."""

    @property
    def may_score_with_torch(self) -> bool:
        """Whether the engine's arguments leave the model as it is in its files."""
        return self.device == "cpu" and self.engines.args.keys() <= SIZES

    @property
    def uses_adapters(self) -> bool:
        return self.engines.uses_adapters(self.lora, self.device)

    @property
    def gpu_fraction(self) -> float:
        """Fraction of each GPU to reserve in Ray: more than half, so that no two engines share one."""
        return ENGINE_GPU_FRACTION if self.is_colocated else 1.0

    @property
    def needs(self) -> dict[str, float]:
        """Resources of one engine, all on one node."""
        size = self.engines.tensor_parallel_size
        if self.device == "cpu":
            return {"CPU": self.engines.cpus}
        return {"CPU": self.engines.cpus if size == 1 else float(size), "GPU": size * self.gpu_fraction}
