"""Which node gets what, and why a run does not fit."""

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

HOST_SHARE = 0.95
"""Ray ends processes on a node whose memory is fuller than this (RAY_memory_usage_threshold)."""
TOLERANCE = 1e-9
PADDING = 64
"""vLLM fills the vocabulary up to a multiple of this (DEFAULT_VOCAB_PADDING_SIZE)."""


@dataclass
class Place:
    """What a node has been given."""

    node: Node
    engines: int = 0
    workers: int = 0
    cpus: float = 0.0
    gpus: int = 0
    """GPUs that are taken; where engines and workers share them, each counts once."""
    beside: int = 0
    """Workers on an engine's GPU."""
    host: int = 0
    """Bytes."""

    def room_for(self, cpus: float, gpus: int, host: int, most: int) -> int:
        """How many pieces of this size have room, up to `most`."""
        if cpus:
            most = min(most, int((self.node.cpus - self.cpus) / cpus + TOLERANCE))
        if gpus:
            most = min(most, (self.node.gpus - self.gpus) // gpus)
        if host and self.node.memory is not None:
            most = min(most, int((HOST_SHARE * self.node.memory - self.host) // host))
        return max(0, most)

    def take(self, count: int, cpus: float, gpus: int, host: int) -> None:
        self.cpus, self.gpus, self.host = self.cpus + count * cpus, self.gpus + count * gpus, self.host + count * host


@dataclass(frozen=True)
class Layout:
    """A run on its nodes, or why there is none."""

    needs: Needs
    """With as many workers as have a place."""
    places: list[Place]
    engine: EngineMemory
    worker: WorkerMemory
    host: HostMemory
    problems: list[str] = field(default_factory=list)
    """What is short, in numbers; empty where the run fits."""


def lay_out(config: Config, shape: Shape, nodes: Sequence[Node]) -> Layout:
    """Places a run on nodes, engines first, as Ray does; with `train.workers: [least, most]` as many as fit.

    The first node with room takes each piece: engines are all alike, and so are workers, so nothing is lost by it.
    Where only some nodes have places to train, engines leave these to workers as long as they can.
    """
    train = config.train
    size, on_gpu = config.engines.tensor_parallel_size, config.device == "gpu"
    able = [node for node in nodes if (node.gpus or not on_gpu) and node.engine_slots != 0]
    smallest = min((node for node in able if node.gpu_memory), key=lambda n: n.gpu_memory or 0, default=None)
    device = smallest.device if smallest else able[0].device if able else DEVICES["A100-80"]
    engine = engine_memory(config, shape, smallest.gpu_memory if smallest else None, device)
    of_worker = [node.gpu_memory for node in nodes if node.gpus and node.gpu_memory and node.train_slots != 0]
    problems = engine_problems(config, shape, engine)
    workers = train.most_workers
    while True:
        worker = worker_memory(config, shape, workers)
        host = host_memory(config, shape, engine, worker)
        needs = needs_of(config, training=config.rounds > 0, workers=workers)
        places = [Place(node) for node in nodes]
        # Where workers may leave, those that stay must have room for their shares.
        fullest = worker_memory(config, shape, train.least_workers)
        short = worker_problems(config, fullest, min(of_worker, default=None)) if on_gpu and config.rounds else []
        missing = _place_all(needs, places, host, size if on_gpu else 0)
        if not missing or workers == train.least_workers:
            break
        workers = max(train.least_workers, workers - max(1, missing.get("worker", 0)))
    short += [_shortfall(what, count, needs, host, nodes) for what, count in missing.items()]
    return Layout(needs, places, engine, worker, host, problems + short)


def _place_all(needs: Needs, places: list[Place], host: HostMemory, engine_gpus: int) -> dict[str, int]:
    """Gives every part its place; returns how many of what have none."""
    missing: dict[str, int] = {}
    worker = next((part for part in needs.parts if part.what == "worker"), Group("worker", 0, {}))
    is_shared = engine_gpus > 0 and worker.count > 0 and not worker.takes.get("GPU")
    for part in needs.parts:
        is_engine, is_beside = part.what == "engine", part.what == "worker" and is_shared
        takes = _amounts(part, host)
        left = part.count
        for place, kept in _offers(places, is_shared) if is_engine else [(place, 0) for place in places]:
            most = min(left, place.engines * engine_gpus - place.beside) if is_beside else left
            if (let_in := slots_for(part.what, place.node)) is not None:
                most = min(most, let_in - place.engines * is_engine)
            once = host.node if is_engine and not place.engines else 0
            place.host += once
            place.take(kept, *_amounts(worker, host))
            count = place.room_for(*takes, most)
            place.take(-kept, *_amounts(worker, host))
            place.host -= 0 if count else once
            place.take(count, *takes)
            left -= count
            place.engines += count * is_engine
            place.workers += count * (part.what == "worker")
            place.beside += count * is_beside
        if left:
            missing[part.what] = missing.get(part.what, 0) + left
    return missing


def _amounts(part: Group, host: HostMemory) -> tuple[float, int, int]:
    """CPUs, GPUs and bytes of the host that one of a part takes."""
    memory = {"engine": host.engine, "worker": host.worker}.get(part.what, 0)
    return part.takes.get("CPU", 0.0), int(part.takes.get("GPU", 0)), memory


def _offers(places: list[Place], is_shared: bool) -> list[tuple[Place, int]]:
    """Nodes as engines take them, each with how many workers it keeps room for.

    At first each keeps its places to train; engines whose GPUs workers are to share go there instead.
    """
    if is_shared:
        return [(place, 0) for place in sorted(places, key=lambda place: -(place.node.train_slots or 0))]
    return [(place, place.node.train_slots or 0) for place in places] + [(place, 0) for place in places]


def slots_for(what: str, node: Node) -> int | None:
    """How many engines or workers a node lets in; None where the cluster does not say so."""
    return {"engine": node.engine_slots, "worker": node.train_slots}.get(what)


def engine_problems(config: Config, shape: Shape, engine: EngineMemory) -> list[str]:
    """Why an engine cannot start, whatever node it is on."""
    problems = []
    size = config.engines.tensor_parallel_size
    if undivided := _undivided(shape, size):
        problems.append(f"engines.tensor_parallel_size={size} does not divide the model's {', '.join(undivided)}")
    if engine.limit is None and config.device == "gpu":
        return problems
    if engine.kv_cache <= 0 or (engine.limit is not None and engine.fixed + engine.kv_cache > engine.limit):
        needed = engine.fixed + max(0, engine.kv_cache)
        problems.append(
            f"an engine needs {gb(needed)} on each GPU before its cache ({gb(engine.weights)} weights, "
            f"{gb(engine.activations)} activations, {gb(engine.allowance)} for CUDA) and may take "
            f"{gb(engine.limit or 0)}: {gb(needed - (engine.limit or 0))} short"
        )
    elif engine.cached_tokens < engine.context and not fits_context(config):
        problems.append(
            f"an engine's cache of {gb(engine.kv_cache)} on each GPU holds {engine.cached_tokens:,} tokens, and one "
            f"sequence may have {engine.context:,}: {engine.context - engine.cached_tokens:,} tokens short"
        )
    return problems


def _undivided(shape: Shape, size: int) -> list[str]:
    """What vLLM shares among the GPUs of an engine, and cannot share among so many.

    vLLM 0.32: model_executor/models/llama.py, layers/linear.py and layers/vocab_parallel_embedding.py.
    """
    keys, vocabulary = shape.kv_heads, -(-shape.vocabulary // PADDING) * PADDING
    left_over = {
        f"{shape.heads} heads": shape.heads % size,
        f"{keys} key/value heads (nor is a multiple of them)": keys % size and size % keys,
        f"MLP of {shape.intermediate:,}": shape.intermediate % size,
        f"vocabulary of {vocabulary:,} (padded)": vocabulary % size,
    }
    return [part for part, count in left_over.items() if count]


def worker_problems(config: Config, worker: WorkerMemory, memory: int | None) -> list[str]:
    """Why a training worker does not fit onto a GPU of so many bytes."""
    if memory is None:
        return []
    asleep = CUDA_ALLOWANCE if config.placement == "colocate" else 0
    short = worker.total + asleep - memory
    if short <= 0:
        return []
    beside = f", and {gb(asleep)} for the sleeping engine's CUDA" if asleep else ""
    return [
        f"a training worker needs {gb(worker.total)} ({gb(worker.weights)} weights, {gb(worker.optimiser)} gradients "
        f"and optimiser, {gb(worker.total - worker.weights - worker.optimiser)} to compute with){beside}; a GPU has "
        f"{gb(memory)}: {gb(short)} short"
    ]


def _shortfall(what: str, missing: int, needs: Needs, host: HostMemory, nodes: Sequence[Node]) -> str:
    """What some parts without a place would take, and what there is."""
    count = needs.count(what)
    takes = next(part.takes for part in reversed(needs.parts) if part.what == what)
    memory = {"engine": host.engine + host.node, "worker": host.worker}.get(what, 0)
    each = [f"{amount:g} {name}" for name, amount in takes.items() if amount] + ([gb(memory)] if memory else [])
    places = [most for node in nodes if (most := slots_for(what, node)) is not None]
    each += [f"1 {PLACE_OF[what]}"] if places else []
    wants = ", ".join(f"{amount:g} {name}" for name, amount in needs.total.items() if amount)
    known = [node.memory for node in nodes if node.memory is not None]
    has = f"{sum(n.cpus for n in nodes):g} CPU, {sum(n.gpus for n in nodes)} GPU"
    has += f", {gb(sum(known))} of host memory" if len(known) == len(nodes) else ""
    has += f", {sum(places)} {PLACE_OF[what]}" if places else ""
    return (
        f"{missing} of {count} {NAMES.get(what, what + 's')} have no place: each takes {', '.join(each)} on one node; "
        f"the run takes {wants} in all, and {len(nodes)} {'node has' if len(nodes) == 1 else 'nodes have'} {has}"
    )


NAMES = {"engine": "engines", "worker": "training workers"}
PLACE_OF = {"engine": ENGINE_SLOT, "worker": TRAIN_SLOT}
"""The resources of Ray's that say where each may go."""


def gb(amount: float) -> str:
    """Bytes for people: 16.1 GB, 3.4 MB."""
    if abs(amount) >= GB / 10:
        return f"{amount / GB:,.1f} GB"
    return f"{amount / 1e6:,.1f} MB" if abs(amount) >= 1e5 or not amount else f"{amount / 1e3:,.1f} kB"
