"""The plan of a run: placement, memory, work and time, or an error that suggests settings that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calm_ray.cluster.machines import DEVICES, Device, Node
from calm_ray.config import Config
from calm_ray.core.errors import ResourceError
from calm_ray.planning.durations import seconds_of
from calm_ray.planning.layout import Layout, make_layout
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
    """Per step of one round; empty on CPUs, where time is not estimated."""

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
    """Plans a run on these nodes. Raises ResourceError if it does not fit."""
    layout = make_layout(config, shape, nodes)
    refuse(config, shape, nodes, layout)
    work = work_of(config, shape, count_questions(config))
    if config.device == "cpu":
        return Plan(config, shape, list(nodes), layout, None, work, {})
    device = next((node.device for node in nodes if node.gpus), DEVICES["A100-80"])
    return Plan(config, shape, list(nodes), layout, device, work, seconds_of(config, shape, layout, device, work))


def check_plan(config: Config, shape: Shape, nodes: Sequence[Node]) -> None:
    """Raises ResourceError if a run does not fit on the nodes of a cluster, including those it may still start.

    The message says what is short and which overrides would fit. Unknown amounts of memory (None) are not checked.
    Raises InputError for invalid engine arguments.
    """
    refuse(config, shape, nodes, make_layout(config, shape, nodes))


def refuse(config: Config, shape: Shape, nodes: Sequence[Node], layout: Layout) -> None:
    """Raises ResourceError, with proposals, if a layout has problems."""
    if not layout.problems:
        return
    lines = ["this run does not fit:", *(f"  {problem}" for problem in layout.problems)]
    found = proposals(config, shape, nodes)
    if found:
        lines += ["it fits on these nodes with:", *(f"  {' '.join(map(quoted, change))}" for change in found)]
    else:
        lines += ["no change of one or two keys makes it fit; use more or larger nodes"]
    raise ResourceError("\n".join(lines))


def quoted(word: str) -> str:
    """An override, quoted for a shell if needed."""
    return f"'{word}'" if any(character in word for character in " []{}") else word
