"""The sections of a recipe: their keys, what they mean, and their defaults."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from calm_ray.core.safety import refuse_engine_args, refuse_trl_args

Count = Annotated[int, Field(ge=1, lt=2**31)]
Actors = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Budget = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def unknown_name(name: str, known: list[str]) -> str:
    """What to say of a name that is none of those known."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{name} is not known; {hint}"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class World(Section):
    seed: Seed = 0
    """Which demo world: its towns, facts, barriers and questions."""


class Split(Section):
    """Some questions are drawn to train on, in all their languages; the others are held out."""

    train: Count
    seed: Seed = 0


class Questions(Section):
    """Where questions come from; not needed for the demo world.

    A place is a file, a folder, a glob, or `hub:owner/name[:config[:split]]`, in any format that `calm-ray questions`
    reads.
    """

    align: str | None = None
    """The questions that are sampled, voted on and trained with."""
    evaluate: str | None = None
    """Held-out questions, with gold answers."""
    split: Split | None = None
    """Holds out a part of `align` instead."""
    align_subjects: Annotated[list[str], Field(min_length=1)] | None = None
    """Of `align`, the questions of these subjects alone."""
    evaluate_subjects: Annotated[list[str], Field(min_length=1)] | None = None
    """Of `evaluate`, the questions of these subjects alone; both may be the same files, if the subjects differ."""
    evaluate_languages: list[str] | None = None
    """The languages of the held-out questions, where they are not those of the run."""
    language: str | None = None
    """The language of files that do not say it themselves."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """A row that cannot be used ends the run before it begins, or is left out, counted and listed in the run."""
    translate: str | None = None
    """Who translates questions that are not there in a language: `model`, the run's own, through its engines; or a
    sequence-to-sequence model, by folder or name on the hub. Without it, a missing language is an error."""

    @model_validator(mode="after")
    def _subjects_of_a_place(self) -> Questions:
        if self.evaluate_subjects is not None and self.evaluate is None:
            raise ValueError("evaluate_subjects: chooses among the questions of evaluate; name their place, too")
        return self


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


MORE_GPUS = re.compile("data_parallel_|(pipeline|prefill_context)_parallel_size$|device_ids$")
"""Arguments of vLLM by which an engine would take other GPUs than Ray has given it."""


class Engines(Section):
    """The vLLM engines, one in each Ray actor."""

    per_language: Actors | None = None
    """Engines for each language: a pool per language. Set this or `shared`."""
    shared: Actors | None = None
    """Engines that serve all languages together, for small machines."""
    tensor_parallel_size: Actors = 1
    """GPUs of one engine."""
    cpus: NonNegative = 1.0
    """Logical CPUs that Ray reserves for each engine."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    refresh: Literal["adapter", "merged"] = "adapter"
    """How a running engine takes a new policy: as a LoRA adapter, or as merged weights."""
    process: Literal["actor", "child"] = "actor"
    """Where vLLM's core runs: in the Ray actor's own process, or in a child of it, as vLLM has it by default."""
    min_engines: Count = 1
    """The run stops where fewer are left that work, start, or wait to be started."""
    silent_seconds: Positive = 300
    """An engine at work that shows no sign of life for so long is ended and started anew."""
    chunk_seconds: Positive = 3600
    """The same where a chunk takes longer than this."""
    max_restarts: Budget = 5
    """How often an engine may die without finishing a chunk in between before it is given up."""
    max_bad_prompts: Budget = 10
    """Prompts that end every engine they are given to are left out, and listed; with more of them the run stops."""
    args: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`, passed on as they are."""

    def count(self, languages: list[str]) -> int:
        """How many engines a run in these languages has."""
        return self.shared or 0 if self.per_language is None else self.per_language * len(languages)

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
        refuse_engine_args(self.args)
        if more := sorted(name for name in self.args if MORE_GPUS.match(name)):
            raise ValueError(
                f"engines.args may not set {', '.join(more)}: an engine has engines.tensor_parallel_size GPUs; "
                "for more GPUs raise that, or the number of engines"
            )
        return self


class Candidates(Section):
    """Answers that are compared by how likely a policy finds them, instead of being written (DCO, section 5)."""

    form: Literal["letters", "choices", "samples", "world"] = "letters"
    """What the candidates of a question are: the letters of its choices, which the prompt lists; the choices' own
    texts, after the question or in the place of a cloze's `<mask>`; what the policy itself sampled, in any language,
    carried over into the others; or the demo world's answers, written out."""
    score: Literal["sum", "per_char", "per_byte", "mean_full"] = "sum"
    """What decides between candidates: the summed log-probability of their tokens (acc of lm-evaluation-harness), the
    same by character (acc_norm) or byte of the choice, or the mean over prompt and candidate (DCO's released code)."""
    chat: bool = False
    """Ask in the model's chat template; without it a prompt is plain text, as lm-evaluation-harness has it."""
    pairs: Count = 1
    """k, the pairs of candidates drawn of each question, new ones in every round, where a method trains on such."""
    most: Annotated[int, Field(ge=2)] = 4
    """With `form: samples`, how many candidates of a question are kept, drawn by the seed."""
    translator: Literal["world", "model"] = "model"
    """With `form: samples`, who carries a candidate into the other languages: the demo world itself, or the model,
    prompted."""


class Lora(Section):
    """Defaults: CALM, Table 5."""

    r: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 8
    """The ranks that vLLM serves."""
    alpha: Positive = 16
    targets: list[str] = ["q_proj", "v_proj"]


class Train(Section):
    """The optimisation. Defaults: CALM, Table 5, but for those that a method has of its own."""

    engine: Literal["fsdp", "trl"] = "fsdp"
    """calm_ray's own packed loop, or TRL's DPOTrainer in the same workers."""
    beta: Positive = 0.1
    sft_weight: NonNegative = 0.0
    """Weight of an added mean negative log-likelihood of the chosen side."""
    sft_mean: Literal["row", "token"] = "row"
    """Supervised training: the mean over each row's tokens, then over rows; or over all tokens of a step, as TRL's
    SFTTrainer has it."""
    learning_rate: Positive
    epochs: Count = 3
    warmup_share: Share
    """Share of the steps over which the learning rate rises; it then falls to 0."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How it falls."""
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
    workers: Actors | tuple[Actors, Count] = 1
    """Ray Train's workers. [least, most]: as many as there are places for, more and fewer as machines come and go
    (LoRA). Places are the cluster's resource `calm_ray_train`."""
    max_failures: Budget = 3
    """How often workers may be lost without a new checkpoint in between; machines that are taken back do not count."""
    checkpoint_steps: Count = 100
    """Steps between two checkpoints; there is one at the end of every epoch, too."""
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

    @model_validator(mode="after")
    def _trl_keeps_to_the_run(self) -> Train:
        refuse_trl_args(self.trl)
        return self

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def is_elastic(self) -> bool:
        return not isinstance(self.workers, int)


WORLD = "world"
"""The value of `model` that stands for the embedded demo."""


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
