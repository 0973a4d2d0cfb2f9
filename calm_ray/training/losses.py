"""Losses as pure functions of log-probabilities. All logps are sums over a completion's tokens, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dpo_losses(chosen_logps: Tensor, rejected_logps: Tensor, ref_margins: Tensor, *, beta: float) -> Tensor:
    """DPO loss per pair, all shapes [B] (CALM, section 2.3; Rafailov et al. 2023, Eq. 7).

    -log sigmoid(beta m), where m = (log p(chosen) - log p(rejected)) - (the same under the reference). If the policy
    equals the reference, m is 0 and the loss is ln 2.
    """
    margins = (chosen_logps - rejected_logps) - ref_margins
    return -F.logsigmoid(beta * margins)


def sft_losses(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's scored tokens, [B]; 0 for rows without any."""
    return -logps / lengths.clamp(min=1.0)


def summed(losses: Tensor, *columns: Tensor) -> Tensor:
    """[2 + columns], detached: the number of rows, the sum of the losses, and the sum of each column [B]."""
    return torch.stack([torch.ones_like(losses), losses, *columns]).detach().sum(dim=1)
