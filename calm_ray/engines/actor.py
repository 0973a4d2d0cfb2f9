"""The engine actor: starts once for a run, takes every round's policy while it runs, reads questions, writes rows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray

from calm_ray.core.rows import Completion, Prediction, Scored, table
from calm_ray.engines.child_processes import Leash
from calm_ray.engines.completion import complete, predict, score, unanswered
from calm_ray.engines.generator import Decoding
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.engines.vllm import VLLMGenerator
from calm_ray.prompts.candidates import CandidateForm
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.run.policies import Policy

BEAT_SECONDS = 1.0


class EngineActor:
    """The actor. It reads questions and writes rows through the run's storage; what it returns are counts.

    Every call names the policy that it must be served by. An engine that has another one, since it was started again,
    takes that one first: a stale policy can never write.
    """

    def __init__(self, spec: EngineSpec, number: int = 0, pulse_name: str | None = None) -> None:
        self._generator: VLLMGenerator | None = None
        self._leash: Leash | None = None
        self._number = number
        self._pulse = ray.get_actor(pulse_name) if pulse_name is not None else None
        if self._pulse is not None:
            ray.get(self._pulse.started.remote(number, ray.get_runtime_context().get_node_id()))
            threading.Thread(target=self._beat, args=(self._pulse,), daemon=True).start()
            while ray.get(self._pulse.is_night.remote()):
                time.sleep(BEAT_SECONDS)
        self._generator = VLLMGenerator(spec)
        self._leash = Leash() if spec.engines.process == "child" else None

    def _beat(self, pulse: Any) -> None:
        while True:
            generator = self._generator
            if generator is None:
                pulse.beat.remote(self._number, 0, False, False)
            else:
                pulse.beat.remote(self._number, generator.steps, generator.is_at_work, generator.is_asleep)
            if self._leash is not None and not self._leash.all_alive:
                os._exit(1)  # vLLM may wait for its core for ever; Ray starts this process again
            time.sleep(BEAT_SECONDS)

    def ready(self) -> str:
        """The policy it runs, once it runs."""
        return self.generator.policy

    @property
    def generator(self) -> VLLMGenerator:
        assert self._generator is not None
        return self._generator

    def load(self, policy: Policy) -> str:
        """Takes a policy; returns its name."""
        self.generator.load(policy)
        return self.generator.policy

    def _begin(self, ticket: int, policy: Policy) -> None:
        if self._pulse is not None:
            ray.get(self._pulse.begins.remote(ticket, self._number))
        self.load(policy)

    def sleep(self) -> None:
        self.generator.sleep()

    def wake(self) -> None:
        self.generator.wake()

    def sample(self, task: ChunkTask, decoding: Decoding, **how: Any) -> dict[str, int]:
        """Writes the completions of one chunk of questions in one language."""
        self._begin(task.ticket, task.policy)
        rows = complete(self.generator, task.read(), decoding, **how)
        tokens = sum(len(row["token_ids"]) for row in rows)
        return _put(task, Completion, rows, tokens=tokens, unreadable=sum(row["answer"] is None for row in rows))

    def predict(self, task: ChunkTask, **how: Any) -> dict[str, int]:
        """Writes the greedy answers to one chunk of questions in one language."""
        self._begin(task.ticket, task.policy)
        rows = predict(self.generator, task.read(), **how)
        rows += [unanswered(question, task.policy.name) for question in task.left_out()]
        return _put(task, Prediction, rows, unreadable=sum(row["answer"] is None for row in rows))

    def score(self, task: ChunkTask, form: CandidateForm) -> dict[str, int]:
        """Writes how likely the policy finds the candidates of one chunk in one language."""
        self._begin(task.ticket, task.policy)
        rows = task.read()
        if form.settings.form != "samples":  # samples come as candidate sets
            rows = [form.of(question, self.generator.tokenizer) for question in rows]
        return _put(task, Scored, score(self.generator, rows, with_prompt=form.settings.score == "mean_full"))

    def write(self, messages: list[str], max_new_tokens: int, policy: Policy, ticket: int) -> list[str]:
        """The model's greedy reply to each message, for translators; nothing to one that is too long to be read."""
        self._begin(ticket, policy)
        prompts = [encode_prompt(self.generator.tokenizer, message) for message in messages]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < self.generator.context_tokens]
        greedy = Decoding(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens)
        replies = [""] * len(messages)
        generated = self.generator.generate([prompts[i] for i in fitting], greedy, [0] * len(fitting))
        for i, (one,) in zip(fitting, generated, strict=True):
            replies[i] = one.text
        return replies


def _put(task: ChunkTask, kind: type, rows: Sequence[Any], **counts: int) -> dict[str, int]:
    """Writes a task's rows, if it is not a trial and nobody else has done it meanwhile; returns their counts."""
    # An engine that was taken for dead while out of reach may come with its own rows later.
    if task.only is None and not task.output.has(task.name):
        task.output.write(task.name, table(kind, rows), counts=counts)
    return {"rows": len(rows), **counts}


Engine = ray.remote(EngineActor)
