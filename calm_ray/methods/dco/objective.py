"""The DCO objective: fits each language's margin to the margins of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calm_ray.training.objectives import Measured, Objective, Watch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DCO(Objective):
    """|beta margin - target|, with the target stored in each pair (Eq. 11 and 15). Neither side is preferred."""

    beta: float
    loss: Literal["absolute", "huber", "squared"] = "absolute"

    sides = 2
    needs_reference = True
    keys = ("dco.loss",)
    sums = ("rows", "loss", "margin", "distance")

    def losses(self, measured: Measured) -> tuple[Tensor, Tensor]:
        from calm_ray.training.losses import summed

        chosen, rejected = measured.sides()
        logps, ref_logps, targets = measured.logps, measured.ref_logps, measured.targets()
        assert ref_logps is not None
        margins = logps[chosen] - logps[rejected] - (ref_logps[chosen] - ref_logps[rejected])
        losses = dco_losses(margins, targets, beta=self.beta, kind=self.loss)
        change = logps - ref_logps
        return losses, summed(losses, change[chosen] - change[rejected], dco_losses(margins, targets, beta=self.beta))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {name: sums[name] / sums["rows"] for name in ("loss", "margin", "distance")}

    def watch(self) -> Watch:
        from calm_ray.methods.dco.agreement import Agreement

        return Agreement()


@dataclass(frozen=True)
class DCOOptions(Objective):
    """KL divergence of the policy's distribution over a row's branches from the optimal policy's.

    The optimal policy is known in closed form (Eq. 10 and 16), so that training needs no reference. The loss is 0 where
    the distributions are equal, which is where all of Eq. 15's margins reach their targets.
    """

    sides = None
    needs_reference = False
    keys = ("dco.fit",)
    sums = ("rows", "loss", "correct")

    def losses(self, measured: Measured) -> tuple[Tensor, Tensor]:
        import torch

        from calm_ray.training.losses import summed

        losses, matches = [], []
        for tree, logps in zip(measured.trees, measured.by_tree(), strict=True):
            assert tree.probabilities is not None
            wanted = logps.new_tensor(tree.probabilities)
            losses.append(option_loss(logps, wanted))
            matches.append(logps.argmax() == wanted.argmax())
        stacked = torch.stack(losses)
        return stacked, summed(stacked, torch.stack(matches).float())

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {name: sums[name] / sums["rows"] for name in ("loss", "correct")}


def option_loss(logps: Tensor, wanted: Tensor) -> Tensor:
    """Returns the KL divergence (nats) of softmax(`logps`) from `wanted`, over the last dimension; shapes [..., K]."""
    import torch
    from torch.nn import functional as F

    return F.kl_div(torch.log_softmax(logps, -1), wanted, reduction="none").sum(-1)


def dco_losses(margins: Tensor, targets: Tensor, *, beta: float, kind: str = "absolute") -> Tensor:
    """Returns |beta m - target| (DCO, Eq. 11), one loss per pair and language; all shapes [B].

    `margins` are m = (log p(chosen) - log p(rejected)) - (the same under the reference); `targets` are the reference's
    margins in the other languages, weighted by gamma. If the policy equals the reference, the loss is |target|. Summed
    over a pair's languages this is Eq. 11; `huber` (quadratic within 1 nat) and `squared` have the same minimum.
    """
    import torch
    from torch.nn import functional as F

    distances = beta * margins - targets
    if kind == "squared":
        return distances.square()
    zeros = torch.zeros_like(distances)
    return F.huber_loss(distances, zeros, reduction="none") if kind == "huber" else distances.abs()
