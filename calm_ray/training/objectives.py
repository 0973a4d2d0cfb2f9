"""Training objectives: each declares its sides, whether it needs a reference, its loss and its metrics.

The trainer only knows `Objective`. Nothing here imports torch until a loss is computed, so that planning can use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from calm_ray.training.trees import Key, Tree


@dataclass(frozen=True)
class Measured:
    """Trees scored by the policy being trained: N branches, in tree order, and C comparisons between them."""

    trees: Sequence[Tree]
    logps: Tensor
    """[N], summed over a branch's scored tokens, in nats."""
    lengths: Tensor
    """[N], float, number of scored tokens."""
    ref_logps: Tensor | None
    """[N], `logps` under the reference; None if the objective needs none."""

    def sides(self) -> tuple[Tensor, Tensor]:
        """([C], [C]), int: indices into `logps` of each comparison's chosen and rejected branch."""
        import torch

        chosen, rejected, first = [], [], 0
        for tree in self.trees:
            chosen += [first + comparison.chosen for comparison in tree.comparisons]
            rejected += [first + comparison.rejected for comparison in tree.comparisons]
            first += len(tree.branches)
        device = self.logps.device
        return torch.tensor(chosen, device=device), torch.tensor(rejected, device=device)

    def by_tree(self) -> Sequence[Tensor]:
        """`logps` of each tree's branches."""
        return self.logps.split([len(tree.branches) for tree in self.trees])

    def targets(self) -> Tensor:
        """[C], target of each comparison."""
        import torch

        found = [comparison.target for tree in self.trees for comparison in tree.comparisons]
        return torch.tensor(found, device=self.logps.device)


class Watch:
    """What an objective tracks across steps, besides its metrics. This one tracks nothing.

    `note` and `state` are collective: call them on all ranks.
    """

    def observe_reference(self, logps: Mapping[Key, Sequence[float]]) -> None:
        """Called before training with the reference log-probabilities of every tree's branches."""

    def see(self, measured: Measured) -> None:
        """Called after every forward pass on this rank."""

    def note(self) -> dict[str, float]:
        """Metrics over all ranks since the last call."""
        return {}

    def state(self) -> Any:
        """JSON state to store in a checkpoint."""
        return None

    def restore(self, state: Any) -> None:
        """Restores `state` from a checkpoint."""


@dataclass(frozen=True)
class Objective(ABC):
    """What training minimizes. Picklable, since every worker gets a copy."""

    sides: ClassVar[int | None]
    """Branches computed per row: 2 for pairs, 1 for supervised targets, None for all that a row has."""
    needs_reference: ClassVar[bool]
    keys: ClassVar[tuple[str, ...]] = ()
    """Configuration keys that affect it, besides the `train` section."""
    sums: ClassVar[tuple[str, ...]]
    """Names of the sums over a batch that `metrics` takes."""

    @abstractmethod
    def losses(self, measured: Measured) -> tuple[Tensor, Tensor]:
        """([B], [len(sums)]): loss of each tree, and the sums for `metrics`, detached."""

    def weight(self, tree: Tree) -> float:
        """Weight of a tree: the batch loss is the sum of losses divided by the sum of weights."""
        return 1.0

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a batch, from its sums over all workers; log-probabilities in nats."""

    def watch(self) -> Watch:
        return Watch()

    def for_trl(self) -> dict[str, Any] | None:
        """DPOConfig arguments for the same objective in TRL (`train.engine: trl`); None if it has no equivalent."""
        return None


@dataclass(frozen=True)
class DPO(Objective):
    """-log sigmoid(beta margin) (CALM, section 2.3), plus a weighted `sft` term on the chosen side."""

    beta: float
    sft_weight: float = 0.0

    sides = 2
    needs_reference = True
    sums = ("rows", "loss", "tokens", "chosen_logps", "chosen_change", "rejected_change", "margin", "correct")

    def losses(self, measured: Measured) -> tuple[Tensor, Tensor]:
        from calm_ray.training.losses import dpo_losses, sft_losses, summed

        chosen, rejected = measured.sides()
        logps, ref_logps, lengths = measured.logps, measured.ref_logps, measured.lengths[chosen]
        assert ref_logps is not None
        ref_margins = ref_logps[chosen] - ref_logps[rejected]
        losses = dpo_losses(logps[chosen], logps[rejected], ref_margins, beta=self.beta)
        if self.sft_weight:
            losses = losses + self.sft_weight * sft_losses(logps[chosen], lengths)
        change = logps - ref_logps
        margins = change[chosen] - change[rejected]
        columns = [losses, lengths, logps[chosen], change[chosen], change[rejected], margins, (margins > 0).float()]
        return losses, summed(*columns)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        rows, tokens = sums["rows"], sums["tokens"]
        return {
            "loss": sums["loss"] / rows,
            "chosen_logp_per_token": sums["chosen_logps"] / tokens,
            "chosen_change_per_token": sums["chosen_change"] / tokens,
            "rejected_change": sums["rejected_change"] / rows,
            "margin": sums["margin"] / rows,
            "correct": sums["correct"] / rows,
        }

    def for_trl(self) -> dict[str, Any] | None:
        if type(self) is not DPO:  # subclasses have other losses
            return None
        sft = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, self.sft_weight]} if self.sft_weight else {}
        return {"beta": self.beta, **sft}


@dataclass(frozen=True)
class SFT(Objective):
    """Negative log-likelihood of the scored tokens: a pair's chosen side, or a dialogue's assistant turns."""

    mean: Literal["row", "token"] = "row"
    """`row`: over each row's tokens, then over rows. `token`: over all tokens of a batch, as in TRL's SFTTrainer."""

    sides = 1
    needs_reference = False
    sums = ("rows", "loss", "weight", "tokens", "logps")

    def losses(self, measured: Measured) -> tuple[Tensor, Tensor]:
        from calm_ray.training.losses import sft_losses, summed

        logps, lengths = measured.logps, measured.lengths
        losses = sft_losses(logps, lengths) if self.mean == "row" else -logps
        weights = losses.new_tensor([self.weight(tree) for tree in measured.trees])
        return losses, summed(losses, weights, lengths, logps)

    def weight(self, tree: Tree) -> float:
        return 1.0 if self.mean == "row" else float(tree.branches[0].scored_tokens)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["weight"], "chosen_logp_per_token": sums["logps"] / sums["tokens"]}
