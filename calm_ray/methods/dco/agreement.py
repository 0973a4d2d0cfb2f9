"""How often languages agree on the more likely side of a pair (DCO, Eq. 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch.distributed as dist

from calm_ray.training.objectives import Measured, Watch
from calm_ray.training.trees import Key


class Agreement(Watch):
    """Records on this rank, since the last `note`, whether the first side of each pair is the more likely one."""

    def __init__(self) -> None:
        self._seen: dict[Key, bool] = {}

    def see(self, measured: Measured) -> None:
        chosen, rejected = measured.sides()
        prefers = (measured.logps[chosen] > measured.logps[rejected]).tolist()
        self._seen |= {tree.key: value for tree, value in zip(measured.trees, prefers, strict=True)}

    def observe_reference(self, logps: Mapping[Key, Sequence[float]]) -> None:
        self._seen = {key: chosen > rejected for key, (chosen, rejected) in logps.items()}

    def note(self) -> dict[str, float]:
        """Returns `same_preference`: how often two languages prefer the same side of a pair."""
        by_pair: dict[tuple[str, int], list[bool]] = defaultdict(list)
        for (question_id, _, number), prefers in self._gather().items():
            by_pair[question_id, number].append(prefers)
        self._seen = {}
        agreements = [a == b for sides in by_pair.values() for a, b in combinations(sides, 2)]
        return {"same_preference": sum(agreements) / len(agreements)} if agreements else {}

    def state(self) -> list[list[str | int | bool]]:
        return [[*key, prefers] for key, prefers in self._gather().items()]

    def restore(self, state: Any) -> None:
        self._seen = {(question_id, language, number): prefers for question_id, language, number, prefers in state}

    def _gather(self) -> dict[Key, bool]:
        seen: list[dict[Key, bool]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(seen, self._seen)
        return {key: prefers for part in seen for key, prefers in part.items()}
