"""The objectives: pure functions of log-probabilities. All logps are sums over a completion's tokens, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dpo_losses(chosen_logps: Tensor, rejected_logps: Tensor, ref_margins: Tensor, *, beta: float) -> Tensor:
    """DPO, one loss for each pair, all shapes [B] (CALM, section 2.3; Rafailov et al. 2023, Eq. 7).

    With m = (log p(chosen) - log p(rejected)) - (the same under the reference): -log sigmoid(beta m). Where the policy
    is the reference, m is 0 and the loss ln 2.
    """
    margins = (chosen_logps - rejected_logps) - ref_margins
    return -F.logsigmoid(beta * margins)


def sft_losses(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood of each chosen side's tokens, shape [B]."""
    return -chosen_logps / chosen_lengths


def cosine_with_warmup(step: int, steps: int, warmup_share: float) -> float:
    """Factor of the learning rate at a step (from 0): rises linearly, then falls to 0 along half a cosine."""
    warmup = round(steps * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * progress))))
