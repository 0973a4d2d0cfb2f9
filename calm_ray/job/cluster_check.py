"""Whether a cluster can hold a run: its nodes, their memory, and what elastic workers are counted by."""

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
    """Raises ResourceError where the nodes that are there, or may be started, cannot hold a run, memory included, and
    InputError for arguments of engines that cannot be.

    A model whose configuration says too little for a plan is left to the engines.
    """
    if config.rounds:
        check_slots(config, kinds_of_nodes())
    try:
        shape = shape_of_folder(model_folder)
    except InputError as error:
        say(f"the run is not planned: {error}")
        return
    check_plan(config, shape, nodes_of_cluster())


def check_slots(config: Config, nodes: Sequence[Resources]) -> None:
    """Raises ResourceError where engines could take what elastic workers are counted by: all that nodes have.

    Says so where they could fill nodes that workers need.
    """
    used = {place for place in (TRAIN_SLOT, ENGINE_SLOT) if any(place in node for node in nodes)}
    wanted = {TRAIN_SLOT, ENGINE_SLOT} if config.placement == "split" and len(nodes) > 1 else {TRAIN_SLOT}
    missing = sorted(wanted - used, reverse=True)
    if config.train.is_elastic and missing:
        raise ResourceError(
            "train.workers: [least, most] needs nodes that say how many workers, and how many engines, they have room "
            f"for, each what it is for: start some with `ray start --resources '{{\"{missing[0]}\": 8}}'`, or give "
            "train.workers one number"
        )
    others = [node for node in nodes if TRAIN_SLOT not in node and (config.device == "cpu" or node.get("GPU"))]
    if missing == [ENGINE_SLOT] and others:
        say(f"engines may fill the nodes that have places to train ({TRAIN_SLOT}): give the others {ENGINE_SLOT}")
