"""The engine actor: one vLLM engine that stays up for the whole run and serves each round's policy."""

from __future__ import annotations

import os
import threading
import time
import traceback
from typing import Any

import ray
from ray.actor import method

from calm_ray.core.errors import CalmRayError
from calm_ray.engines.child_processes import ChildProcesses
from calm_ray.engines.requests import ChunkRequest, Counts, Write
from calm_ray.engines.spec import EngineSpec
from calm_ray.engines.tasks import ChunkTask
from calm_ray.engines.vllm import VLLMGenerator
from calm_ray.run.policies import Policy

HEARTBEAT_SECONDS = 1.0


class EngineActor:
    """Reads questions from the run's storage and writes rows back to it; `serve` returns only counts.

    Every request names its policy. If another one is loaded, for example after a restart, the actor loads the right one
    first, so a stale policy can never write.
    """

    def __init__(self, spec: EngineSpec, number: int = 0, heartbeats_name: str | None = None) -> None:
        self._generator: VLLMGenerator | None = None
        self._children: ChildProcesses | None = None
        self._number = number
        self._heartbeats = ray.get_actor(heartbeats_name) if heartbeats_name is not None else None
        if self._heartbeats is not None:
            ray.get(self._heartbeats.started.remote(number, ray.get_runtime_context().get_node_id()))
            threading.Thread(target=self._beat, args=(self._heartbeats,), daemon=True).start()
            while ray.get(self._heartbeats.is_paused.remote()):
                time.sleep(HEARTBEAT_SECONDS)
        self._generator = VLLMGenerator(spec)
        self._children = ChildProcesses() if spec.engines.process == "child" else None

    def _beat(self, heartbeats: Any) -> None:
        while True:
            generator = self._generator
            if generator is None:
                heartbeats.beat.remote(self._number, 0, False, False)
            else:
                heartbeats.beat.remote(self._number, generator.steps, generator.is_at_work, generator.is_asleep)
            if self._children is not None and not self._children.all_alive:
                os._exit(1)  # vLLM may wait for its dead core forever; exit so that Ray restarts the actor
            time.sleep(HEARTBEAT_SECONDS)

    @method
    def ready(self) -> str:
        """Returns the name of the loaded policy once the engine is up."""
        return self.generator.policy

    @property
    def generator(self) -> VLLMGenerator:
        assert self._generator is not None
        return self._generator

    @method
    def load(self, policy: Policy) -> str:
        """Loads a policy; returns its name."""
        self.generator.load(policy)
        return self.generator.policy

    def _begin(self, ticket: int, policy: Policy) -> None:
        if self._heartbeats is not None:
            ray.get(self._heartbeats.begins.remote(ticket, self._number))
        self.generator.load(policy)

    @method
    def sleep(self) -> None:
        self.generator.sleep()

    @method
    def wake(self) -> None:
        self.generator.wake()

    @method
    def serve(self, task: ChunkTask, request: ChunkRequest[Any, Any]) -> Counts:
        """Serves a request for one language of one chunk and writes its rows; returns their counts.

        Raises CalmRayError for a bug in the request's own code, which another engine would not fix.
        """
        self._begin(task.ticket, task.policy)
        rows, skipped = task.read(), task.skipped()
        try:
            served = request.serve(self.generator, rows, skipped)
        except Exception as error:
            if _comes_from_generator(error):
                raise
            kind = type(request).__name__
            raise CalmRayError(f"the request {kind} failed: {type(error).__name__}: {error}") from error
        return task.write(served)

    @method
    def write(self, request: Write, policy: Policy, ticket: int) -> list[str]:
        """Returns the policy's reply to each message."""
        self._begin(ticket, policy)
        return request.serve(self.generator)


def _comes_from_generator(error: Exception) -> bool:
    """Whether the generator was running, in which case a prompt may be the cause."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == VLLMGenerator.__module__ for frame, _ in frames)


Engine = ray.remote(EngineActor)
