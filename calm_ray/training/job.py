"""One round's training, as sent to every worker."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from calm_ray.core.sections import Train
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.training.objectives import Objective


@dataclass(frozen=True)
class TrainJob:
    """One round's training. Picklable."""

    examples: Stage
    """Pairs or dialogues."""
    output: Stage
    model: RunModel
    start: Policy
    """The policy the round starts from."""
    reference: Policy
    train: Train
    objective: Objective
    seed: int
    round_number: int
    checkpoint_seconds: float = math.inf
    """Longest time between two checkpoints, plus at most one step."""

    @property
    def kind(self) -> Literal["adapter", "weights"]:
        """Kind of policy that training writes."""
        return "adapter" if self.train.lora is not None else "weights"
