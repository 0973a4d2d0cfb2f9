"""The training loop: one function, run by every Ray Train worker, on a laptop's cores and on A100 nodes alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from calm_ray.config import Objective
from calm_ray.core.rows import Margin, Pair, rows_of
from calm_ray.core.sections import Train
from calm_ray.run.policies import Policy, RunModel, publish
from calm_ray.run.stage import Stage
from calm_ray.training import checkpoint
from calm_ray.training.agreement import Agreement
from calm_ray.training.batches import Example, Key, epoch_order, example_of, is_validation, pack, worker_packs
from calm_ray.training.checkpoint import Position
from calm_ray.training.checkpoint_triggers import PreemptedNodes, PreemptionNotices, Timer, none_preempted
from calm_ray.training.model import PolicyModel
from calm_ray.training.objectives import dco_losses, dpo_losses, learning_rate_factor, sft_losses
from calm_ray.training.reference import Portion, margins_of, margins_once
from calm_ray.training.step_metrics import SUMS, means, sums_of


@dataclass(frozen=True)
class TrainJob:
    """One round's training. Picklable; sent to every worker."""

    pairs: Stage
    output: Stage
    model: RunModel
    start: Policy
    """What the round starts from."""
    reference: Policy
    train: Train
    objective: Objective
    seed: int
    round_number: int
    dco_loss: Literal["absolute", "huber", "squared"] = "absolute"
    checkpoint_seconds: float = math.inf
    """The longest time between two checkpoints, but for one step."""

    @property
    def chosen_only(self) -> bool:
        return self.objective == "sft"

    @property
    def kind(self) -> Literal["adapter", "weights"]:
        return "adapter" if self.train.lora is not None else "weights"


Report = Callable[[dict[str, Any]], None]
"""Takes a step's metrics; called on the first worker only."""


def train_policy(
    job: TrainJob, device: torch.device, report: Report, doomed: PreemptedNodes = none_preempted
) -> Policy:
    """Trains one round and writes its margins, metrics and policy. Called by every worker of the process group.

    Goes on from the newest whole checkpoint that an earlier attempt left, with any number of workers; writes one every
    `train.checkpoint_steps` steps, after each epoch, when another machine is doomed, and when there was none for more
    than `job.checkpoint_seconds`.
    """
    training, validation, too_long = read_examples(job)
    policy_model = PolicyModel(job.model.local_folder(), job.train, device)
    trainer = Trainer(job, policy_model, report, doomed)
    trainer.margins = trainer.reference_margins(training + validation)
    policy_model.load(job.start, job.seed)
    trainer.fit(training, validation, too_long)
    with checkpoint.scratch_folder(job.output.storage) as scratch:
        folder = scratch / "policy"
        policy_model.save(folder)
        found: list[Policy | None] = [None]
        if dist.get_rank() == 0:
            found = [publish(folder, job.output.storage, "policy", job.round_number, job.kind)]
            job.output.storage.write_json("metrics.json", trainer.metrics)
        dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def read_examples(job: TrainJob) -> tuple[list[Example], list[Example], int]:
    """The training and the validation examples, in the same order on every worker, and how many were too long."""
    columns = ["question_id", "language", "pair", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
    if job.objective == "dco":
        columns.append("target_margin")
    rows: list[Pair] = rows_of(job.pairs.read(columns))
    examples = [example_of(row) for row in rows]
    fitting = [example for example in examples if example.longest <= job.train.max_pair_tokens]
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in fitting:
        parts[is_validation(example.question_id, job.train.validation_share, job.seed)].append(example)
    # Too few questions to spare any, or all of them drawn: train on what there is.
    training, validation = parts if parts[0] else (parts[1], [])
    return training, validation, len(examples) - len(fitting)


class Trainer:
    """The state of one round's training on one worker."""

    def __init__(
        self, job: TrainJob, policy_model: PolicyModel, report: Report, doomed: PreemptedNodes = none_preempted
    ) -> None:
        self.job = job
        self.policy_model = policy_model
        self.report = report
        self.notices = PreemptionNotices(doomed)
        self.timer = Timer(job.checkpoint_seconds, policy_model.device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.margins: dict[Key, Margin] = {}
        self.preferred = Agreement() if job.objective == "dco" else None
        self.metrics: list[dict[str, Any]] = []
        self._saved_step = 0

    def packs(self, examples: Sequence[Example]) -> list[list[Example]]:
        """This worker's packs of some examples; the same number on every worker."""
        sizes = [example.tokens(self.job.chosen_only) for example in examples]
        packs = worker_packs(sizes, self.rank, self.world, self.job.train.pack_tokens)
        return [[examples[i] for i in pack] for pack in packs]

    def fit(self, training: list[Example], validation: list[Example], too_long: int) -> None:
        """Trains from the newest whole checkpoint, or from the start, to the end."""
        train = self.job.train
        optimizer = torch.optim.AdamW(
            self.policy_model.trainable(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
        batches = -(-len(training) // train.batch_pairs)
        steps = batches * train.epochs
        start = self.go_on(optimizer, len(training))
        if start is None:
            start = Position()
            self.note(steps=steps, pairs=len(training), validation_pairs=len(validation), too_long_pairs=too_long)
            self.note_same_preference("reference", step=0)
        step = start.step
        for epoch in range(start.epoch, train.epochs):
            order = epoch_order(len(training), self.job.seed, epoch)
            for batch in range(start.batches if epoch == start.epoch else 0, batches):
                first = batch * train.batch_pairs
                pairs = [training[i] for i in order[first : first + train.batch_pairs]]
                factor = learning_rate_factor(step, steps, train.warmup_share, train.schedule)
                measured = self.step(optimizer, pairs, train.learning_rate * factor)
                step += 1
                self.note(step=step, epoch=epoch, **measured)
                is_noticed, is_due = self.notices.is_new(), self.timer.is_due()
                if is_noticed or is_due or step % train.checkpoint_steps == 0:
                    self.save(optimizer, Position(step, epoch, batch + 1), len(training))
                if is_noticed:
                    self.tell(noticed=step)
            self.note_same_preference("train", step=step, epoch=epoch)
            if validation:
                self.note(step=step, epoch=epoch, **means(self.evaluate(validation), "validation", self.job.objective))
                self.note_same_preference("validation", step=step, epoch=epoch)
            if self._saved_step != step:
                self.save(optimizer, Position(step, epoch + 1), len(training))

    def step(self, optimizer: torch.optim.Optimizer, pairs: list[Example], learning_rate: float) -> dict[str, float]:
        """One step of the optimiser; returns its metrics."""
        started = time.monotonic()
        (group,) = optimizer.param_groups
        group["lr"] = learning_rate
        sums = self.forward_backward(pairs)
        norm = torch.nn.utils.clip_grad_norm_(group["params"], self.job.train.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {
            "grad_norm": float(norm), "learning_rate": learning_rate, "seconds": time.monotonic() - started,
            **means(sums, "train", self.job.objective),
        }  # fmt: skip

    def save(self, optimizer: torch.optim.Optimizer, position: Position, examples: int) -> None:
        """Writes a checkpoint."""
        parameters = self.policy_model.named_trainable()
        state = {
            "position": asdict(position),
            "seed": self.job.seed,
            "examples": examples,
            "preferred": self.preferred.as_json() if self.preferred is not None else None,
            "metrics": self.metrics,
        }
        checkpoint.save(self.job.output.storage, position.step, parameters, optimizer, state)
        self._saved_step = position.step
        self.timer.start()

    def go_on(self, optimizer: torch.optim.Optimizer, examples: int) -> Position | None:
        """Takes up the newest whole checkpoint, if there is one of these examples and this seed.

        The first worker reports all metrics so far, and then the step that training goes on from (`resumed`).
        """
        found = checkpoint.newest_whole(self.job.output.storage)
        if found is None or (found.state["seed"], found.state["examples"]) != (self.job.seed, examples):
            return None
        found.restore(self.policy_model.named_trainable(), optimizer)
        if self.preferred is not None:
            self.preferred.take_up(found.state["preferred"])
        self._saved_step = found.step
        if self.rank == 0:
            self.metrics = found.state["metrics"]
            for line in self.metrics:
                self.report(line)
        self.tell(resumed=found.step)
        return Position(**found.state["position"])

    def tell(self, **row: Any) -> None:
        """Reports what happened; unlike metrics it is not kept."""
        if self.rank == 0:
            self.report({"round": self.job.round_number, **row})

    def note(self, **row: Any) -> None:
        """Keeps a line of metrics; the first worker reports it."""
        if self.rank == 0:
            line = {"round": self.job.round_number, **row}
            self.metrics.append(line)
            self.report(line)

    def note_same_preference(self, scope: str, **row: Any) -> None:
        """With DCO: on how many pairs the languages agree, of those seen since this was last noted."""
        share = self.preferred.same_share() if self.preferred is not None else None
        if share is not None:
            self.note(**row, **{f"{scope}/same_preference": share})

    def forward_backward(self, batch: Sequence[Example]) -> Tensor:
        """Adds the gradient of the batch's mean loss; returns the batch's sums over all workers (see `SUMS`)."""
        total = torch.zeros(len(SUMS), device=self.policy_model.device)
        for examples in self.packs(batch):
            losses, sums = self.losses(examples or [batch[0]])
            weight = 1.0 if examples else 0.0
            # FSDP averages gradients over the workers; the batch's mean is over its pairs, wherever they were computed.
            (losses.sum() * weight * self.world / len(batch)).backward()
            total += sums * weight
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> Tensor:
        total = torch.zeros(len(SUMS), device=self.policy_model.device)
        for part in self.packs(examples):
            _, sums = self.losses(part or [examples[0]])
            total += sums * (1.0 if part else 0.0)
        dist.all_reduce(total)
        return total

    def losses(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Each example's loss, [B], and the sums of its metrics."""
        job, device = self.job, self.policy_model.device
        batch = pack(examples, job.chosen_only).to(device)
        logps = self.policy_model.logps(batch)
        if job.chosen_only:
            losses = sft_losses(logps, batch.completion_lengths)
            return losses, sums_of(losses, logps, batch.completion_lengths)
        chosen, rejected = logps[0::2], logps[1::2]
        rows = [self.margins[example.key] for example in examples]
        ref_chosen = torch.tensor([row["ref_chosen_logps"] for row in rows], device=device)
        ref_rejected = torch.tensor([row["ref_rejected_logps"] for row in rows], device=device)
        ref_margins = ref_chosen - ref_rejected
        chosen_lengths = batch.completion_lengths[0::2]
        distances = None
        if job.objective == "dco":
            targets = torch.tensor([example.target for example in examples], device=device)
            margins = chosen - rejected - ref_margins
            losses = dco_losses(margins, targets, beta=job.train.beta, kind=job.dco_loss)
            distances = dco_losses(margins, targets, beta=job.train.beta)
            assert self.preferred is not None
            self.preferred.see(examples, chosen > rejected)
        else:
            losses = dpo_losses(chosen, rejected, ref_margins, beta=job.train.beta)
        if job.train.sft_weight:
            losses = losses + job.train.sft_weight * sft_losses(chosen, chosen_lengths)
        return losses, sums_of(losses, chosen, chosen_lengths, rejected, ref_chosen, ref_rejected, distances)

    def reference_margins(self, examples: Sequence[Example]) -> dict[Key, Margin]:
        """The reference's log-probabilities of every pair, known to every worker."""
        if self.job.chosen_only:
            return {}
        margins = margins_once(self.job.output, self.job.reference, examples, self._own_margins)
        if self.preferred is not None:
            self.preferred.see_reference(margins)
        return margins

    @torch.no_grad()
    def _own_margins(self, portions: Sequence[Portion]) -> Iterator[list[Margin]]:
        """This worker's share of each portion's margins."""
        self.policy_model.load(self.job.reference, self.job.seed)
        with self.policy_model.without_adapter() if self.job.reference.kind == "base" else nullcontext():
            for examples in portions:
                rows: list[Margin] = []
                for part in self.packs(examples):
                    batch = pack(part or [examples[0]], chosen_only=False).to(self.policy_model.device)
                    rows += margins_of(part, self.policy_model.logps(batch), self.job.reference)
                yield rows
