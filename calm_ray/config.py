"""The typed configuration of a run: what a recipe may say.

A recipe is a YAML file with the keys of `Config`; `section.key=value` overrides a key of it. Unknown keys and wrong
types are refused with the nearest known name. The sections are in `calm_ray.core.sections`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from calm_ray.core.languages import LANGUAGES
from calm_ray.core.safety import local_problem, refuse_secrets
from calm_ray.core.sections import (
    RUN_NAME,
    WORLD,
    Candidates,
    Dco,
    Engines,
    Preferences,
    Questions,
    Sampling,
    Section,
    Seed,
    Train,
    World,
    unknown_name,
)

Objective = Literal["dpo", "sft", "dco"]

# CALM, Table 5, where DPO and SFT differ; DCO, appendix G, with the schedule of its released code.
TRAIN_BY_OBJECTIVE: dict[Objective, dict[str, Any]] = {
    "dpo": {"learning_rate": 5e-6, "warmup_share": 0.1},
    "sft": {"learning_rate": 5e-5, "warmup_share": 0.0},
    "dco": {
        "learning_rate": 1e-5, "warmup_share": 0.0, "schedule": "linear", "epochs": 1, "beta": 1.0,
        "validation_share": 0.0, "reference": "previous",
    },
}  # fmt: skip


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=128)]
    """The run lives in `storage`/`name`."""
    storage: str = Field(default_factory=lambda: os.environ.get("CALM_RAY_STORAGE", "~/calm_ray/runs"), min_length=1)
    """An absolute path or a URI that every node of the cluster sees."""
    seed: Seed = 0
    rounds: Annotated[int, Field(ge=0, le=10_000)] = 1
    """How often to sample, prefer and train; 0 only scores, and shows what the optimal policy would be."""
    method: Literal["calm", "sft", "dco", "dpo_gold", "sft_gold"] = "calm"
    """CALM: DPO on the pairs of a vote; `sft`, its baseline: supervised training on their chosen side. DCO: margins
    between candidates, fitted to those of the other languages. `_gold`, the only methods that train with gold answers:
    the same as CALM and SFT, on those pairs alone whose chosen side is right (CALM, Table 2); or, with `candidates`,
    on the right candidate and another one (DCO, section 6.1)."""
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
    preferences: Preferences = Preferences()
    dco: Dco = Dco()
    train: Train

    @model_validator(mode="before")
    @classmethod
    def _fill_by_method(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("train", {}), dict):
            method = str(raw.get("method", "calm"))
            by_objective = TRAIN_BY_OBJECTIVE[objective_of(method)]
            raw = {**raw, "train": {**by_objective, **raw.get("train", {})}}
            if method == "dco" and raw.get("candidates") is None:
                raw["candidates"] = {}
            if method.endswith("_gold") and isinstance(raw.get("preferences", {}), dict):
                raw["preferences"] = {"winner": "gold", **raw.get("preferences", {})}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, raw: Any) -> Any:
        """First of all, so that no message about another field repeats one."""
        refuse_secrets(raw)
        return raw

    @model_validator(mode="after")
    def _places_can_be_used(self) -> Config:
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
    def _fields_fit_together(self) -> Config:
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
        if self.train.engine == "trl" and self.objective != "dpo":
            raise ValueError(f"train.engine: trl trains on pairs; use fsdp for method: {self.method}")
        if (self.preferences.winner == "gold") != self.method.endswith("_gold"):
            raise ValueError(
                "preferences.winner: gold answers train only with method: dpo_gold or sft_gold, and always"
            )
        if self.rounds == 0 and self.candidates is None:
            raise ValueError("rounds: must be 1 or more; 0 only scores candidates, and there is no such section")
        self._check_world()
        self._check_candidates()
        self._check_gamma()
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
        if self.preferences.translator == "world":
            raise ValueError("preferences.translator: only the demo world can use world; set it to model")
        if self.candidates and self.candidates.form == "world":
            raise ValueError("candidates.form: only the demo world can use world; set it to letters or choices")

    def _check_candidates(self) -> None:
        if self.method == "dco" and len(self.languages) < 2:
            raise ValueError("languages: DCO compares languages and needs two or more")
        if self.candidates and self.candidates.form == "samples":
            if self.method != "dco":
                raise ValueError("candidates.form: only method: dco draws its candidates from samples")
            if self.rounds == 0:
                raise ValueError("rounds: must be 1 or more, since candidates.form: samples has none before round 1")
        if self.method == "dco" and self.train.sft_weight:
            raise ValueError("train.sft_weight: with DCO neither candidate of a pair is the better one; leave it out")

    def _check_gamma(self) -> None:
        anchor, gamma = self.dco.anchor, self.dco.gamma
        if anchor and anchor.language not in self.languages:
            raise ValueError(f"dco.anchor.language: {anchor.language} is not one of the run's languages")
        for pair in gamma if isinstance(gamma, dict) else ():
            first, _, second = pair.partition("-")
            if first == second or not {first, second} <= set(self.languages):
                raise ValueError(f"dco.gamma: {pair} does not name two of the run's languages, like en-fr")

    @property
    def asked_languages(self) -> list[str]:
        """The languages of the held-out questions."""
        return self.questions.evaluate_languages or self.languages

    @property
    def objective(self) -> Objective:
        """What the method trains with."""
        return objective_of(self.method)

    @property
    def votes(self) -> bool:
        """Whether pairs come from a vote on completions, and not from candidates."""
        return self.method != "dco" and not (self.method.endswith("_gold") and self.candidates is not None)

    @property
    def samples(self) -> bool:
        """Whether the method needs completions: it votes on them, or takes its candidates from them."""
        return self.votes or (self.candidates is not None and self.candidates.form == "samples")

    @property
    def answers_by_writing(self) -> bool:
        """Whether held-out questions are answered by writing, and not by the likeliest of given candidates."""
        return self.candidates is None or self.candidates.form == "samples"

    @property
    def writes(self) -> bool:
        """Whether the engines write completions at all, to sample or to answer held-out questions."""
        return self.samples or self.answers_by_writing

    @property
    def has_optimum(self) -> bool:
        """Whether one policy is optimal: with two languages drawn out of more, each two have their own."""
        return self.method == "dco" and (self.dco.languages == "joint" or len(self.languages) == 2)

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


def objective_of(method: str) -> Objective:
    if method == "dco":
        return "dco"
    return "sft" if method.startswith("sft") else "dpo"
