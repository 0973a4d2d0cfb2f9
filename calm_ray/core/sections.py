"""The sections of a recipe: their keys with meaning and default."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from calm_ray.core.safety import refuse_engine_args, refuse_trl_args

Count = Annotated[int, Field(ge=1, lt=2**31)]
Actors = Annotated[int, Field(ge=1, le=100_000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Budget = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def unknown_name(name: str, known: list[str]) -> str:
    """The error message for an unknown name, with a suggestion."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    return f"{name} is not known; {hint}"


PromptForm = Literal["explain", "choices", "question"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class World(Section):
    """The demos, used with `model: world` or `model: atlas`."""

    seed: Seed = 0
    """Selects the demo world: its towns, facts, barriers and questions. With the atlas, the countries that are held out
    and the wrong choices of each question."""


class Split(Section):
    """Draws a random subset of the questions to train on, in all their languages, and holds out the rest."""

    train: Count
    """Number of questions to train on."""
    seed: Seed = 0
    """Seed of the draw."""


class Questions(Section):
    """Where questions come from; not needed for the demo world.

    A source is a file, a folder, a glob, or `hub:owner/name[:config[:split]]`, in any format that `calm-ray questions`
    can read.
    """

    align: str | None = None
    """Source of the questions to train on."""
    evaluate: str | None = None
    """Source of the held-out questions, with gold answers."""
    split: Split | None = None
    """Hold out part of `align` instead of reading `evaluate`."""
    align_subjects: Annotated[list[str], Field(min_length=1)] | None = None
    """Use only these subjects of `align`; null for all."""
    evaluate_subjects: Annotated[list[str], Field(min_length=1)] | None = None
    """Use only these subjects of `evaluate`; null for all. Both sources may be the same if the subjects differ."""
    evaluate_languages: list[str] | None = None
    """Languages of the held-out questions; null for the languages of the run."""
    language: str | None = None
    """Language of files that do not specify one."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """How to handle unusable rows: `refuse` fails before the run starts, `skip` drops, counts and lists them."""
    translate: str | None = None
    """Translator for questions missing in some language: `model` for the run's own model, through its engines, or the
    folder or hub name of a sequence-to-sequence model. If null, a missing language is an error."""

    @model_validator(mode="after")
    def _check_subjects(self) -> Questions:
        if self.evaluate_subjects is not None and self.evaluate is None:
            raise ValueError("evaluate_subjects: filters the questions of evaluate; set questions.evaluate too")
        return self


class Sampling(Section):
    """How completions are sampled. Defaults: CALM, Table 6 and Appendix A."""

    completions: Count = 3
    """m, the number of completions per question and language."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Sample from the smallest set of tokens whose probability reaches this."""
    max_new_tokens: Count = 512
    """Maximum tokens of a completion, also for held-out questions. Longer ones are cut off."""
    prompt: PromptForm = "explain"
    """What prompts contain. `explain`: the question with its choices, after a request in its language to explain
    and then give a letter. `choices`: only the question with its choices, for models trained on bare questions.
    `question`: only the question, which the model answers in its own words (see `preferences.extraction`)."""
    prompts_per_chunk: Count = 256
    """Questions per chunk, the unit of work that is given to an engine and written at once."""


MORE_GPUS = re.compile("data_parallel_|(pipeline|prefill_context)_parallel_size$|device_ids$")
"""Arguments of vLLM that would make an engine use GPUs other than those Ray assigned to it."""


class Engines(Section):
    """The vLLM engines, one per Ray actor."""

    per_language: Actors | None = None
    """Number of engines per language, each language with its own pool. Set either this or `shared`."""
    shared: Actors | None = None
    """Number of engines shared by all languages, for small clusters."""
    tensor_parallel_size: Actors = 1
    """GPUs per engine."""
    cpus: NonNegative = 1.0
    """Logical CPUs that Ray reserves per engine."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the engines' weights and computation."""
    refresh: Literal["auto", "adapter", "merged"] = "auto"
    """How running engines load a new policy: as a LoRA adapter, or as merged weights. `auto` is `adapter` on GPUs, and
    `merged` for full fine-tuning and on CPUs, where vLLM's LoRA layers are several times slower."""
    process: Literal["actor", "child"] = "actor"
    """Where vLLM's core runs: in the Ray actor's process, or in a child process, which is vLLM's default."""
    min_engines: Count = 1
    """Abort the run when retired engines leave fewer than this."""
    heartbeat_timeout_s: Positive = 300
    """Restart a busy engine after this many seconds without a heartbeat."""
    chunk_timeout_s: Positive = 3600
    """Restart an engine that takes longer than this many seconds to process a chunk or to start."""
    max_restarts: Budget = 5
    """Retire an engine that dies more often than this without finishing a chunk in between."""
    max_bad_prompts: Budget = 10
    """Abort the run when more prompts than this crash every engine. Up to that, such prompts are skipped and listed."""
    args: dict[str, Any] = {}
    """Extra arguments for `vllm.LLM`, passed unchanged."""

    def uses_adapters(self, lora: Lora | None, device: str) -> bool:
        """Whether engines load policies as adapters, not as merged weights."""
        if self.refresh == "auto":
            return lora is not None and device == "gpu"
        return lora is not None and self.refresh == "adapter"

    def merges_adapters(self, lora: Lora | None, device: str) -> bool:
        """Whether engines load policies as weights that an adapter is merged into."""
        return lora is not None and not self.uses_adapters(lora, device)

    def count(self, languages: list[str]) -> int:
        """Number of engines of a run in these languages."""
        return self.shared or 0 if self.per_language is None else self.per_language * len(languages)

    def homes(self, languages: list[str]) -> list[str | None]:
        """The home language of each engine; None for `shared` engines."""
        if self.per_language is not None:
            return [language for language in languages for _ in range(self.per_language)]
        return [None] * (self.shared or 0)

    @model_validator(mode="after")
    def _one_layout(self) -> Engines:
        if (self.per_language is None) == (self.shared is None):
            raise ValueError("set exactly one of engines.per_language and engines.shared (the other one to null)")
        reserved = {"model", "tokenizer", "trust_remote_code", "load_format", "enable_lora", "max_lora_rank", "dtype"}
        reserved |= {"tensor_parallel_size", "distributed_executor_backend", "seed"}
        if conflicts := sorted(reserved & self.args.keys()):
            raise ValueError(f"engines.args may not set {', '.join(conflicts)}: calm_ray sets these itself")
        refuse_engine_args(self.args)
        if more := sorted(name for name in self.args if MORE_GPUS.match(name)):
            raise ValueError(
                f"engines.args may not set {', '.join(more)}: an engine has engines.tensor_parallel_size GPUs; "
                "to use more, raise that or the number of engines"
            )
        return self


class Candidates(Section):
    """Answers that are ranked by their log-probability under the policy instead of being generated (DCO, Section 5)."""

    form: Literal["letters", "choices", "answers", "samples", "world"] = "letters"
    """What the candidates are. `letters`: the letters of the choices, which the prompt lists. `choices`: the texts of
    the choices, after the question or in place of a cloze's `<mask>`. `answers`: the texts of the choices after the
    question and, on a new line, the word for answer in its language. `samples`: answers sampled from the policy in any
    language, translated into the others. `world`: the demo world's answers as text."""
    score: Literal["sum", "per_char", "per_byte", "mean_full"] = "sum"
    """How candidates are scored: the summed log-probability of their tokens (`sum`, acc of lm-evaluation-harness), that
    divided by the choice's length in characters (`per_char`, acc_norm) or bytes (`per_byte`), or the mean over prompt
    and candidate tokens (`mean_full`, as in DCO's released code)."""
    chat: bool = False
    """Use the model's chat template. By default, prompts are plain text, as in lm-evaluation-harness."""
    calibrate: bool = False
    """With DCO, compare candidates by how much more likely they are than in the mean over the questions of the same
    subject that have them as a candidate, in the same language. This removes what a candidate's length, form and
    frequency contribute. Needs candidates that recur, such as letters or the values of a relation."""
    pairs: Count = 1
    """k, the number of candidate pairs drawn per question and round, for methods that train on them."""
    max_candidates: Annotated[int, Field(ge=2)] = 4
    """With `form: samples`, the maximum number of candidates per question; excess ones are dropped at random."""
    translator: Literal["world", "model"] = "model"
    """With `form: samples`, what translates candidates into the other languages: the demo world or the model."""


class Lora(Section):
    """Defaults: CALM, Table 5."""

    r: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 8
    """The rank; must be one that vLLM supports."""
    alpha: Positive = 16
    """The adapter's output is scaled by alpha / r."""
    targets: list[str] = ["q_proj", "v_proj"]
    """Names of the linear layers that get an adapter."""


class Train(Section):
    """Training. Defaults: CALM, Table 5, except where a method sets its own."""

    engine: Literal["fsdp", "trl"] = "fsdp"
    """The training loop: calm_ray's own with packing, or TRL's DPOTrainer in the same workers."""
    beta: Positive = 0.1
    """Strength of the pull towards the reference policy, the beta of DPO and DCO."""
    sft_weight: NonNegative = 0.0
    """Weight of an additional loss term, the mean negative log-likelihood of the chosen side."""
    sft_mean: Literal["row", "token"] = "row"
    """How supervised training averages the loss: over each row's tokens and then over rows, or over all tokens of a
    step, as in TRL's SFTTrainer."""
    learning_rate: Positive
    """Peak learning rate of AdamW. The default depends on the method."""
    epochs: Count = 3
    """Passes over the round's pairs."""
    warmup_ratio: Fraction
    """Fraction of the steps over which the learning rate warms up; it then decays to 0."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the learning rate's decay."""
    validation_fraction: Fraction = 0.06
    """Fraction of the questions whose pairs are only used for validation."""
    batch_pairs: Count = 8
    """Pairs per optimizer step, over all workers; the loss is their mean."""
    max_grad_norm: Positive = 1.0
    """Clip gradients to this norm."""
    weight_decay: NonNegative = 0.0
    """Weight decay of AdamW."""
    reference: Literal["base", "previous"] = "base"
    """The reference policy for margins: the model before any training, or the policy that the round starts from."""
    lora: Lora | None = Lora()
    """LoRA settings; null for full fine-tuning."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the frozen weights and the computation; trained weights stay in float32."""
    workers: Actors | tuple[Actors, Count] = 1
    """Number of Ray Train workers. [min, max] scales with the available slots as nodes come and go (LoRA with
    `engine: fsdp` only); slots are the cluster's resource `calm_ray_train`."""
    max_failures: Budget = 3
    """Maximum number of worker failures without a new checkpoint in between. Preempted nodes do not count."""
    checkpoint_steps: Count = 100
    """Steps between checkpoints. Every epoch also ends with one."""
    cpus_per_worker: NonNegative = 1.0
    """Logical CPUs that Ray reserves per worker."""
    pack_tokens: Count = 4096
    """Maximum tokens of a packed forward pass on one worker. Limits memory; does not change the result."""
    max_pair_tokens: Count = 4096
    """Drop and count pairs with more tokens than this (prompt and longer side)."""
    attention: Literal["varlen", "sdpa", "eager", "flash_attention_2"] = "varlen"
    """Attention implementation: PyTorch's variable-length attention, or one of transformers'."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and recompute the rest in the backward pass: less memory, about a third more
    computation."""
    shards: Count | None = None
    """Number of workers that share one copy of the model (hybrid sharding, workers / shards copies); null for all."""
    trl: dict[str, Any] = {}
    """Extra arguments for TRL's DPOConfig with `engine: trl`, such as loss_type."""

    @model_validator(mode="after")
    def _check_trl_args(self) -> Train:
        refuse_trl_args(self.trl)
        return self

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def is_elastic(self) -> bool:
        return not isinstance(self.workers, int)


WORLD, ATLAS = "world", "atlas"
"""Values of `model` for the generated world, and for a public model with questions about countries."""
DEMOS = (WORLD, ATLAS)
"""The values of `model` that come with questions of their own."""


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
