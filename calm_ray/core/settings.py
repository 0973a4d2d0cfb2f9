"""What every run has, whatever its method: the sections that all methods share, and checks across them."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.safety import local_problem, refuse_secrets
from calm_ray.core.sections import (
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
    """One run, but for its method and the method's own section."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=128)]
    """The run lives in `storage`/`name`."""
    storage: str = Field(default_factory=lambda: os.environ.get("CALM_RAY_STORAGE", "~/calm_ray/runs"), min_length=1)
    """An absolute path or a URI that every node of the cluster sees."""
    seed: Seed = 0
    rounds: Annotated[int, Field(ge=0, le=10_000)] = 1
    """How often to sample, prefer and train; 0 only scores, and shows what the optimal policy would be."""
    languages: Annotated[list[str], Field(min_length=1)]
    model: str = WORLD
    """`world` for the demo, a folder with a Hugging Face model, or its name on the hub."""
    device: Literal["cpu", "gpu"] = "gpu"
    init_from: str | None = None
    """An earlier run, by its name in `storage`, its folder or its URI: its last policy is what round 1 starts from."""
    world: World = World()
    questions: Questions = Questions()
    sampling: Sampling = Sampling()
    engines: Engines
    placement: Literal["split", "colocate"] = "split"
    """Engines and training workers have GPUs of their own, or share them: engines then sleep while training runs."""
    candidates: Candidates | None = None
    """With this section a policy is evaluated by the candidate that it finds likeliest, and RankC can be measured."""
    train: Train

    @property
    def asked_languages(self) -> list[str]:
        """The languages of the held-out questions."""
        return self.questions.evaluate_languages or self.languages

    @property
    def draws_candidates(self) -> bool:
        """Whether candidates are drawn from what the policy samples, so that none are given before round 1."""
        return self.candidates is not None and self.candidates.form == "samples"

    @model_validator(mode="after")
    def _places_can_be_used(self) -> RunSettings:
        questions = self.questions
        places = {"storage": self.storage, "model": self.model, "init_from": self.init_from}
        places |= {f"questions.{name}": getattr(questions, name) for name in ("align", "evaluate", "translate")}
        for field, place in places.items():
            refuse_secrets(place, field)  # again, for a storage that the environment names
            if place is not None and (problem := local_problem(place)):
                raise ValueError(f"{field}: {problem}")
        if self.init_from is not None and "/" not in self.init_from and not re.search(RUN_NAME, self.init_from):
            raise ValueError(f"init_from: {self.init_from!r} is neither a run's name nor a folder or a URI")
        return self

    @model_validator(mode="after")
    def _fields_fit_together(self) -> RunSettings:
        for field, codes in (("languages", self.languages), ("questions.evaluate_languages", self.asked_languages)):
            if unknown := [code for code in codes if code not in LANGUAGES]:
                raise ValueError(f"{field}: {unknown_name(unknown[0], list(LANGUAGES))}")
            if len(set(codes)) < len(codes):
                raise ValueError(f"{field}: a language is named twice")
        if self.train.lora is None and self.engines.refresh == "adapter":
            raise ValueError("engines.refresh: full fine-tuning (train.lora: null) has no adapter; set it to merged")
        if self.questions.split and self.questions.evaluate:
            raise ValueError("questions.split: holds out a part of align; leave out questions.evaluate, or split")
        self._check_workers()
        if self.rounds == 0 and self.candidates is None:
            raise ValueError("rounds: must be 1 or more; 0 only scores candidates, and there is no such section")
        self._check_world()
        self._check_trl_batch()
        return self

    def _check_workers(self) -> None:
        train, engines = self.train, self.engines.count(self.languages)
        if self.engines.min_engines > engines:
            raise ValueError(f"engines.min_engines: is more than the run's engines ({engines})")
        if self.placement == "colocate" and train.most_workers > engines * self.engines.tensor_parallel_size:
            raise ValueError(
                f"placement: colocate puts every training worker beside an engine; the engines have "
                f"{engines * self.engines.tensor_parallel_size} GPUs, train.workers may be no more"
            )
        if train.is_elastic:
            if train.least_workers > train.most_workers:
                raise ValueError("train.workers: [least, most], in this order")
            if train.lora is None or train.engine == "trl":
                raise ValueError("train.workers: [least, most] is for LoRA with train.engine: fsdp; name one number")
            if train.shards:
                raise ValueError("train.shards: needs one number of train.workers, not [least, most]")
        if train.shards and train.most_workers % train.shards:
            raise ValueError("train.shards: must divide train.workers")

    def _check_world(self) -> None:
        if self.model == WORLD:
            if self.questions != Questions():
                raise ValueError("questions: the demo world asks its own; set model to a folder, or leave these out")
            return
        if not self.questions.align:
            raise ValueError("questions.align: name a file of questions to align on")
        if self.candidates and self.candidates.form == WORLD:
            raise ValueError("candidates.form: only the demo world can use world; set it to letters or choices")
        if self.candidates and self.candidates.translator == WORLD:
            raise ValueError("candidates.translator: only the demo world can use world; set it to model")

    def _check_trl_batch(self) -> None:
        """TRL makes a step from whole batches of every worker: refuses what would take another number of pairs."""
        train = self.train
        if train.engine != "trl":
            return
        each = train.trl.get("per_device_train_batch_size", max(1, train.batch_pairs // train.most_workers))
        if not isinstance(each, int) or each < 1 or train.batch_pairs % (each * train.most_workers):
            raise ValueError(
                f"train.batch_pairs: with train.engine: trl it must be a multiple of {train.most_workers} workers "
                f"with {each} pairs each (train.trl.per_device_train_batch_size)"
            )
