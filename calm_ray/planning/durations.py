"""Estimates how long each step of a round takes on GPUs, from their peak rates and the fractions achieved in practice.

Decoding is memory-bound: every step reads the weights once, and the KV cache of every sequence in the batch. Prefill
and training are compute-bound: 2 FLOPs per parameter and token forward, 4 backward (Kaplan et al. 2020, section 2.1).
Frozen weights need no weight gradients (2 less); activation checkpointing repeats the forward pass (2 more).
"""

from __future__ import annotations

from calm_ray.cluster.machines import Device
from calm_ray.config import Config
from calm_ray.planning.layout import Layout
from calm_ray.planning.memory import BYTES
from calm_ray.planning.model_shape import Shape
from calm_ray.planning.work import RoundWork

FLOPS_FRACTION = 0.2
"""Fraction of peak FLOP/s achieved: prime-rl's benchmarks give 21 to 23% for LoRA on FSDP2 (Qwen3 4B, H100)."""
BANDWIDTH_FRACTION = 0.5
"""Fraction of memory bandwidth achieved while decoding (an assumption)."""


def decode_rate(config: Config, shape: Shape, layout: Layout, device: Device, work: RoundWork, rows: int) -> float:
    """Tokens/s that one engine generates with as many concurrent sequences as its KV cache and vLLM allow.

    `rows`, the total over all engines, caps the batch size if the questions could be counted.
    """
    engine, size = layout.engine, config.engines.tensor_parallel_size
    length = work.sizes.prompt + work.sizes.reply / 2  # average over the generation
    sequences = min(engine.max_sequences, engine.cached_tokens / length)
    if work.is_counted:
        sequences = min(sequences, rows / layout.needs.count("engine"))
    sequences = max(1.0, sequences)
    bytes_per_step = BYTES[config.engines.dtype] * shape.parameters + sequences * length * engine.kv_per_token
    by_memory = bytes_per_step / (size * device.bandwidth * BANDWIDTH_FRACTION)
    by_compute = 2 * shape.parameters * sequences / (size * device.flops * FLOPS_FRACTION)
    return sequences / max(by_memory, by_compute)


def read_rate(config: Config, shape: Shape, device: Device) -> float:
    """Prompt tokens/s that one engine prefills."""
    return config.engines.tensor_parallel_size * device.flops * FLOPS_FRACTION / (2 * shape.parameters)


def train_flops(config: Config) -> int:
    """FLOPs per parameter and token of a training step."""
    return (4 if config.train.lora is not None else 6) + 2 * config.train.activation_checkpointing


REFERENCE = "reference"
"""Name of the step that scores the training data with the reference before training."""


def seconds_of(config: Config, shape: Shape, layout: Layout, device: Device, work: RoundWork) -> dict[str, float]:
    """Seconds per step of one round, without engine start-up and votes, which are short."""
    engines = layout.needs.count("engine")
    # A batch keeps at most `batch_pairs` workers busy. Without rounds there are no workers.
    workers = max(1, min(layout.needs.count("worker"), config.train.batch_pairs))
    prefill = engines * read_rate(config, shape, device)
    training = workers * device.flops * FLOPS_FRACTION / shape.parameters
    seconds: dict[str, float] = {}
    for name, step in work.steps.items():
        if step.reference:
            seconds[REFERENCE] = 2 * step.reference / training
        decode = engines * decode_rate(config, shape, layout, device, work, step.rows) if step.written else 1.0
        trained = train_flops(config) * config.train.epochs * step.trained / training
        seconds[name] = step.read / prefill + step.written / decode + trained
    return {name: value for name, value in seconds.items() if value}
