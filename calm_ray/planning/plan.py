"""The plan of a run: where its parts go, what they hold, and a refusal that names what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calm_ray.cluster.machines import DEVICES, Device, Node
from calm_ray.config import Config
from calm_ray.core.errors import ResourceError
from calm_ray.planning.durations import seconds_of
from calm_ray.planning.layout import Layout, lay_out
from calm_ray.planning.model_shape import Shape
from calm_ray.planning.proposals import proposals
from calm_ray.planning.work import RoundWork, count_questions, work_of


@dataclass(frozen=True)
class Plan:
    config: Config
    shape: Shape
    nodes: list[Node]
    layout: Layout
    device: Device | None
    """None on CPUs."""
    work: RoundWork
    seconds: dict[str, float]
    """Of each step of one round; empty on CPUs, for which nothing is estimated."""

    def as_json(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "name": self.config.name,
            "model": asdict(self.shape),
            "parts": [asdict(part) for part in layout.needs.parts],
            "nodes": [asdict(place) for place in layout.places],
            "engine": layout.engine.as_json(),
            "worker": layout.worker.as_json(),
            "host": asdict(layout.host),
            "device": asdict(self.device) if self.device else None,
            "round": self.work.as_json(),
            "rounds": self.config.rounds,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def make_plan(config: Config, shape: Shape, nodes: Sequence[Node]) -> Plan:
    """The plan of a run on these nodes. Raises ResourceError where they cannot hold it."""
    layout = lay_out(config, shape, nodes)
    refuse(config, shape, nodes, layout)
    work = work_of(config, shape, count_questions(config))
    if config.device == "cpu":
        return Plan(config, shape, list(nodes), layout, None, work, {})
    device = next((node.device for node in nodes if node.gpus), DEVICES["A100-80"])
    return Plan(config, shape, list(nodes), layout, device, work, seconds_of(config, shape, layout, device, work))


def check_plan(config: Config, shape: Shape, nodes: Sequence[Node]) -> None:
    """Raises ResourceError where the nodes of a cluster, those it may still start among them, cannot hold a run.

    The message names what is short, and overrides under which the run would fit. What a node's `gpu_memory` or `memory`
    does not say (None) is not checked. Raises InputError for arguments of engines that cannot be.
    """
    refuse(config, shape, nodes, lay_out(config, shape, nodes))


def refuse(config: Config, shape: Shape, nodes: Sequence[Node], layout: Layout) -> None:
    """Raises ResourceError if a layout has problems."""
    if not layout.problems:
        return
    lines = ["this run does not fit:", *(f"  {problem}" for problem in layout.problems)]
    found = proposals(config, shape, nodes)
    if found:
        lines += ["it would fit on these nodes with", *(f"  {' '.join(map(quoted, change))}" for change in found)]
    else:
        lines += ["and no change of one or two keys would make it fit on these nodes: take more, or larger ones"]
    raise ResourceError("\n".join(lines))


def quoted(word: str) -> str:
    """An override as a shell wants it."""
    return f"'{word}'" if any(character in word for character in " []{}") else word
