"""Places engines and workers on nodes, or explains why they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from calm_ray.cluster.machines import DEVICES, GB, Node
from calm_ray.cluster.resources import ENGINE_SLOT, TRAIN_SLOT, Group, Needs
from calm_ray.config import Config
from calm_ray.planning.memory import (
    CUDA_ALLOWANCE,
    EngineMemory,
    HostMemory,
    WorkerMemory,
    engine_memory,
    fits_context,
    host_memory,
    worker_memory,
)
from calm_ray.planning.model_shape import Shape
from calm_ray.planning.needs import needs_of

HOST_FRACTION = 0.95
"""Ray kills processes on a node that uses more of its memory than this (RAY_memory_usage_threshold)."""
TOLERANCE = 1e-9
PADDING = 64
"""vLLM pads the vocabulary to a multiple of this (DEFAULT_VOCAB_PADDING_SIZE)."""


@dataclass
class Place:
    """What runs on a node."""

    node: Node
    engines: int = 0
    workers: int = 0
    cpus: float = 0.0
    gpus: int = 0
    """GPUs in use; one shared by an engine and a worker counts once."""
    colocated: int = 0
    """Workers that share an engine's GPU."""
    host: int = 0
    """Host memory in use, bytes."""

    def room_for(self, cpus: float, gpus: int, host: int, most: int) -> int:
        """How many more parts of this size fit, up to `most`."""
        if cpus:
            most = min(most, int((self.node.cpus - self.cpus) / cpus + TOLERANCE))
        if gpus:
            most = min(most, (self.node.gpus - self.gpus) // gpus)
        if host and self.node.memory is not None:
            most = min(most, int((HOST_FRACTION * self.node.memory - self.host) // host))
        return max(0, most)

    def take(self, count: int, cpus: float, gpus: int, host: int) -> None:
        self.cpus, self.gpus, self.host = self.cpus + count * cpus, self.gpus + count * gpus, self.host + count * host


@dataclass(frozen=True)
class Layout:
    """A run placed on nodes, or the reasons why it does not fit."""

    needs: Needs
    """With as many workers as fit."""
    places: list[Place]
    engine: EngineMemory
    worker: WorkerMemory
    host: HostMemory
    problems: list[str] = field(default_factory=list)
    """What is short, and by how much; empty if the run fits."""


def make_layout(config: Config, shape: Shape, nodes: Sequence[Node]) -> Layout:
    """Places a run on nodes, engines first, as Ray does; with `train.workers: [min, max]`, as many workers as fit.

    First fit, which is enough because all engines are identical, and all workers. If only some nodes have training
    slots, engines avoid them as long as they can.
    """
    train = config.train
    size, on_gpu = config.engines.tensor_parallel_size, config.device == "gpu"
    for_engines = [node for node in nodes if (node.gpus or not on_gpu) and node.engine_slots != 0]
    smallest = min((node for node in for_engines if node.gpu_memory), key=lambda n: n.gpu_memory or 0, default=None)
    device = smallest.device if smallest else for_engines[0].device if for_engines else DEVICES["A100-80"]
    engine = engine_memory(config, shape, smallest.gpu_memory if smallest else None, device)
    worker_gpus = [node.gpu_memory for node in nodes if node.gpus and node.gpu_memory and node.train_slots != 0]
    problems = engine_problems(config, shape, engine)
    workers = train.max_workers
    while True:
        worker = worker_memory(config, shape, workers)
        host = host_memory(config, shape, engine, worker)
        needs = needs_of(config, training=config.rounds > 0, workers=workers)
        places = [Place(node) for node in nodes]
        # Elastic workers may leave: the remaining minimum must have room for the whole sharded model.
        fullest = worker_memory(config, shape, train.min_workers)
        short = worker_problems(config, fullest, min(worker_gpus, default=None)) if on_gpu and config.rounds else []
        missing = _place_all(needs, places, host, size if on_gpu else 0)
        if not missing or workers == train.min_workers:
            break
        workers = max(train.min_workers, workers - max(1, missing.get("worker", 0)))
    short += [_shortfall(what, count, needs, host, nodes) for what, count in missing.items()]
    return Layout(needs, places, engine, worker, host, problems + short)


def _place_all(needs: Needs, places: list[Place], host: HostMemory, engine_gpus: int) -> dict[str, int]:
    """Places every part; returns the number of parts without a place, by kind."""
    missing: dict[str, int] = {}
    worker = next((part for part in needs.parts if part.what == "worker"), Group("worker", 0, {}))
    share_gpus = engine_gpus > 0 and worker.count > 0 and not worker.takes.get("GPU")
    for part in needs.parts:
        is_engine, is_colocated = part.what == "engine", part.what == "worker" and share_gpus
        takes = _amounts(part, host)
        left = part.count
        for place, reserved in _engine_order(places, share_gpus) if is_engine else [(place, 0) for place in places]:
            most = min(left, place.engines * engine_gpus - place.colocated) if is_colocated else left
            if (slots := slots_for(part.what, place.node)) is not None:
                most = min(most, slots - place.engines * is_engine)
            per_node = host.node if is_engine and not place.engines else 0
            place.host += per_node
            place.take(reserved, *_amounts(worker, host))
            count = place.room_for(*takes, most)
            place.take(-reserved, *_amounts(worker, host))
            place.host -= 0 if count else per_node
            place.take(count, *takes)
            left -= count
            place.engines += count * is_engine
            place.workers += count * (part.what == "worker")
            place.colocated += count * is_colocated
        if left:
            missing[part.what] = missing.get(part.what, 0) + left
    return missing


def _amounts(part: Group, host: HostMemory) -> tuple[float, int, int]:
    """(CPUs, GPUs, bytes of host memory) of one engine, worker or task of a group."""
    memory = {"engine": host.engine, "worker": host.worker}.get(part.what, 0)
    return part.takes.get("CPU", 0.0), int(part.takes.get("GPU", 0)), memory


def _engine_order(places: list[Place], share_gpus: bool) -> list[tuple[Place, int]]:
    """(node, training slots to keep free) in the order in which engines fill the nodes.

    The first pass keeps all training slots free, the second none. Engines that share GPUs with workers start at the
    nodes with the most training slots instead.
    """
    if share_gpus:
        return [(place, 0) for place in sorted(places, key=lambda place: -(place.node.train_slots or 0))]
    return [(place, place.node.train_slots or 0) for place in places] + [(place, 0) for place in places]


def slots_for(what: str, node: Node) -> int | None:
    """Slots of a node for engines or workers; None if the cluster does not limit them."""
    return {"engine": node.engine_slots, "worker": node.train_slots}.get(what)


def engine_problems(config: Config, shape: Shape, engine: EngineMemory) -> list[str]:
    """Reasons why an engine cannot start on any node."""
    problems = []
    size = config.engines.tensor_parallel_size
    if indivisible := _indivisible(shape, size):
        problems.append(f"engines.tensor_parallel_size={size} does not divide the model's {', '.join(indivisible)}")
    if engine.limit is None and config.device == "gpu":
        return problems
    if engine.kv_cache <= 0 or (engine.limit is not None and engine.fixed + engine.kv_cache > engine.limit):
        needed = engine.fixed + max(0, engine.kv_cache)
        problems.append(
            f"an engine needs {gb(needed)} per GPU before any KV cache ({gb(engine.weights)} weights, "
            f"{gb(engine.activations)} activations, {gb(engine.allowance)} for CUDA) but may use "
            f"{gb(engine.limit or 0)}: {gb(needed - (engine.limit or 0))} short"
        )
    elif engine.cached_tokens < engine.context and not fits_context(config):
        problems.append(
            f"an engine's KV cache of {gb(engine.kv_cache)} per GPU holds {engine.cached_tokens:,} tokens, but one "
            f"sequence may have {engine.context:,}: {engine.context - engine.cached_tokens:,} tokens short"
        )
    return problems


def _indivisible(shape: Shape, size: int) -> list[str]:
    """The parts of the model that vLLM cannot split over `size` GPUs.

    vLLM 0.32: model_executor/models/llama.py, layers/linear.py and layers/vocab_parallel_embedding.py.
    """
    keys, vocabulary = shape.kv_heads, -(-shape.vocabulary // PADDING) * PADDING
    remainders = {
        f"{shape.heads} heads": shape.heads % size,
        f"{keys} key/value heads (nor is it a multiple)": keys % size and size % keys,
        f"MLP of {shape.intermediate:,}": shape.intermediate % size,
        f"vocabulary of {vocabulary:,} (padded)": vocabulary % size,
    }
    return [part for part, remainder in remainders.items() if remainder]


def worker_problems(config: Config, worker: WorkerMemory, memory: int | None) -> list[str]:
    """Reasons why a training worker does not fit on a GPU with `memory` bytes."""
    if memory is None:
        return []
    asleep = CUDA_ALLOWANCE if config.placement == "colocate" else 0
    short = worker.total + asleep - memory
    if short <= 0:
        return []
    engine = f", plus {gb(asleep)} for the sleeping engine's CUDA context" if asleep else ""
    return [
        f"a training worker needs {gb(worker.total)} ({gb(worker.weights)} weights, {gb(worker.optimizer)} gradients "
        f"and optimizer, {gb(worker.total - worker.weights - worker.optimizer)} working memory){engine}; a GPU has "
        f"{gb(memory)}: {gb(short)} short"
    ]


def _shortfall(what: str, missing: int, needs: Needs, host: HostMemory, nodes: Sequence[Node]) -> str:
    """What the unplaced parts need, and what the nodes have."""
    count = needs.count(what)
    takes = next(part.takes for part in reversed(needs.parts) if part.what == what)
    memory = {"engine": host.engine + host.node, "worker": host.worker}.get(what, 0)
    each = [f"{amount:g} {name}" for name, amount in takes.items() if amount] + ([gb(memory)] if memory else [])
    slots = [free for node in nodes if (free := slots_for(what, node)) is not None]
    each += [f"1 {SLOTS[what]}"] if slots else []
    wants = ", ".join(f"{amount:g} {name}" for name, amount in needs.total.items() if amount)
    known = [node.memory for node in nodes if node.memory is not None]
    has = f"{sum(n.cpus for n in nodes):g} CPU, {sum(n.gpus for n in nodes)} GPU"
    has += f", {gb(sum(known))} of host memory" if len(known) == len(nodes) else ""
    has += f", {sum(slots)} {SLOTS[what]}" if slots else ""
    return (
        f"no room for {missing} of {count} {PLURALS.get(what, what + 's')}: each needs {', '.join(each)} on one node; "
        f"the run needs {wants} in total, and {len(nodes)} {'node has' if len(nodes) == 1 else 'nodes have'} {has}"
    )


PLURALS = {"engine": "engines", "worker": "training workers"}
SLOTS = {"engine": ENGINE_SLOT, "worker": TRAIN_SLOT}
"""Custom Ray resources that restrict where each may run."""


def gb(amount: float) -> str:
    """Formats bytes: 16.1 GB, 3.4 MB."""
    if abs(amount) >= GB / 10:
        return f"{amount / GB:,.1f} GB"
    return f"{amount / 1e6:,.1f} MB" if abs(amount) >= 1e5 or not amount else f"{amount / 1e3:,.1f} kB"
