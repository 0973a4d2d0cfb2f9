"""The typed configuration of a run: what a recipe may say.

A recipe is a YAML file with the keys of `Config`; `section.key=value` overrides a key of it. Unknown keys and wrong
types are refused with the nearest known name. Every stage is given only its own section.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calm_ray.errors import InputError
from calm_ray.languages import LANGUAGES

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]

WORLD = "world"
"""The value of `model` that stands for the embedded demo."""

DEMO_RECIPE = Path(__file__).parent.parent / "jobs" / "recipes" / "demo.yaml"

# CALM, Table 5, where DPO and SFT differ.
_TABLE_5 = {"calm": {"learning_rate": 5e-6, "warmup_share": 0.1}, "sft": {"learning_rate": 5e-5, "warmup_share": 0.0}}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class World(Section):
    seed: int = 0
    """Which demo world: its towns, facts, barriers and questions."""


class Questions(Section):
    """Files of questions (jsonl or parquet, rows as in `calm_ray.rows.Question`); not needed for the demo world."""

    align: str | None = None
    """The questions that are sampled, voted on and trained with."""
    evaluate: str | None = None
    """Held-out questions, with gold answers."""


class Sampling(Section):
    """How completions are sampled. Defaults: CALM, Table 6 and appendix A."""

    completions: Count = 3
    """m, the completions of each question in each language."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_new_tokens: Count = 512
    instruction: bool = True
    """Ask, in the question's language, for an explanation and one letter; off for models trained on bare questions."""
    prompts_per_chunk: Count = 256
    """Questions in one chunk: what an engine is handed, and what is written at once."""


class Engines(Section):
    """The vLLM engines, one in each Ray actor."""

    per_language: Count | None = None
    """Engines for each language: a pool per language. Set this or `shared`."""
    shared: Count | None = None
    """Engines that serve all languages together, for small machines."""
    tensor_parallel_size: Count = 1
    """GPUs of one engine."""
    cpus: NonNegative = 1.0
    """Logical CPUs that Ray reserves for each engine."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    refresh: Literal["adapter", "merged"] = "adapter"
    """How a running engine takes a new policy: as a LoRA adapter, or as merged weights."""
    args: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`, passed on as they are."""

    def homes(self, languages: list[str]) -> list[str | None]:
        """The home language of each engine: `per_language` for every language, or `shared` ones without a home."""
        if self.per_language is not None:
            return [language for language in languages for _ in range(self.per_language)]
        return [None] * (self.shared or 0)

    @model_validator(mode="after")
    def _one_layout(self) -> Engines:
        if (self.per_language is None) == (self.shared is None):
            raise ValueError("set exactly one of engines.per_language and engines.shared (the other one to null)")
        owned = {"model", "tokenizer", "trust_remote_code", "load_format", "enable_lora", "max_lora_rank", "dtype"}
        owned |= {"tensor_parallel_size", "distributed_executor_backend", "seed"}
        if taken := sorted(owned & self.args.keys()):
            raise ValueError(f"engines.args may not set {', '.join(taken)}: calm_ray sets these itself")
        return self


class Preferences(Section):
    """From completions to pairs (CALM, section 2.2)."""

    scope: Literal["all", "own_language"] = "all"
    """Who votes: all languages together, or each language for itself (a control)."""
    winner: Literal["vote", "random"] = "vote"
    """What wins: the most frequent answer, or one of the given answers at random (a control)."""
    ties: Literal["drop", "smallest"] = "drop"
    """A tied question gives no pairs, or its alphabetically smallest top answer wins."""
    positives: Count = 1
    """Winning completions that each losing completion is paired with."""
    negatives: Count | None = None
    """Losing completions used of one question in one language; null for all."""
    translator: Literal["world", "model"] = "model"
    """Who carries a winning completion into another language: the demo world itself, or the model, prompted."""


class Lora(Section):
    """Defaults: CALM, Table 5."""

    r: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 8
    """The ranks that vLLM serves."""
    alpha: Positive = 16
    targets: list[str] = ["q_proj", "v_proj"]


class Train(Section):
    """The optimisation. Defaults: CALM, Table 5."""

    engine: Literal["fsdp", "trl"] = "fsdp"
    """calm_ray's own packed loop, or TRL's DPOTrainer in the same workers."""
    beta: Positive = 0.1
    sft_weight: NonNegative = 0.0
    """Weight of an added mean negative log-likelihood of the chosen side."""
    learning_rate: Positive
    epochs: Count = 3
    warmup_share: Share
    """Share of the steps over which the learning rate rises; it then falls along a cosine."""
    validation_share: Share = 0.06
    """Share of the questions whose pairs are only scored."""
    batch_pairs: Count = 8
    """Pairs in one optimiser step, over all workers; the loss is their mean."""
    max_grad_norm: Positive = 1.0
    weight_decay: NonNegative = 0.0
    reference: Literal["base", "previous"] = "base"
    """What margins are measured against: the model before any training, or the policy the round starts from."""
    lora: Lora | None = Lora()
    """null trains all weights."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen weights and the computation; what is trained is kept in float32."""
    workers: Count = 1
    cpus_per_worker: NonNegative = 1.0
    pack_tokens: Count = 4096
    """Tokens of one packed forward pass on one worker: bounds memory, never changes the result."""
    max_pair_tokens: Count = 4096
    """Longer pairs (prompt and longer side) are left out, and counted."""
    attention: Literal["varlen", "sdpa", "eager", "flash_attention_2"] = "varlen"
    activation_checkpointing: bool = False
    shards: Count | None = None
    """Workers that share one copy of the model (hybrid sharding: workers / shards copies); null for all of them."""
    trl: dict[str, Any] = {}
    """Further arguments of TRL's DPOConfig, for `engine: trl`: loss_type, for instance."""


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    """The run lives in `storage`/`name`."""
    storage: str = Field(default_factory=lambda: os.environ.get("CALM_RAY_STORAGE", "~/calm_ray/runs"), min_length=1)
    """An absolute path or a URI that every node of the cluster sees."""
    seed: int = 0
    rounds: Count = 1
    method: Literal["calm", "sft"] = "calm"
    """DPO on the pairs, or the paper's baseline: supervised training on their chosen side."""
    languages: Annotated[list[str], Field(min_length=1)]
    model: str = WORLD
    """`world` for the demo, a folder with a Hugging Face model, or its name on the hub."""
    device: Literal["cpu", "gpu"] = "gpu"
    world: World = World()
    questions: Questions = Questions()
    sampling: Sampling = Sampling()
    engines: Engines
    preferences: Preferences = Preferences()
    train: Train

    @model_validator(mode="before")
    @classmethod
    def _fill_by_method(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("train", {}), dict):
            by_method = _TABLE_5.get(raw.get("method", "calm"), _TABLE_5["calm"])
            raw = {**raw, "train": {**by_method, **raw.get("train", {})}}
        return raw

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Config:
        unknown = [code for code in self.languages if code not in LANGUAGES]
        if unknown:
            raise ValueError(f"languages: {_unknown(unknown[0], list(LANGUAGES))}")
        if len(set(self.languages)) < len(self.languages):
            raise ValueError("languages: a language is named twice")
        if self.train.lora is None and self.engines.refresh == "adapter":
            raise ValueError("engines.refresh: full fine-tuning (train.lora: null) has no adapter; set it to merged")
        if self.model == WORLD and (self.questions.align or self.questions.evaluate):
            raise ValueError(
                "questions: the demo world asks its own questions; set model to a folder, or leave these out"
            )
        if self.model != WORLD and not self.questions.align:
            raise ValueError("questions.align: name a file of questions to align on")
        if self.preferences.translator == "world" and self.model != WORLD:
            raise ValueError("preferences.translator: only the demo world can use world; set it to model")
        if self.train.shards and self.train.workers % self.train.shards:
            raise ValueError("train.shards: must divide train.workers")
        if self.train.engine == "trl" and self.method != "calm":
            raise ValueError("train.engine: trl trains on pairs (method: calm); use fsdp for method: sft")
        self._check_trl_batch()
        return self

    def _check_trl_batch(self) -> None:
        """TRL makes a step from whole batches of every worker: refuses what would take another number of pairs."""
        train = self.train
        if train.engine != "trl":
            return
        each = train.trl.get("per_device_train_batch_size", max(1, train.batch_pairs // train.workers))
        if not isinstance(each, int) or each < 1 or train.batch_pairs % (each * train.workers):
            raise ValueError(
                f"train.batch_pairs: with train.engine: trl it must be a multiple of {train.workers} workers "
                f"with {each} pairs each (train.trl.per_device_train_batch_size)"
            )


def load_config(recipe: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The configuration of a recipe (the demo's, if None) with `section.key=value` overrides.

    Raises InputError, in one message that names every wrong field and what to do.
    """
    path = Path(recipe) if recipe is not None else DEMO_RECIPE
    raw = _read_yaml(path)
    for override in overrides or []:
        _override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error))
        raise InputError(f"{path} is not a valid recipe:\n{lines}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path}: there is no such recipe; the ones that come with calm_ray are in {DEMO_RECIPE.parent}"
        )
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override!r}: an override looks like section.key=value")
    *sections, last = key.split(".")
    place = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise InputError(f"{override!r}: {section} is a value, not a section")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{override!r}: the value is not readable as YAML: {error}") from None


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: {_unknown(str(item['loc'][-1]), _keys_beside(item['loc']))}")
        elif item["type"] == "missing":
            lines.append(f"{where}: is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = f" (it is {item['input']!r})" if where and not isinstance(item["input"], dict | BaseModel) else ""
            lines.append(f"{where}: {message}{given}" if where else message)
    return lines


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{name} is not known; {hint}"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section that holds the last part of an error's location."""
    section: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
