"""How long the steps of a round may take on GPUs: estimates, from what a GPU can do and the share of it that is had.

Decoding is bound by memory: every step reads the weights once, and the cache of every sequence in it. Reading prompts
and training are bound by arithmetic: 2 FLOPs for a parameter and a token forward, 4 backward (Kaplan et al. 2020,
section 2.1), of which frozen weights need no gradients of their own (2), and checkpointing goes forward once more (2).
"""

from __future__ import annotations

from calm_ray.cluster.machines import Device
from calm_ray.config import Config
from calm_ray.planning.layout import Layout
from calm_ray.planning.memory import BYTES
from calm_ray.planning.model_shape import Shape
from calm_ray.planning.work import RoundWork

FLOPS_SHARE = 0.2
"""Of the peak FLOP/s: prime-rl's benchmarks give 21 to 23 % for LoRA on FSDP2 (Qwen3 4B, H100)."""
BANDWIDTH_SHARE = 0.5
"""Of the memory's bandwidth while decoding: an assumption."""


def decode_rate(config: Config, shape: Shape, layout: Layout, device: Device, work: RoundWork, rows: int) -> float:
    """Tokens/s that one engine writes with as many sequences at a time as its cache holds and vLLM takes.

    `rows` are the sequences of all engines together, which may be fewer.
    """
    engine, size = layout.engine, config.engines.tensor_parallel_size
    length = work.sizes.prompt + work.sizes.reply / 2  # halfway through
    sequences = min(engine.most_sequences, engine.cached_tokens / length)
    if work.is_counted:
        sequences = min(sequences, rows / layout.needs.count("engine"))
    sequences = max(1.0, sequences)
    read = BYTES[config.engines.dtype] * shape.parameters + sequences * length * engine.kv_per_token
    by_memory = read / (size * device.bandwidth * BANDWIDTH_SHARE)
    by_compute = 2 * shape.parameters * sequences / (size * device.flops * FLOPS_SHARE)
    return sequences / max(by_memory, by_compute)


def read_rate(config: Config, shape: Shape, device: Device) -> float:
    """Tokens/s of prompts that one engine reads."""
    return config.engines.tensor_parallel_size * device.flops * FLOPS_SHARE / (2 * shape.parameters)


def train_flops(config: Config) -> int:
    """FLOPs for each parameter and token of a training step."""
    return (4 if config.train.lora is not None else 6) + 2 * config.train.activation_checkpointing


REFERENCE = "reference"
"""The forward pass of the reference over what is trained on, before training."""


def seconds_of(config: Config, shape: Shape, layout: Layout, device: Device, work: RoundWork) -> dict[str, float]:
    """Seconds of each step of one round; without those that engines take to start, and of votes, which are short."""
    engines = layout.needs.count("engine")
    # A step has no more work than pairs; without rounds there are no workers, and no pairs either.
    workers = max(1, min(layout.needs.count("worker"), config.train.batch_pairs))
    reading = engines * read_rate(config, shape, device)
    training = workers * device.flops * FLOPS_SHARE / shape.parameters
    seconds: dict[str, float] = {}
    for name, step in work.steps.items():
        if step.reference:
            seconds[REFERENCE] = 2 * step.reference / training
        writing = engines * decode_rate(config, shape, layout, device, work, step.rows) if step.written else 1.0
        trained = train_flops(config) * config.train.epochs * step.trained / training
        seconds[name] = step.read / reading + step.written / writing + trained
    return {name: value for name, value in seconds.items() if value}
