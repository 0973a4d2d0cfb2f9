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
