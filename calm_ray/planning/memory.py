"""Estimates the memory of engines and training workers: per GPU (on CPUs, in the host), and host memory.

Computed in bytes for models shaped like Llama. Whatever cannot be computed is a named allowance.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from calm_ray.cluster.machines import GB, GIB, Device
from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.sections import Train
from calm_ray.methods.work import CHOICES
from calm_ray.planning.model_shape import Shape

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FLOAT32 = 4
CUDA_ALLOWANCE = 2 * GB
"""Allowance per GPU for the CUDA context and kernels, NCCL buffers, vLLM's CUDA graphs and fragmentation."""
ENGINE_PROCESS = int(1.8 * GB)
"""Host memory of a CPU engine process with a small model and 1 GiB of KV cache (measured: 1.74 GB)."""
WORKER_PROCESS = int(0.6 * GB)
"""Host memory of a CPU training worker process (measured after its imports: 0.57 GB)."""
GPU_PROCESS = 4 * GB
"""Host memory allowance for a process with a GPU: CUDA libraries and pinned buffers."""
SAVED_FILE = 4 << 30
"""Bytes of full weights that the saving worker buffers (`calm_ray.training.model.SHARD_BYTES`)."""

# vLLM 0.32: CacheConfig.gpu_memory_utilization, EngineArgs.get_batch_defaults for LLM on GPUs, and on CPUs.
UTILIZATION = 0.92
SAMPLER_BYTES = 4 + 4 + 4 + 8
"""Per logit while sampling: the logit, its probability, and the sorted value and index for top-p."""

# TRL 1.16: chunked_logprob.TOKEN_CHUNK_SIZE and utils._CHUNKED_LOGPROB_CHUNK_SIZE.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768


@dataclass(frozen=True)
class EngineMemory:
    """Memory of one GPU of an engine, or of a whole CPU engine; bytes."""

    weights: int
    activations: int
    """Of the largest batch, including the sampler."""
    allowance: int
    kv_cache: int
    """The remainder; negative if the rest exceeds the limit."""
    limit: int | None
    """What vLLM may allocate; None if the GPU memory is unknown."""
    kv_per_token: int
    """Summed over all GPUs of the engine."""
    cached_tokens: int
    context: int
    """Maximum tokens per sequence (max_model_len)."""
    max_sequences: int
    """Maximum concurrent sequences (max_num_seqs)."""

    @property
    def fixed(self) -> int:
        return self.weights + self.activations + self.allowance

    @property
    def full_sequences(self) -> float:
        """How many full-length sequences fit in the KV cache."""
        return self.cached_tokens / self.context

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "full_sequences": round(self.full_sequences, 2)}


def context_of(config: Config, shape: Shape) -> int:
    """Maximum tokens of a prompt plus its completion."""
    if fits_context(config):
        return shape.context
    return _count(config, "max_model_len", shape.context)


def fits_context(config: Config) -> bool:
    """Whether vLLM shortens the context to fit its KV cache."""
    return config.engines.args.get("max_model_len") in (-1, "auto")


def _count(config: Config, name: str, default: int) -> int:
    """An integer vLLM argument. Raises InputError unless it is positive."""
    value = config.engines.args.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**18:
        raise InputError(f"engines.args.{name}: must be a positive integer (got {value!r})")
    return value


def utilization(config: Config) -> float:
    """Fraction of GPU memory that an engine may use. Raises InputError unless it is above 0 and at most 1."""
    fraction = config.engines.args.get("gpu_memory_utilization")
    if fraction is None:
        return UTILIZATION
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise InputError(f"engines.args.gpu_memory_utilization: must be above 0 and at most 1 (got {fraction!r})")
    return fraction


def _cpu_cache() -> int:
    """KV cache bytes of a CPU engine: VLLM_CPU_KVCACHE_SPACE in GiB, 1 by default (see `calm_ray.engines.vllm`)."""
    gib = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    return max(1, int(gib) if gib.isdecimal() else 1) * GIB


def batch_limits(config: Config, context: int, device: Device) -> tuple[int, int]:
    """Maximum (sequences, tokens) of one vLLM step: from the recipe, else vLLM's defaults for the device."""
    sequences, tokens = 256, 4096 if config.device == "cpu" else 8192
    if config.device == "gpu" and device.memory >= 70 * GIB and not device.name.startswith("A100"):
        sequences, tokens = 1024, 16384
    sequences = _count(config, "max_num_seqs", sequences)
    return sequences, _count(config, "max_num_batched_tokens", min(tokens, sequences * context))


def engine_memory(config: Config, shape: Shape, memory: int | None, device: Device) -> EngineMemory:
    """Memory of an engine on each of its GPUs of `memory` bytes; on CPUs, in the host."""
    engines, args = config.engines, config.engines.args
    size, width = engines.tensor_parallel_size, BYTES[engines.dtype]
    context = context_of(config, shape)
    sequences, tokens = batch_limits(config, context, device)
    weights = width * shape.parameters // size
    # Unsharded residual stream and norm, plus the widest part of a layer: gate, up and their product.
    hidden = tokens * width * (2 * shape.hidden + 3 * shape.intermediate // size)
    activations = hidden + sequences * shape.vocabulary * SAMPLER_BYTES
    allowance = CUDA_ALLOWANCE if config.device == "gpu" else 0
    kv_width = 1 if str(args.get("kv_cache_dtype", "auto")).startswith("fp8") else width
    per_token = kv_width * shape.kv_values
    # With more GPUs than key/value heads, vLLM replicates heads.
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
    """Memory of a training worker on its GPU, or on CPUs in the host; bytes."""

    weights: int
    """Its shard of the model."""
    optimizer: int
    """Its shard of the gradients and Adam's two moments; with LoRA, of the adapter, too."""
    gathered: int
    """Unsharded parameters: embeddings, head, the current layer and the prefetched next one."""
    activations: int
    logps: int
    """Tiles of logits, and the gradients they leave."""
    step: int
    """Temporary memory of the optimizer step, when the three above are freed."""
    allowance: int
    tokens: int
    """In the largest forward pass."""

    @property
    def total(self) -> int:
        """Peak memory."""
        computing = self.gathered + self.activations + self.logps
        return self.weights + self.optimizer + max(computing, self.step) + self.allowance

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def pack_tokens(config: Config, shape: Shape) -> int:
    """Tokens of a worker's largest forward pass: a full pack, or a single larger pair, counting both sides.

    `train.max_pair_tokens` and the engines' context limit each sequence.
    """
    train = config.train
    pair = (config.objective.sides or CHOICES) * min(train.max_pair_tokens, context_of(config, shape))
    if train.engine == "trl":
        pairs = train.trl.get("per_device_train_batch_size", max(1, train.batch_pairs // train.max_workers))
        return int(pairs) * pair
    return max(train.pack_tokens, pair)


def worker_memory(config: Config, shape: Shape, workers: int) -> WorkerMemory:
    """Memory of each of `workers` training workers. The model is sharded over all of them, or over `train.shards`."""
    train = config.train
    shards = train.shards or workers
    width, tokens = BYTES[train.dtype], pack_tokens(config, shape)
    whole = shape.root_parameters + 2 * shape.layer_parameters
    gathered = width * whole
    logps = tokens * shape.hidden * (width + FLOAT32)  # scored hidden states and their gradients
    logps += min(tokens, TILE_TOKENS) * min(shape.vocabulary, TILE_VOCABULARY) * width
    if train.lora is None:
        weights = FLOAT32 * shape.parameters // shards
        trained = shape.parameters
        optimizer = 3 * FLOAT32 * trained // shards
        # Gradients as computed and, in float32, as reduced over the workers; plus the sum for the head.
        gathered += (width + FLOAT32) * whole
        logps += FLOAT32 * shape.vocabulary * shape.hidden
    else:
        weights = width * shape.parameters // shards
        trained = shape.lora_parameters(train.lora)
        optimizer = 4 * FLOAT32 * trained // shards
    return WorkerMemory(
        weights, optimizer, gathered, _activations(train, shape, tokens), logps,
        step=FLOAT32 * trained // shards,  # one temporary copy, for the square root of the second moments
        allowance=CUDA_ALLOWANCE if config.device == "gpu" else 0, tokens=tokens,
    )  # fmt: skip


def _activations(train: Train, shape: Shape, tokens: int) -> int:
    """Activations kept for the backward pass, after Korthikanti et al. 2022 (section 4), without dropout.

    With checkpointing, a layer keeps only its input and is recomputed in the backward pass, one layer at a time
    (section 5). Gradients within a layer take about as much memory as its activations.
    """
    width = BYTES[train.dtype]
    layer = tokens * kept_per_token(train, shape)
    if train.attention == "eager":  # scores in float32 and in the model's dtype
        layer += shape.heads * tokens**2 * (FLOAT32 + width)
    if train.activation_checkpointing:
        return shape.layers * tokens * shape.hidden * width + 2 * layer
    return shape.layers * layer + layer


def kept_per_token(train: Train, shape: Shape) -> int:
    """Bytes per token that a layer keeps without checkpointing, excluding attention scores."""
    width, widths = BYTES[train.dtype], shape.widths()
    queries, keys = widths["q_proj"][1], widths["k_proj"][1]
    norms = 2 * FLOAT32 * (shape.hidden + 1)  # transformers computes norms in float32
    attention = width * 2 * (queries + keys) + FLOAT32 * shape.heads  # query, output, key, value; log-sum-exp
    kept = norms + attention + width * 3 * shape.intermediate  # gate, its activation, up
    if train.lora is None:
        # Weight gradients need the input of each linear layer, and each norm before scaling.
        return kept + width * (4 * shape.hidden + queries + shape.intermediate)
    targets = set(train.lora.targets) & widths.keys()
    inputs = {name: widths[name][0] for name in targets}
    if width == FLOAT32:  # otherwise PEFT makes a float32 copy per adapter
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        inputs = {shared.get(name, name): size for name, size in inputs.items()}
    return kept + FLOAT32 * (sum(inputs.values()) + train.lora.r * len(targets))


@dataclass(frozen=True)
class HostMemory:
    """Host memory, bytes."""

    engine: int
    worker: int
    node: int
    """Once per node with engines: merging an adapter into the weights."""


def host_memory(config: Config, shape: Shape, engine: EngineMemory, worker: WorkerMemory) -> HostMemory:
    """Host memory of the processes, excluding Ray's object store and the system."""
    engines, size = config.engines, config.engines.tensor_parallel_size
    merges = engines.merges_adapters(config.train.lora, config.device)
    node = BYTES[engines.dtype] * shape.parameters if merges else 0
    if config.device == "cpu":
        # Candidates of several tokens are scored by a second copy of the model.
        copies = 1 if config.candidates is None or config.candidates.form == "letters" else 2
        return HostMemory(ENGINE_PROCESS + copies * engine.weights, WORKER_PROCESS + worker.total, node)
    asleep = size * engine.weights if config.placement == "colocate" else 0  # sleeping engines offload weights
    saving = 0 if config.train.lora is not None else min(SAVED_FILE, BYTES["bfloat16"] * shape.parameters)
    return HostMemory(size * GPU_PROCESS + asleep, GPU_PROCESS + saving, node)
