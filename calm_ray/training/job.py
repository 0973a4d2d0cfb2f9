"""One round's training, as every worker gets it."""

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
    """What the round starts from."""
    reference: Policy
    train: Train
    objective: Objective
    seed: int
    round_number: int
    checkpoint_seconds: float = math.inf
    """The longest time between two checkpoints, but for one step."""

    @property
    def kind(self) -> Literal["adapter", "weights"]:
        """What training writes."""
        return "adapter" if self.train.lora is not None else "weights"
