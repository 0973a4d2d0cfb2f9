"""The settings that all methods share, and checks across their sections."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.safety import path_problem, refuse_secrets
from calm_ray.core.sections import (
    DEMOS,
    RUN_NAME,
    WORLD,
    Candidates,
    Engines,
    Questions,
    Sampling,
    Section,
    Seed,
    Train,
    World,
    unknown_name,
)


class RunSettings(Section):
    """The settings of a run, except its method and the method's own section."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=128)]
    """Name of the run; its files are in `storage`/`name`."""
    storage: str = Field(default_factory=lambda: os.environ.get("CALM_RAY_STORAGE", "~/calm_ray/runs"), min_length=1)
    """Absolute path or URI that every node of the cluster can access."""
    seed: Seed = 0
    """Seed of everything random in the run."""
    rounds: Annotated[int, Field(ge=0, le=10_000)] = 1
    """Rounds of sampling, preferences and training. 0 only scores candidates and reports the optimal policy."""
    languages: Annotated[list[str], Field(min_length=1)]
    """Language codes, such as [en, fr, zh]."""
    model: str = WORLD
    """The folder or hub name of a Hugging Face model, or `world` for the demo."""
    device: Literal["cpu", "gpu"] = "gpu"
    """What engines and training workers run on."""
    init_from: str | None = None
    """An earlier run whose last policy round 1 starts from: a name in `storage`, a folder or a URI."""
    world: World = World()
    questions: Questions = Questions()
    sampling: Sampling = Sampling()
    engines: Engines
    placement: Literal["split", "colocate"] = "split"
    """Whether engines and training workers use separate GPUs (`split`) or share them (`colocate`). In the latter case,
    engines sleep during training."""
    candidates: Candidates | None = None
    """If set, policies are evaluated by their most likely candidate, and RankC can be measured."""
    train: Train

    @property
    def evaluation_languages(self) -> list[str]:
        """Languages of the held-out questions."""
        return self.questions.evaluate_languages or self.languages

    @property
    def samples_candidates(self) -> bool:
        """Whether candidates are sampled from the policy, so that there are none before round 1."""
        return self.candidates is not None and self.candidates.form == "samples"

    @model_validator(mode="after")
    def _check_locations(self) -> RunSettings:
        questions = self.questions
        locations = {"storage": self.storage, "model": self.model, "init_from": self.init_from}
        locations |= {f"questions.{name}": getattr(questions, name) for name in ("align", "evaluate", "translate")}
        for field, location in locations.items():
            refuse_secrets(location, field)  # again, as storage may come from the environment
            if location is not None and (problem := path_problem(location)):
                raise ValueError(f"{field}: {problem}")
        if self.init_from is not None and "/" not in self.init_from and not re.search(RUN_NAME, self.init_from):
            raise ValueError(f"init_from: {self.init_from!r} is neither the name of a run nor a folder or URI")
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> RunSettings:
        for field, codes in (
            ("languages", self.languages),
            ("questions.evaluate_languages", self.evaluation_languages),
        ):
            if unknown := [code for code in codes if code not in LANGUAGES]:
                raise ValueError(f"{field}: {unknown_name(unknown[0], list(LANGUAGES))}")
            if len(set(codes)) < len(codes):
                raise ValueError(f"{field}: contains a language twice")
        if self.train.lora is None and self.engines.refresh == "adapter":
            raise ValueError("engines.refresh: full fine-tuning (train.lora: null) has no adapter; set it to auto")
        if self.questions.split and self.questions.evaluate:
            raise ValueError("questions.split: already holds out part of align; remove it or questions.evaluate")
        self._check_workers()
        if self.rounds == 0 and self.candidates is None:
            raise ValueError("rounds: must be 1 or more; 0 only scores candidates, and there is no candidates section")
        self._check_world()
        self._check_trl_batch()
        return self

    def _check_workers(self) -> None:
        train, engines = self.train, self.engines.count(self.languages)
        if self.engines.min_engines > engines:
            raise ValueError(f"engines.min_engines: is more than the run's number of engines ({engines})")
        if self.placement == "colocate" and train.max_workers > engines * self.engines.tensor_parallel_size:
            raise ValueError(
                f"placement: with colocate, training workers share the engines' GPUs; train.workers must not exceed "
                f"their number ({engines * self.engines.tensor_parallel_size})"
            )
        if train.is_elastic:
            if train.min_workers > train.max_workers:
                raise ValueError("train.workers: [min, max] requires min <= max")
            if train.lora is None or train.engine == "trl":
                raise ValueError("train.workers: [min, max] requires LoRA and train.engine: fsdp; set a single number")
            if train.shards:
                raise ValueError("train.shards: requires a single number for train.workers, not [min, max]")
        if train.shards and train.max_workers % train.shards:
            raise ValueError("train.shards: must divide train.workers")

    def _check_world(self) -> None:
        if self.model in DEMOS:
            if self.questions != Questions():
                raise ValueError(f"questions: model {self.model} has its own; remove this section, or set model")
            if self.model == WORLD:
                return
        elif not self.questions.align:
            raise ValueError("questions.align: set this to the questions to train on")
        if self.candidates and self.candidates.form == WORLD:
            raise ValueError("candidates.form: world is only for the demo world; set it to letters or choices")
        if self.candidates and self.candidates.translator == WORLD:
            raise ValueError("candidates.translator: world is only for the demo world; set it to model")

    def _check_trl_batch(self) -> None:
        """Raises ValueError if TRL cannot match `batch_pairs`, as its steps are whole batches from every worker."""
        train = self.train
        if train.engine != "trl":
            return
        batch = train.trl.get("per_device_train_batch_size", max(1, train.batch_pairs // train.max_workers))
        if not isinstance(batch, int) or batch < 1 or train.batch_pairs % (batch * train.max_workers):
            raise ValueError(
                f"train.batch_pairs: with train.engine: trl, it must be a multiple of {train.max_workers} workers "
                f"x {batch} pairs (train.trl.per_device_train_batch_size)"
            )
