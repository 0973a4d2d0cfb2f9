"""The objectives: each declares its sides, whether it needs a reference, its loss and its metrics.

The trainer knows `Objective` alone. Nothing here needs torch until a loss is computed, so that a plan can ask.
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
    """Some trees under the policy being trained: N branches, tree by tree, and C comparisons between them."""

    trees: Sequence[Tree]
    logps: Tensor
    """[N], summed over a branch's scored tokens, in nats."""
    lengths: Tensor
    """[N], float, how many tokens are scored."""
    ref_logps: Tensor | None
    """[N], the same as `logps` under the reference; None where the objective needs none."""

    def sides(self) -> tuple[Tensor, Tensor]:
        """([C], [C]), int, the places in `logps` of each comparison's chosen and rejected branch."""
        import torch

        chosen, rejected, first = [], [], 0
        for tree in self.trees:
            chosen += [first + comparison.chosen for comparison in tree.comparisons]
            rejected += [first + comparison.rejected for comparison in tree.comparisons]
            first += len(tree.branches)
        device = self.logps.device
        return torch.tensor(chosen, device=device), torch.tensor(rejected, device=device)

    def targets(self) -> Tensor:
        """[C], what each comparison is fitted to."""
        import torch

        found = [comparison.target for tree in self.trees for comparison in tree.comparisons]
        return torch.tensor(found, device=self.logps.device)


class Watch:
    """What an objective follows over steps, beside its metrics. This one follows nothing.

    `note`, `state` are collective: call them on all ranks.
    """

    def see_reference(self, logps: Mapping[Key, Sequence[float]]) -> None:
        """The reference's log-probabilities of every tree's branches, before training."""

    def see(self, measured: Measured) -> None:
        """A forward pass on this rank."""

    def note(self) -> dict[str, float]:
        """Metrics of what was seen on all ranks since this was last asked."""
        return {}

    def state(self) -> Any:
        """What a checkpoint must hold, as JSON."""
        return None

    def restore(self, state: Any) -> None:
        """Resumes from `state`."""


@dataclass(frozen=True)
class Objective(ABC):
    """What training minimises. Picklable: every worker gets it."""

    sides: ClassVar[int]
    """Branches of a row that are computed: 2 for pairs, 1 for supervised targets."""
    needs_reference: ClassVar[bool]
    keys: ClassVar[tuple[str, ...]] = ()
    """Configuration keys that change it, beside the section `train`."""
    sums: ClassVar[tuple[str, ...]]
    """What is summed over a batch, for `metrics`."""

    @abstractmethod
    def losses(self, measured: Measured) -> tuple[Tensor, Tensor]:
        """([B], [len(sums)]): the losses of the trees, and the sums of their metrics, detached."""

    def weight(self, tree: Tree) -> float:
        """What a tree counts in its batch: the batch's loss is the sum of its losses by the sum of its weights."""
        return 1.0

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a batch from its sums over all workers; log-probabilities in nats."""

    def watch(self) -> Watch:
        return Watch()

    def for_trl(self) -> dict[str, Any] | None:
        """The arguments by which TRL's DPOTrainer trains the same (`train.engine: trl`); None where it cannot."""
        return None


@dataclass(frozen=True)
class DPO(Objective):
    """-log sigmoid(beta margin) (CALM, section 2.3), with a weighted `sft` term of the chosen side."""

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
        if type(self) is not DPO:  # the loss of a subclass is its own
            return None
        sft = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, self.sft_weight]} if self.sft_weight else {}
        return {"beta": self.beta, **sft}


@dataclass(frozen=True)
class SFT(Objective):
    """Negative log-likelihood of the scored tokens: of a pair its chosen side, of a dialogue the assistant's turns."""

    mean: Literal["row", "token"] = "row"
    """Over each row's tokens, then over rows; or over all tokens of a batch, as TRL's SFTTrainer has it."""

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
