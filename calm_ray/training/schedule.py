"""Learning rate schedule."""

from __future__ import annotations

import torch


def learning_rate_factor(step: int, steps: int, warmup_ratio: float, schedule: str = "cosine") -> float:
    """Learning rate factor at `step` (from 0): linear warmup, then linear or cosine decay to 0."""
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * progress))))
