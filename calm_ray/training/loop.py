"""The training loop: one function that runs on every Ray Train worker, from laptop cores to A100 nodes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from calm_ray.core.rows import ReferenceLogps
from calm_ray.run.policies import Policy, publish
from calm_ray.training import checkpoint
from calm_ray.training.batches import epoch_order, is_validation, worker_packs
from calm_ray.training.checkpoint import Position
from calm_ray.training.checkpoint_triggers import PreemptedNodes, PreemptionNotices, Timer, no_preemptions
from calm_ray.training.job import TrainJob
from calm_ray.training.model import PolicyModel
from calm_ray.training.objectives import Measured
from calm_ray.training.reference import Logps, Portion, reference_once, rows_of_batch
from calm_ray.training.reports import NOTICED, REFERENCE, RESUMED, Report, Row
from calm_ray.training.schedule import learning_rate_factor
from calm_ray.training.trees import Tree, read_trees

TRAINING, VALIDATION = "train", "validation"
"""Prefixes of metric names."""
PROGRESS_SECONDS = 1.0
"""How often the progress of reference log-probabilities is reported."""


def train_policy(
    job: TrainJob, device: torch.device, report: Report, preempted: PreemptedNodes = no_preemptions
) -> Policy:
    """Trains one round and writes its reference log-probabilities, metrics and policy. Collective: call on all ranks.

    Resumes from the newest valid checkpoint of an earlier attempt, with any number of workers. Writes one every
    `train.checkpoint_steps` steps, after each epoch, when another node is about to be preempted, and
    `job.checkpoint_seconds` after the last one.
    """
    training, validation, too_long = read_examples(job)
    policy_model = PolicyModel(job.model.local_folder(), job.train, device)
    trainer = Trainer(job, policy_model, report, preempted)
    trainer.ref_logps = trainer.reference_logps(training + validation)
    policy_model.load(job.start, job.seed)
    trainer.fit(training, validation, too_long)
    with checkpoint.scratch_folder(job.output.storage) as scratch:
        folder = scratch / "policy"
        policy_model.save(folder)
        published: list[Policy | None] = [None]
        if dist.get_rank() == 0:
            published = [publish(folder, job.output.storage, "policy", job.round_number, job.kind)]
            job.output.storage.write_json("metrics.json", trainer.metrics)
        dist.broadcast_object_list(published)
    assert published[0] is not None
    return published[0]


def read_examples(job: TrainJob) -> tuple[list[Tree], list[Tree], int]:
    """Training and validation examples, in the same order on every worker, and how many were dropped as too long.

    Pairs are dropped by their longer side even if the objective ignores it, so that baselines train on the same pairs.
    """
    trees = read_trees(job.examples)
    fitting = [tree for tree in trees if tree.longest <= job.train.max_pair_tokens]
    parts: tuple[list[Tree], list[Tree]] = ([], [])
    for tree in fitting:
        kept = tree.first(job.objective.sides)
        parts[is_validation(tree.question_id, job.train.validation_fraction, job.seed)].append(kept)
    # If every question was drawn for validation, train on those.
    training, validation = parts if parts[0] else (parts[1], [])
    return training, validation, len(trees) - len(fitting)


class Trainer:
    """One worker's state in one round of training."""

    def __init__(
        self, job: TrainJob, policy_model: PolicyModel, report: Report, preempted: PreemptedNodes = no_preemptions
    ) -> None:
        self.job = job
        self.policy_model = policy_model
        self.report = report
        self.notices = PreemptionNotices(preempted)
        self.timer = Timer(job.checkpoint_seconds, policy_model.device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.ref_logps: Logps = {}
        self.watch = job.objective.watch()
        self.metrics: list[dict[str, Any]] = []
        self._saved_step = 0

    def packs(self, examples: Sequence[Tree]) -> list[list[Tree]]:
        """This worker's packs of `examples`; the same number on every worker."""
        sizes = [self.policy_model.tokens(example) for example in examples]
        packs = worker_packs(sizes, self.rank, self.world, self.job.train.pack_tokens)
        return [[examples[i] for i in pack] for pack in packs]

    def fit(self, training: list[Tree], validation: list[Tree], too_long: int) -> None:
        """Trains to the end, from the newest valid checkpoint if there is one."""
        train = self.job.train
        optimizer = torch.optim.AdamW(
            self.policy_model.trainable(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
        batches = -(-len(training) // train.batch_pairs)
        steps = batches * train.epochs
        start = self.resume(optimizer, len(training))
        if start is None:
            start = Position()
            self.note(steps=steps, pairs=len(training), validation_pairs=len(validation), too_long_pairs=too_long)
            self.record_watch("reference", step=0)
        step = start.step
        for epoch in range(start.epoch, train.epochs):
            order = epoch_order(len(training), self.job.seed, epoch)
            for batch in range(start.batches if epoch == start.epoch else 0, batches):
                first = batch * train.batch_pairs
                trees = [training[i] for i in order[first : first + train.batch_pairs]]
                factor = learning_rate_factor(step, steps, train.warmup_ratio, train.schedule)
                measured = self.step(optimizer, trees, train.learning_rate * factor)
                step += 1
                self.note(step=step, epoch=epoch, **measured)
                is_preempted, is_due = self.notices.is_new(), self.timer.is_due()
                if is_preempted or is_due or step % train.checkpoint_steps == 0:
                    self.save(optimizer, Position(step, epoch, batch + 1), len(training))
                if is_preempted:
                    self.report_event({NOTICED: step})
            self.record_watch(TRAINING, step=step, epoch=epoch)
            if validation:
                self.note(step=step, epoch=epoch, **self.metrics_of(self.evaluate(validation), VALIDATION))
                self.record_watch(VALIDATION, step=step, epoch=epoch)
            if self._saved_step != step:
                self.save(optimizer, Position(step, epoch + 1), len(training))

    def step(self, optimizer: torch.optim.Optimizer, trees: list[Tree], learning_rate: float) -> dict[str, float]:
        """Takes one optimizer step and returns its metrics."""
        started = time.monotonic()
        (group,) = optimizer.param_groups
        group["lr"] = learning_rate
        sums = self.forward_backward(trees)
        norm = torch.nn.utils.clip_grad_norm_(group["params"], self.job.train.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {
            "grad_norm": float(norm), "learning_rate": learning_rate, "seconds": time.monotonic() - started,
            **self.metrics_of(sums, TRAINING),
        }  # fmt: skip

    def save(self, optimizer: torch.optim.Optimizer, position: Position, examples: int) -> None:
        parameters = self.policy_model.named_trainable()
        state = {
            "position": asdict(position),
            "seed": self.job.seed,
            "examples": examples,
            "watch": self.watch.state(),
            "metrics": self.metrics,
        }
        checkpoint.save(self.job.output.storage, position.step, parameters, optimizer, state)
        self._saved_step = position.step
        self.timer.start()

    def resume(self, optimizer: torch.optim.Optimizer, examples: int) -> Position | None:
        """Restores the newest valid checkpoint if its seed and number of examples match; returns its position.

        Rank 0 reports all metrics so far, then the step that training resumes from (`resumed`).
        """
        found = checkpoint.newest_valid(self.job.output.storage)
        if found is None or (found.state["seed"], found.state["examples"]) != (self.job.seed, examples):
            return None
        found.restore(self.policy_model.named_trainable(), optimizer)
        self.watch.restore(found.state["watch"])
        self._saved_step = found.step
        if self.rank == 0:
            self.metrics = found.state["metrics"]
            for line in self.metrics:
                self.report(line)
        self.report_event({RESUMED: found.step})
        return Position(**found.state["position"])

    def report_event(self, row: Row) -> None:
        """Reports an event on rank 0. Unlike metrics, events are not stored."""
        if self.rank == 0:
            self.report({"round": self.job.round_number, **row})

    def note(self, **row: Any) -> None:
        """Stores and reports a row of metrics on rank 0."""
        if self.rank == 0:
            line = {"round": self.job.round_number, **row}
            self.metrics.append(line)
            self.report(line)

    def record_watch(self, scope: str, **row: Any) -> None:
        """Notes what the objective's watch has seen since the last call."""
        if seen := self.watch.note():
            self.note(**row, **{f"{scope}/{name}": value for name, value in seen.items()})

    def metrics_of(self, sums: Tensor, scope: str) -> dict[str, float]:
        """The objective's metrics for a batch, from its sums over all workers."""
        objective = self.job.objective
        found = objective.metrics(dict(zip(objective.sums, sums.tolist(), strict=True)))
        return {f"{scope}/{name}": value for name, value in found.items()}

    def forward_backward(self, batch: Sequence[Tree]) -> Tensor:
        """Backpropagates the batch's mean loss; returns its sums over all workers (`Objective.sums`)."""
        objective = self.job.objective
        total = torch.zeros(len(objective.sums), device=self.policy_model.device)
        total_weight = sum(objective.weight(tree) for tree in batch)
        for trees in self.packs(batch):
            losses, sums = self.losses(trees or [batch[0]])
            counts = 1.0 if trees else 0.0
            # FSDP averages gradients over workers, but the batch mean is over trees, wherever they are computed.
            (losses.sum() * counts * self.world / total_weight).backward()
            total += sums * counts
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def evaluate(self, trees: Sequence[Tree]) -> Tensor:
        total = torch.zeros(len(self.job.objective.sums), device=self.policy_model.device)
        for part in self.packs(trees):
            _, sums = self.losses(part or [trees[0]])
            total += sums * (1.0 if part else 0.0)
        dist.all_reduce(total)
        return total

    def losses(self, trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
        """Loss of each tree, [B], and the sums for their metrics."""
        objective, device = self.job.objective, self.policy_model.device
        batch = self.policy_model.pack(trees)
        ref_logps = None
        if self.ref_logps:
            known = [value for tree in trees for value in self.ref_logps[tree.key]]
            ref_logps = torch.tensor(known, device=device)
        measured = Measured(trees, self.policy_model.logps(batch), batch.completion_lengths, ref_logps)
        self.watch.see(measured)
        return objective.losses(measured)

    def reference_logps(self, trees: Sequence[Tree]) -> Logps:
        """Reference log-probabilities of every tree, on every worker; empty if the objective needs none."""
        if not self.job.objective.needs_reference:
            return {}
        logps = reference_once(self.job.output, self.job.reference, trees, self._own_logps)
        self.watch.observe_reference(logps)
        return logps

    @torch.no_grad()
    def _own_logps(self, portions: Sequence[Portion]) -> Iterator[list[ReferenceLogps]]:
        """Computes this worker's share of each portion's log-probabilities."""
        self.policy_model.load(self.job.reference, self.job.seed)
        total, done, last = sum(map(len, portions)), 0, time.monotonic()
        self.report_event({REFERENCE: 0, "total": total})
        with self.policy_model.without_adapter() if self.job.reference.kind == "base" else nullcontext():
            for trees in portions:
                rows: list[ReferenceLogps] = []
                for part in self.packs(trees):
                    batch = self.policy_model.pack(part or [trees[0]])
                    rows += rows_of_batch(part, self.policy_model.logps(batch), self.job.reference)
                    if time.monotonic() - last > PROGRESS_SECONDS:
                        last = time.monotonic()
                        self.report_event({REFERENCE: min(done + len(rows) * self.world, total), "total": total})
                done += len(trees)
                yield rows
        self.report_event({REFERENCE: total, "total": total})
