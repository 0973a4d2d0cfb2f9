"""Proposes overrides that make a run fit: changes of one key, then of two, each checked by laying out the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from calm_ray.cluster.machines import Node
from calm_ray.config import Config, parse_config
from calm_ray.planning.layout import make_layout
from calm_ray.planning.memory import context_of, utilization
from calm_ray.planning.model_shape import Shape
from calm_ray.recipes.merge import override

MAX_PROPOSALS = 3

Change = tuple[str, ...]
"""Overrides to apply together."""


def proposals(config: Config, shape: Shape, nodes: Sequence[Node]) -> list[Change]:
    """Up to three changes, of different keys, that each make the run fit on these nodes.

    They do not affect the training result, except for dropping longer pairs, which is tried last.
    """
    keys = [list(values) for values in _changes(config, shape)]
    found: list[Change] = []
    for values in keys:
        found += _first_that_fits(values, config, shape, nodes)
    if not found:
        for one, other in combinations(keys, 2):
            found += _first_that_fits([a + b for a in one for b in other], config, shape, nodes)
            if len(found) >= MAX_PROPOSALS:
                break
    return found[:MAX_PROPOSALS]


def changed(config: Config, change: Change) -> Config | None:
    """The configuration with overrides applied; None if the result is invalid."""
    raw: dict[str, Any] = config.model_dump(mode="json")
    for word in change:
        override(raw, word)
    try:
        return parse_config(raw)
    except ValueError:
        return None


def _first_that_fits(values: list[Change], config: Config, shape: Shape, nodes: Sequence[Node]) -> list[Change]:
    for change in values:
        after = changed(config, change)
        if after is not None and not make_layout(after, shape, nodes).problems:
            return [change]
    return []


def _changes(config: Config, shape: Shape) -> Iterator[Iterator[Change]]:
    """The values to try, by key: cheapest keys first, nearest values first."""
    yield _lighter_training(config, shape)
    yield _engine_limits(config, shape)
    yield _engine_sizes(config)
    yield _more_workers(config, max_nodes=64)
    yield _colocated(config)
    yield _fewer_engines(config)
    yield _fewer_workers(config)
    yield _fewer_cpus(config)
    yield _shorter_pairs(config, shape)


def _lighter_training(config: Config, shape: Shape) -> Iterator[Change]:
    train = config.train
    if not train.activation_checkpointing:
        yield ("train.activation_checkpointing=true",)
    if train.shards is not None:
        yield ("train.shards=null",)
    for tokens in _halves(train.pack_tokens, 512):
        yield (f"train.pack_tokens={tokens}",)


def _engine_limits(config: Config, shape: Shape) -> Iterator[Change]:
    for fraction in (0.92, 0.95):
        if fraction > utilization(config):
            yield (f"engines.args.gpu_memory_utilization={fraction}",)
    if config.device == "gpu":
        for tokens in _halves(context_of(config, shape), 1024):
            yield (f"engines.args.max_model_len={tokens}",)


def _engine_sizes(config: Config) -> Iterator[Change]:
    size = config.engines.tensor_parallel_size
    if config.device == "gpu":
        for other in sorted((1, 2, 4, 8, 16), key=lambda n: (abs(n - size), n)):
            if other != size:
                yield (f"engines.tensor_parallel_size={other}",)


def _colocated(config: Config) -> Iterator[Change]:
    """Colocated workers each need the GPU of an engine."""
    if config.device == "cpu" or config.placement == "colocate":
        return
    gpus = config.engines.count(config.languages) * config.engines.tensor_parallel_size
    if config.train.max_workers <= gpus:
        yield ("placement=colocate",)
    elif not config.train.is_elastic:
        yield "placement=colocate", f"train.workers={gpus}"


def _fewer_engines(config: Config) -> Iterator[Change]:
    for fewer in _fewer(config.engines.count(config.languages)):
        if config.engines.per_language is None:
            yield (f"engines.shared={fewer}",)
        else:
            yield "engines.per_language=null", f"engines.shared={fewer}"


def _fewer_workers(config: Config) -> Iterator[Change]:
    least = config.train.min_workers
    for fewer in _fewer(least):
        if config.train.is_elastic:
            yield (f"train.workers=[{fewer}, {config.train.max_workers}]",)
        else:
            yield (f"train.workers={fewer}",)


def _more_workers(config: Config, max_nodes: int) -> Iterator[Change]:
    """More workers shard the model further, so each needs less memory."""
    if config.train.is_elastic or config.train.shards is not None or config.device == "cpu":
        return
    workers = config.train.max_workers
    while (workers := 2 * workers) <= 8 * max_nodes:
        yield (f"train.workers={workers}",)


def _fewer(count: int) -> list[int]:
    """Counts below `count`, nearest first: every one up to 32, else powers of two."""
    powers = [2**power for power in range(count.bit_length() - 1, -1, -1)]
    return [number for number in (range(count - 1, 0, -1) if count <= 32 else powers) if number < count]


def _fewer_cpus(config: Config) -> Iterator[Change]:
    for cpus in (0.5, 0.2):
        change: Change = ()
        if config.engines.cpus > cpus:
            change += (f"engines.cpus={cpus}",)
        if config.train.cpus_per_worker > cpus:
            change += (f"train.cpus_per_worker={cpus}",)
        if change:
            yield change


def _shorter_pairs(config: Config, shape: Shape) -> Iterator[Change]:
    """Tried last: drops longer pairs."""
    train = config.train
    for tokens in _halves(min(train.max_pair_tokens, context_of(config, shape)), 512):
        yield f"train.max_pair_tokens={tokens}", f"train.pack_tokens={min(train.pack_tokens, 2 * tokens)}"


def _halves(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value
