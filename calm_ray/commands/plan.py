"""`calm-ray plan`: prints what a run needs and where it is placed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.table import Table

from calm_ray.cluster.machines import GB, Node
from calm_ray.config import Config
from calm_ray.core.console import console, say
from calm_ray.core.errors import InputError
from calm_ray.methods.work import CHOICES, Work
from calm_ray.planning.durations import BANDWIDTH_FRACTION, FLOPS_FRACTION, REFERENCE
from calm_ray.planning.hardware import identical_nodes, local_node, nodes_from_launcher_file
from calm_ray.planning.layout import Place, gb, make_layout
from calm_ray.planning.model_shape import Shape, shape_of
from calm_ray.planning.needs import needs_of
from calm_ray.planning.plan import Plan, make_plan
from calm_ray.planning.work import PROMPT_TOKENS, TEXT_BYTES_PER_TOKEN
from calm_ray.recipes.load import Recipes, load_config

MAX_DEFAULT_NODES = 64
"""Maximum number of nodes to try when none are given."""


def show_plan(
    recipes: Recipes,
    overrides: list[str] | None = None,
    cluster: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu_memory: float | None = None,
    cpus_per_node: float | None = None,
    host_memory: float | None = None,
    as_json: bool = False,
    model_config: str | Path | None = None,
    gpu: str | None = None,
) -> None:
    """Prints what a recipe's run needs and its placement on the nodes of a cluster launcher file or on identical nodes.

    Memory is in GB. If no nodes are given, plans for this machine (device: cpu) or for the fewest nodes with eight GPUs
    that fit the run. `model_config` is a config.json to use for the model, `gpu` a key of
    `calm_ray.cluster.machines.DEVICES`. Raises InputError naming the field, and ResourceError if the run cannot fit.
    """
    config = load_config(recipes, overrides or ())
    shape = shape_of(config.model, model_config)
    others = (nodes, gpus_per_node, cpus_per_node, host_memory, gpu)
    if cluster is not None:
        if any(value is not None for value in others):
            raise InputError("cluster: the file already describes its nodes; drop it or the other options")
        planned = nodes_from_launcher_file(cluster, gpu_memory)
    elif all(value is None for value in (*others, gpu_memory)):
        planned = _default_nodes(config, shape)
        if not as_json and config.device == "gpu":
            say("no nodes given: planning for the fewest nodes like a p4de.24xlarge (eight 80 GB A100s)")
    else:
        gpus = 0 if gpus_per_node is None and config.device == "cpu" else gpus_per_node
        count = 1 if nodes is None else nodes
        planned = identical_nodes(count, gpus, gpu_memory, cpus_per_node, host_memory, gpu)
    plan = make_plan(config, shape, planned)
    if as_json:
        print(json.dumps(plan.as_json(), ensure_ascii=False, indent=2))
    else:
        print_plan(plan)


def _default_nodes(config: Config, shape: Shape) -> list[Node]:
    """This machine for a run on CPUs; else as many nodes with eight 80 GB GPUs as the run needs."""
    if config.device == "cpu":
        return local_node(needs_of(config).total["CPU"])
    for count in range(1, MAX_DEFAULT_NODES + 1):
        nodes = identical_nodes(count)
        if not make_layout(config, shape, nodes).problems:
            return nodes
    return identical_nodes(2)


def print_plan(plan: Plan) -> None:
    """Prints the plan as tables."""
    config, shape = plan.config, plan.shape
    say(f"{config.name}: {config.method} in {len(config.languages)} languages, {config.rounds} round(s)")
    known = "assumed: " if shape.is_assumed else ""
    say(f"model: {shape.parameters / 1e9:.3g}B parameters, {shape.layers} layers ({known}{shape.source})")
    console.print(_parts(plan))
    console.print(_places(plan.layout.places))
    console.print(_memory(plan))
    if config.device == "gpu" and plan.layout.engine.limit is not None:
        engine = plan.layout.engine
        say(
            f"an engine's KV cache holds {engine.cached_tokens:,} tokens at {engine.kv_per_token / 1024:.4g} KiB each: "
            f"{engine.full_sequences:,.1f} sequences of {engine.context:,} tokens"
        )
    if config.device == "gpu" and config.placement == "colocate":
        engine, worker = plan.layout.engine, plan.layout.worker
        say(
            f"engines sleep during training: a GPU then holds {gb(worker.total)} for the worker and "
            f"{gb(engine.allowance)} for the engine, "
            f"whose weights ({gb(config.engines.tensor_parallel_size * engine.weights)}) move to host memory"
        )
    console.print(_steps(plan))
    for where, sizes in (("run's storage, per round", plan.work.disk), ("cache of each node", plan.work.cache)):
        each = ", ".join(f"{name} {gb(size)}" for name, size in sizes.items() if size)
        say(f"disk in the {where}: at most {gb(sum(sizes.values()))} ({each})")
    say("assumed:")
    for line in assumptions(plan):
        say(f"  {line}")


def _parts(plan: Plan) -> Table:
    """What Ray starts, and the resources it reserves."""
    size = plan.config.engines.tensor_parallel_size
    table = Table("part", "count", "CPU each", "GPU each", "started as")
    how = {
        "engine": "an actor" if size == 1 else f"an actor in a placement group: STRICT_PACK, {size} bundles of 1 GPU",
        "worker": "a Ray Train worker, during training",
        "data task": "a Ray Data task",
    }
    for part in plan.layout.needs.parts:
        takes = [f"{part.takes.get(name, 0):g}" for name in ("CPU", "GPU")]
        is_beside = part.what == "worker" and plan.config.device == "gpu" and not part.takes.get("GPU")
        count = str(part.count)
        if part.what == "worker" and plan.config.train.is_elastic:
            count += f" ({plan.config.train.min_workers} to {plan.config.train.max_workers})"
        table.add_row(part.what, count, *takes, how[part.what] + (", on a sleeping engine's GPU" if is_beside else ""))
    return table


def _places(places: Sequence[Place]) -> Table:
    """What each node holds; consecutive nodes with the same load share a line."""
    table = Table("nodes", "engines", "workers", "CPU", "GPU", "host memory")

    def row(place: Place) -> tuple[str, ...]:
        node = place.node
        host = gb(place.host) + (f" of {gb(node.memory)}" if node.memory is not None else "")
        gpus = f"{place.gpus} of {node.gpus}"
        return str(place.engines), str(place.workers), f"{place.cpus:g} of {node.cpus:g}", gpus, host

    for cells, group in groupby(places, key=row):
        names = [place.node.name for place in group]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        table.add_row(name, *cells)
    return table


def _memory(plan: Plan) -> Table:
    """Memory of one engine and one worker."""
    engine, worker, on_gpu = plan.layout.engine, plan.layout.worker, plan.config.device == "gpu"
    table = Table("memory of", "what", "size", title="each GPU" if on_gpu else "the host")
    rows = [("engine", "weights", engine.weights), ("", "activations", engine.activations)]
    rows += [("", "CUDA", engine.allowance)] if on_gpu else []
    if not on_gpu or engine.limit is not None:
        rows.append(("", "KV cache", engine.kv_cache))
    rows += [
        ("worker", "weights", worker.weights),
        ("", "adapter, gradients, Adam" if plan.config.train.lora else "gradients, Adam", worker.optimizer),
        ("", "gathered layers", worker.gathered),
        ("", f"activations of {worker.tokens:,} tokens", worker.activations),
        ("", "log-probabilities", worker.logps),
    ]
    rows += [("", "CUDA", worker.allowance)] if on_gpu else []
    rows.append(("", "total, at most", worker.total))
    for who, what, size in rows:
        table.add_row(who, what, gb(size))
    return table


def _steps(plan: Plan) -> Table:
    """What one round does, and how long it may take."""
    config, work = plan.config, plan.work
    of = "one round" if work.is_counted else "one round, PER QUESTION (question files not found)"
    table = Table("step", "at most", "time", title=of)
    amounts: dict[str, str] = {}
    for name, step in work.steps.items():
        if step.reference:
            amounts[REFERENCE] = f"{step.reference:,} tokens"
        if step.rows:
            amounts[name] = _amount(step)
    for name, amount in amounts.items():
        seconds = plan.seconds.get(name)
        table.add_row(name, amount, "-" if seconds is None else duration(seconds))
    if plan.seconds and work.is_counted:
        each, evaluation = sum(plan.seconds.values()), config.evaluation
        table.add_row("total", "", duration(each))
        if config.rounds:
            before = sum(plan.seconds.get(step.name, 0.0) for step in evaluation if step.first_round == 0)
            whole = duration(config.rounds * each + before)
            table.add_row(f"the run: {config.rounds} round(s)", "with evaluation of the untrained model", whole)
    return table


def _amount(work: Work) -> str:
    tokens = [f"{count:,} {what}" for what, count in (("read", work.read), ("written", work.written)) if count]
    tokens += [f"{work.trained:,} per epoch"] if work.trained else []
    return f"{work.rows:,} {work.unit}" + (f", tokens: {', '.join(tokens)}" if tokens else "")


def assumptions(plan: Plan) -> list[str]:
    """The assumptions behind the figures, beyond the recipe."""
    lines = [f"the model: {plan.shape.source}"] if plan.shape.is_assumed else []
    if plan.device is not None:
        device = plan.device
        lines.append(
            f"GPUs: {device.name}, {device.flops / 1e12:g} TFLOP/s in bfloat16 and {device.bandwidth / 1e12:g} TB/s by "
            f"data sheet; {FLOPS_FRACTION:.0%} of the FLOP/s in prefill and training, {BANDWIDTH_FRACTION:.0%} of the "
            "bandwidth in decoding"
        )
        if len({node.gpu_memory for node in plan.nodes if node.gpus}) > 1:
            lines.append("every GPU counts as the smallest one, as Ray ignores GPU memory")
        lines.append("times exclude starting engines and workers, and waiting for nodes")
    else:
        lines.append("times on CPUs are not estimated")
    lines.append("layers are like Llama's: full attention and a gated MLP")
    if plan.config.train.engine == "trl":
        lines.append("TRL's trainer counts like calm_ray's own, with a whole batch of pairs at a time")
    if plan.work.is_counted:
        lines.append(f"prompts have {plan.work.sizes.prompt} tokens: one per {TEXT_BYTES_PER_TOKEN} bytes of text")
    else:
        lines.append(f"prompts have {PROMPT_TOKENS} tokens, questions {CHOICES} choices")
    lines.append("every completion has sampling.max_new_tokens tokens, and every one loses")
    lines.append(f"GB are 10^9 bytes; {gb(2 * GB)} per GPU and the host memory of processes are allowances")
    return lines


def duration(seconds: float) -> str:
    """For display: 12 s, 5 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
