"""Checks that a cluster can hold a run: nodes, memory, and the slots by which elastic workers are counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calm_ray.cluster.connection import kinds_of_nodes
from calm_ray.cluster.nodes import nodes_of_cluster
from calm_ray.cluster.resources import ENGINE_SLOT, TRAIN_SLOT, Resources
from calm_ray.config import Config
from calm_ray.core.console import say
from calm_ray.core.errors import InputError, ResourceError
from calm_ray.planning.model_shape import shape_of_folder
from calm_ray.planning.plan import check_plan


def check_layout(config: Config, model_folder: Path) -> None:
    """Raises ResourceError if the nodes that exist or may be started cannot hold the run, including its memory, and
    InputError for invalid engine arguments.

    Leaves a model whose config says too little for a plan to the engines.
    """
    if config.rounds:
        check_slots(config, kinds_of_nodes())
    try:
        shape = shape_of_folder(model_folder)
    except InputError as error:
        say(f"skipping the resource plan: {error}")
        return
    check_plan(config, shape, nodes_of_cluster())


def check_slots(config: Config, nodes: Sequence[Resources]) -> None:
    """Raises ResourceError if, without slots, engines could take the resources that elastic workers are counted by.

    Only warns if engines could fill nodes that workers need.
    """
    used = {slot for slot in (TRAIN_SLOT, ENGINE_SLOT) if any(slot in node for node in nodes)}
    wanted = {TRAIN_SLOT, ENGINE_SLOT} if config.placement == "split" and len(nodes) > 1 else {TRAIN_SLOT}
    missing = sorted(wanted - used, reverse=True)
    if config.train.is_elastic and missing:
        raise ResourceError(
            "train.workers: [min, max] needs nodes that declare how many workers or engines they have slots for: "
            f"start some with `ray start --resources '{{\"{missing[0]}\": 8}}'`, or set train.workers to one number"
        )
    others = [node for node in nodes if TRAIN_SLOT not in node and (config.device == "cpu" or node.get("GPU"))]
    if missing == [ENGINE_SLOT] and others:
        say(f"engines may fill the nodes with slots for training ({TRAIN_SLOT}); declare {ENGINE_SLOT} on the others")
