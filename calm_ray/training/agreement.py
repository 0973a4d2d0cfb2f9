"""Which side of each pair the policy finds likelier, and how often languages agree on it (DCO, Eq. 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import torch.distributed as dist
from torch import Tensor

from calm_ray.core.rows import Margin
from calm_ray.training.batches import Example, Key


class Agreement:
    """What the workers saw since it was last noted: whether the first side of a pair is the likelier one."""

    def __init__(self) -> None:
        self._seen: dict[Key, bool] = {}

    def see(self, examples: Sequence[Example], prefers: Tensor) -> None:
        self._seen |= {one.key: value for one, value in zip(examples, prefers.tolist(), strict=False)}

    def see_reference(self, margins: dict[Key, Margin]) -> None:
        self._seen = {key: row["ref_chosen_logps"] > row["ref_rejected_logps"] for key, row in margins.items()}

    def same_share(self) -> float | None:
        """Of the same pair in two languages, how often both have the same side likelier; then forgets all.

        Over all pairs and pairs of languages that any worker saw. None where there are none. For every worker to call.
        """
        by_pair: dict[tuple[str, int], list[bool]] = defaultdict(list)
        for (question_id, _, number), prefers in self._of_all_workers().items():
            by_pair[question_id, number].append(prefers)
        self._seen = {}
        alike = [a == b for sides in by_pair.values() for a, b in combinations(sides, 2)]
        return sum(alike) / len(alike) if alike else None

    def as_json(self) -> list[list[str | int | bool]]:
        """What all workers saw. For every worker to call."""
        return [[*key, prefers] for key, prefers in self._of_all_workers().items()]

    def take_up(self, rows: list[tuple[str, str, int, bool]]) -> None:
        """Goes on from `as_json`."""
        self._seen = {(question_id, language, pair): prefers for question_id, language, pair, prefers in rows}

    def _of_all_workers(self) -> dict[Key, bool]:
        seen: list[dict[Key, bool]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(seen, self._seen)
        return {key: prefers for part in seen for key, prefers in part.items()}
