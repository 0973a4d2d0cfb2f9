"""The learning rate's schedule."""

from __future__ import annotations

import torch


def learning_rate_factor(step: int, steps: int, warmup_share: float, schedule: str = "cosine") -> float:
    """Factor of the learning rate at a step (from 0): rises linearly, then falls to 0, straight or as half a cosine."""
    warmup = round(steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * progress))))
