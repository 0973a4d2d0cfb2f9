"""Upper bounds on what a run reads, generates, trains on and stores: tokens, pairs and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question
from calm_ray.demo.demos import DEMOS
from calm_ray.methods.work import CHOICES, Sizes, Work
from calm_ray.planning.memory import BYTES, FLOAT32, context_of
from calm_ray.planning.model_shape import Shape
from calm_ray.run.policies import RunModel

PROMPT_TOKENS = 256
"""Assumed prompt length if the questions cannot be read."""
TEXT_BYTES_PER_TOKEN = 4
"""Assumed UTF-8 bytes per token, about that of English."""
CHECKPOINTS = 2
"""The last checkpoint and the one being written."""
POLICIES = 2
"""The current policy and the reference."""


@dataclass(frozen=True)
class Counts:
    """The questions of a run."""

    align: int
    """Questions to align on, each in every language; 1 if they could not be counted."""
    evaluate: int
    """Held-out questions."""
    is_counted: bool
    prompt_tokens: int
    choices: int


@dataclass(frozen=True)
class RoundWork:
    """Upper bounds for one round, or for one question if the questions could not be counted."""

    sizes: Sizes
    is_counted: bool
    steps: dict[str, Work]
    """By step name, in execution order."""
    disk: dict[str, int]
    """Bytes per round in the run's storage, by content."""
    cache: dict[str, int]
    """Bytes in the cache of each node, by content."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def count_questions(config: Config) -> Counts:
    """Counts a run's questions if their files are on this machine; else assumes one, and one held out.

    Raises InputError if the files contain no questions.
    """
    if config.model in DEMOS:
        asked, held_out = DEMOS[config.model].questions(config.world.seed, config.languages)
        return _counts(asked, _distinct(held_out))
    sources = config.questions
    assert sources.align is not None
    align = _read(config, sources.align)
    if align is None or sources.align_subjects or sources.evaluate_subjects:
        return Counts(1, 1, False, PROMPT_TOKENS, CHOICES)
    if sources.split is not None:
        whole, train = _counts(align, 0), sources.split.train
        return Counts(min(train, whole.align), max(0, whole.align - train), True, whole.prompt_tokens, whole.choices)
    if sources.evaluate is None:
        return _counts(align, 0)
    evaluate = _read(config, sources.evaluate)
    return _counts(align, _distinct(evaluate)) if evaluate is not None else Counts(1, 1, False, PROMPT_TOKENS, CHOICES)


def _read(config: Config, source: str) -> list[Question] | None:
    from calm_ray.questions.reader import load_questions
    from calm_ray.questions.sources import matching

    if source.startswith("hub:") or not matching(source.replace("{language}", "*")):
        return None
    languages = list(dict.fromkeys([*config.languages, *config.evaluation_languages]))
    found = load_questions(
        source, languages, on_bad_row="skip", language=config.questions.language, allow_missing=languages,
        allow_open=True,
    ).questions  # fmt: skip
    if not found:
        raise InputError(f"questions: {source} has no questions in {', '.join(languages)}")
    return found


def _distinct(questions: Sequence[Question]) -> int:
    return len({question["question_id"] for question in questions})


def _counts(align: Sequence[Question], evaluate: int) -> Counts:
    size = sum(len((question["text"] + "".join(question["choices"])).encode()) for question in align)
    choices = max(len(question["choices"]) for question in align)
    return Counts(_distinct(align), evaluate, True, max(1, size // len(align) // TEXT_BYTES_PER_TOKEN), choices)


def sizes_of(config: Config, shape: Shape, counts: Counts) -> Sizes:
    """Assumes that every completion reaches `sampling.max_new_tokens` or the engines' context limit."""
    context = context_of(config, shape)
    prompt = min(counts.prompt_tokens, context - 1)
    return Sizes(
        questions=counts.align,
        held_out=counts.evaluate,
        languages=len(config.languages),
        evaluation_languages=len(config.evaluation_languages),
        prompt=prompt,
        reply=min(config.sampling.max_new_tokens, context - prompt),
        choices=counts.choices,
    )


def work_of(config: Config, shape: Shape, counts: Counts) -> RoundWork:
    """Work of one round by step."""
    sizes = sizes_of(config, shape, counts)
    steps: dict[str, Work] = {}
    for step in (*config.steps, config.training, *config.evaluation):
        runs = step in config.evaluation or config.rounds > 0  # without rounds, only evaluation runs
        steps[step.name] = step.work(sizes, steps) if runs else Work()
    return RoundWork(sizes, counts.is_counted, steps, _disk(config, shape, steps), _cache(config, shape))


def _disk(config: Config, shape: Shape, steps: dict[str, Work]) -> dict[str, int]:
    """Bytes per round in the run's storage."""
    policy, checkpoint = _trained(config, shape)
    return {
        **{name: work.disk for name, work in steps.items() if work.disk},
        "weights" if config.train.lora is None else "adapter": policy,
        "checkpoints": CHECKPOINTS * checkpoint,
    }


def _cache(config: Config, shape: Shape) -> dict[str, int]:
    """Bytes on a node's disk: local copies, and a checkpoint on its way to or from storage."""
    is_copied = config.model in DEMOS or not RunModel(config.model).is_folder
    is_merged = config.engines.merges_adapters(config.train.lora, config.device)
    whole = BYTES["bfloat16"] * shape.parameters
    policy, checkpoint = _trained(config, shape)
    return {
        "model": whole * is_copied,
        f"{POLICIES} policies": POLICIES * policy,
        "2 merged models": 2 * whole * is_merged,  # the old one is deleted once the new one is loaded
        "checkpoint": checkpoint,
    }


def _trained(config: Config, shape: Shape) -> tuple[int, int]:
    """(policy, checkpoint) bytes. A checkpoint holds the trained weights and Adam's two moments in float32."""
    lora = config.train.lora
    if lora is None:
        return BYTES["bfloat16"] * shape.parameters, 3 * FLOAT32 * shape.parameters
    trained = FLOAT32 * shape.lora_parameters(lora)
    return trained, 3 * trained
