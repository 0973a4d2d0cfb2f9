"""What a step says of itself: sums over a batch's pairs, and means of them."""

from __future__ import annotations

import torch
from torch import Tensor

from calm_ray.config import Objective

SUMS = ("pairs", "loss", "tokens", "chosen_logps", "chosen_change", "rejected_change", "margin", "correct", "distance")
"""What is summed over a batch's pairs; log-probabilities in nats. `distance` is DCO's |beta margin - target|."""


def sums_of(
    losses: Tensor,
    chosen: Tensor,
    chosen_lengths: Tensor,
    rejected: Tensor | None = None,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    zeros = torch.zeros_like(chosen)
    chosen_change = chosen - ref_chosen if ref_chosen is not None else zeros
    rejected_change = rejected - ref_rejected if rejected is not None and ref_rejected is not None else zeros
    margin = chosen_change - rejected_change
    columns = [torch.ones_like(chosen), losses, chosen_lengths, chosen, chosen_change, rejected_change]
    columns += [margin, (margin > 0).float(), zeros if distances is None else distances]
    return torch.stack(columns).detach().sum(dim=1)


def means(sums: Tensor, scope: str, objective: Objective = "dpo") -> dict[str, float]:
    """Metrics of a batch from its sums: means over pairs, log-probabilities of the chosen side by token."""
    of = dict(zip(SUMS, sums.tolist(), strict=True))
    pairs, tokens = of["pairs"], of["tokens"]
    if objective == "dco":  # neither side is the better one
        names = ("loss", "margin", "distance")
        return {f"{scope}/{name}": of[name] / pairs for name in names}
    return {
        f"{scope}/loss": of["loss"] / pairs,
        f"{scope}/chosen_logp_per_token": of["chosen_logps"] / tokens,
        f"{scope}/chosen_change_per_token": of["chosen_change"] / tokens,
        f"{scope}/rejected_change": of["rejected_change"] / pairs,
        f"{scope}/margin": of["margin"] / pairs,
        f"{scope}/correct": of["correct"] / pairs,
    }
