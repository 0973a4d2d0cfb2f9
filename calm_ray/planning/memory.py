"""What engines and training workers hold in memory: of each GPU (on CPUs, of the host), and of the host beside it.

Everything is counted for models shaped like Llama, in bytes. What cannot be counted is an allowance with a name.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from calm_ray.cluster.machines import GB, GIB, Device
from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.sections import Train
from calm_ray.planning.model_shape import Shape

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FLOAT32 = 4
CUDA_ALLOWANCE = 2 * GB
"""Allowance on each GPU for CUDA's context and kernels, NCCL's buffers, vLLM's CUDA graphs, gaps in the allocator."""
ENGINE_PROCESS = int(1.8 * GB)
"""Host memory of an engine's process on CPUs with a small model and 1 GiB of cache: 1.74 GB were measured."""
WORKER_PROCESS = int(0.6 * GB)
"""Host memory of a training worker's process on CPUs: 0.57 GB were measured after its imports."""
GPU_PROCESS = 4 * GB
"""Allowance of host memory for a process that drives a GPU: CUDA's libraries and pinned buffers."""
SAVED_FILE = 4 << 30
"""What the saving worker holds of full weights at a time (`calm_ray.training.model.SHARD_BYTES`)."""

# vLLM 0.32: CacheConfig.gpu_memory_utilization, EngineArgs.get_batch_defaults for LLM on GPUs, and on CPUs.
UTILIZATION = 0.92
ROW_SORTED = 4 + 4 + 4 + 8
"""Bytes of a logit while tokens are drawn: logits, probabilities, and both values and places of the sort for top-p."""

# TRL 1.16: chunked_logprob.TOKEN_CHUNK_SIZE and utils._CHUNKED_LOGPROB_CHUNK_SIZE.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of an engine, or the whole engine on CPUs; bytes."""

    weights: int
    activations: int
    """Of the largest batch, with what drawing tokens takes."""
    allowance: int
    kv_cache: int
    """What is left for it; negative where the rest is too large."""
    limit: int | None
    """What vLLM lets itself have; None where the GPU's memory is not known."""
    kv_per_token: int
    """In the whole engine, over all its GPUs."""
    cached_tokens: int
    context: int
    """Tokens of one sequence at most (max_model_len)."""
    most_sequences: int
    """At a time (max_num_seqs)."""

    @property
    def fixed(self) -> int:
        return self.weights + self.activations + self.allowance

    @property
    def full_sequences(self) -> float:
        """Sequences of full length that the cache holds at a time."""
        return self.cached_tokens / self.context

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "full_sequences": round(self.full_sequences, 2)}


def context_of(config: Config, shape: Shape) -> int:
    """Tokens of a prompt and its answer that the engines take together."""
    if fits_context(config):
        return shape.context
    return _count(config, "max_model_len", shape.context)


def fits_context(config: Config) -> bool:
    """Whether vLLM chooses the context itself, as long as its cache allows."""
    return config.engines.args.get("max_model_len") in (-1, "auto")


def _count(config: Config, name: str, default: int) -> int:
    """A count among the arguments of vLLM. Raises InputError where it is no whole number above 0."""
    value = config.engines.args.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**18:
        raise InputError(f"engines.args.{name}: must be a whole number above 0 (it is {value!r})")
    return value


def utilization(config: Config) -> float:
    """The share of a GPU's memory that an engine takes. Raises InputError unless it is above 0, and 1 at most."""
    share = config.engines.args.get("gpu_memory_utilization")
    if share is None:
        return UTILIZATION
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise InputError(f"engines.args.gpu_memory_utilization: must be above 0, and 1 at most (it is {share!r})")
    return share


def _cpu_cache() -> int:
    """The KV cache of an engine on CPUs, 1 GiB unless the environment says otherwise (see `calm_ray.engines.vllm`)."""
    said = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    return max(1, int(said) if said.isdecimal() else 1) * GIB


def batch_limits(config: Config, context: int, device: Device) -> tuple[int, int]:
    """(sequences, tokens) of one step of vLLM at most, by its defaults for the device unless the recipe says them."""
    sequences, tokens = 256, 4096 if config.device == "cpu" else 8192
    if config.device == "gpu" and device.memory >= 70 * GIB and not device.name.startswith("A100"):
        sequences, tokens = 1024, 16384
    sequences = _count(config, "max_num_seqs", sequences)
    return sequences, _count(config, "max_num_batched_tokens", min(tokens, sequences * context))


def engine_memory(config: Config, shape: Shape, memory: int | None, device: Device) -> EngineMemory:
    """What an engine holds of each of its GPUs, which have `memory` bytes; on CPUs, of the host."""
    engines, args = config.engines, config.engines.args
    size, width = engines.tensor_parallel_size, BYTES[engines.dtype]
    context = context_of(config, shape)
    sequences, tokens = batch_limits(config, context, device)
    weights = width * shape.parameters // size
    # The residual stream and its norm whole, and a layer's widest part: gate, up and their product.
    hidden = tokens * width * (2 * shape.hidden + 3 * shape.intermediate // size)
    activations = hidden + sequences * shape.vocabulary * ROW_SORTED
    allowance = CUDA_ALLOWANCE if config.device == "gpu" else 0
    kv_width = 1 if str(args.get("kv_cache_dtype", "auto")).startswith("fp8") else width
    per_token = kv_width * shape.kv_values
    # With more GPUs than key heads, GPUs hold the same heads.
    per_gpu = per_token * max(1, shape.kv_heads // size) // shape.kv_heads
    limit = None if memory is None else int(utilization(config) * memory)
    if config.device == "cpu":
        limit, cache = None, _cpu_cache()
    elif given := _count(config, "kv_cache_memory_bytes", 0):
        limit, cache = memory, given
    else:
        cache = 0 if limit is None else limit - weights - activations - allowance
    cached = max(0, cache) // max(1, per_gpu)
    return EngineMemory(weights, activations, allowance, cache, limit, per_token, cached, context, sequences)


@dataclass(frozen=True)
class WorkerMemory:
    """A training worker, on its GPU or, on CPUs, in the host; bytes."""

    weights: int
    """Its share of the model."""
    optimiser: int
    """Its share of gradients and Adam's two moments of what is trained; with LoRA, of the adapter itself, too."""
    gathered: int
    """Whole while they compute: embeddings and head, and two layers, the one at work and the next."""
    activations: int
    logps: int
    """The head's logits in tiles, and the gradients that they leave."""
    step: int
    """What the optimiser's step takes, when all of the three above are gone."""
    allowance: int
    tokens: int
    """Of the largest forward pass."""

    @property
    def total(self) -> int:
        """At the worst moment."""
        computing = self.gathered + self.activations + self.logps
        return self.weights + self.optimiser + max(computing, self.step) + self.allowance

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def pack_tokens(config: Config, shape: Shape) -> int:
    """Tokens of a worker's largest forward pass: a pack, or one pair that is larger. Both sides of a pair count.

    No sequence is longer than `train.max_pair_tokens` or than what engines take, which wrote it.
    """
    train = config.train
    pair = config.objective.sides * min(train.max_pair_tokens, context_of(config, shape))
    if train.engine == "trl":
        pairs = train.trl.get("per_device_train_batch_size", max(1, train.batch_pairs // train.most_workers))
        return int(pairs) * pair
    return max(train.pack_tokens, pair)


def worker_memory(config: Config, shape: Shape, workers: int) -> WorkerMemory:
    """What each of so many training workers holds. The model is shared by all of them, or by `train.shards`."""
    train = config.train
    shards = train.shards or workers
    width, tokens = BYTES[train.dtype], pack_tokens(config, shape)
    whole = shape.root_parameters + 2 * shape.layer_parameters
    gathered = width * whole
    logps = tokens * shape.hidden * (width + FLOAT32)  # the scored states, and their gradient
    logps += min(tokens, TILE_TOKENS) * min(shape.vocabulary, TILE_VOCABULARY) * width
    if train.lora is None:
        weights = FLOAT32 * shape.parameters // shards
        trained = shape.parameters
        optimiser = 3 * FLOAT32 * trained // shards
        # Gradients as they are computed, and in float32 as they are summed over the workers; the head's own sum.
        gathered += (width + FLOAT32) * whole
        logps += FLOAT32 * shape.vocabulary * shape.hidden
    else:
        weights = width * shape.parameters // shards
        trained = shape.lora_parameters(train.lora)
        optimiser = 4 * FLOAT32 * trained // shards
    return WorkerMemory(
        weights, optimiser, gathered, _activations(train, shape, tokens), logps,
        step=FLOAT32 * trained // shards,  # one more copy, while the second moments' roots are taken
        allowance=CUDA_ALLOWANCE if config.device == "gpu" else 0, tokens=tokens,
    )  # fmt: skip


def _activations(train: Train, shape: Shape, tokens: int) -> int:
    """What a forward pass keeps for the backward pass, after Korthikanti et al. 2022 (section 4), without dropout.

    With checkpointing a layer keeps its input alone, and one layer at a time is computed again (section 5). The
    gradients that flow back through one layer take about as much as what that layer kept.
    """
    width = BYTES[train.dtype]
    layer = tokens * kept_per_token(train, shape)
    if train.attention == "eager":  # scores in float32 and in the model's own type
        layer += shape.heads * tokens**2 * (FLOAT32 + width)
    if train.activation_checkpointing:
        return shape.layers * tokens * shape.hidden * width + 2 * layer
    return shape.layers * layer + layer


def kept_per_token(train: Train, shape: Shape) -> int:
    """Bytes that a layer without checkpointing keeps of each token, attention's scores aside."""
    width, widths = BYTES[train.dtype], shape.widths()
    queries, keys = widths["q_proj"][1], widths["k_proj"][1]
    norms = 2 * FLOAT32 * (shape.hidden + 1)  # transformers' norms compute in float32
    attention = width * 2 * (queries + keys) + FLOAT32 * shape.heads  # query, output, key, value; sums of the scores
    kept = norms + attention + width * 3 * shape.intermediate  # gate, its activation, up
    if train.lora is None:
        # The weights' gradients need each map's input, and each norm's value before its weight.
        return kept + width * (4 * shape.hidden + queries + shape.intermediate)
    targets = set(train.lora.targets) & widths.keys()
    inputs = {name: widths[name][0] for name in targets}
    if width == FLOAT32:  # else PEFT makes a copy in float32 for each adapter
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        inputs = {shared.get(name, name): size for name, size in inputs.items()}
    return kept + FLOAT32 * (sum(inputs.values()) + train.lora.r * len(targets))


@dataclass(frozen=True)
class HostMemory:
    """Of the machine, bytes."""

    engine: int
    worker: int
    node: int
    """Once on a node that has engines: merging an adapter into the weights."""


def host_memory(config: Config, shape: Shape, engine: EngineMemory, worker: WorkerMemory) -> HostMemory:
    """What processes hold of the host, beside what Ray's object store and the system take."""
    engines, size = config.engines, config.engines.tensor_parallel_size
    merging = engines.refresh == "merged" and config.train.lora is not None
    node = BYTES[engines.dtype] * shape.parameters if merging else 0
    if config.device == "cpu":
        return HostMemory(ENGINE_PROCESS + engine.weights, WORKER_PROCESS + worker.total, node)
    asleep = size * engine.weights if config.placement == "colocate" else 0  # where engines sleep, their weights wait
    saving = 0 if config.train.lora is not None else min(SAVED_FILE, BYTES["bfloat16"] * shape.parameters)
    return HostMemory(size * GPU_PROCESS + asleep, GPU_PROCESS + saving, node)
