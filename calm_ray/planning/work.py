"""How much a run reads, writes, trains on and stores: tokens, pairs and bytes, at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question
from calm_ray.core.sections import WORLD
from calm_ray.planning.memory import BYTES, FLOAT32, context_of
from calm_ray.planning.model_shape import Shape
from calm_ray.run.policies import RunModel

PROMPT_TOKENS = 256
"""Assumed of a prompt where the questions cannot be read."""
BYTES_PER_TOKEN = 4
"""Assumed of text in UTF-8, English being at about this."""
CHOICE_TOKENS = 16
"""Assumed of a candidate that is not a letter."""
CHOICES = 4
"""Assumed of a question that cannot be read."""
TOKEN_ID_BYTES = 8
"""Token ids travel as 64-bit integers (`calm_ray.core.rows`); Parquet packs them smaller, which is not counted on."""
CHECKPOINTS = 2
"""The last checkpoint, and the one being written."""
POLICIES = 2
"""The current policy, and the one that margins are measured against."""


@dataclass(frozen=True)
class Counts:
    """What is asked."""

    align: int
    """Questions to align on, each in every language; 1 where they could not be counted."""
    evaluate: int
    """Held-out questions."""
    is_counted: bool
    prompt_tokens: int
    choices: int


@dataclass(frozen=True)
class Work:
    """One round, at most; tokens, but where it says otherwise. Where nothing could be counted: of one question."""

    questions: int
    held_out: int
    is_counted: bool
    prompt_tokens: int
    completions: int
    """Completions that are sampled."""
    sampled: int
    """Tokens of them."""
    translated: int
    """Tokens of winning completions that the model carries into other languages."""
    scored: int
    """Tokens that engines read to score candidates of the questions to align on."""
    pairs: int
    """Pairs to train on."""
    pair_tokens: int
    """Tokens of one pair, all sides that are computed, each with its prompt."""
    answered: int
    """Tokens that engines write to answer the held-out questions."""
    asked: int
    """Tokens that they read for it."""
    disk: dict[str, int]
    """Bytes in the run's storage, by what they are, of one round."""
    cache: dict[str, int]
    """Bytes in the cache of each node, by what they are."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def count_questions(config: Config) -> Counts:
    """The questions of a run, where their files are on this machine; else of one question, and of one held out.

    Raises InputError where the files are there and hold no question.
    """
    if config.model == WORLD:
        from calm_ray.demo.generator import build_world, world_questions

        asked, held_out = world_questions(build_world(config.world.seed))
        return _counts(asked, _distinct(held_out))
    places = config.questions
    assert places.align is not None
    align = _read(config, places.align)
    if align is None or places.align_subjects or places.evaluate_subjects:
        return Counts(1, 1, False, PROMPT_TOKENS, CHOICES)
    if places.split is not None:
        whole, train = _counts(align, 0), places.split.train
        return Counts(min(train, whole.align), max(0, whole.align - train), True, whole.prompt_tokens, whole.choices)
    if places.evaluate is None:
        return _counts(align, 0)
    evaluate = _read(config, places.evaluate)
    return _counts(align, _distinct(evaluate)) if evaluate is not None else Counts(1, 1, False, PROMPT_TOKENS, CHOICES)


def _read(config: Config, source: str) -> list[Question] | None:
    from calm_ray.questions.reader import take_in
    from calm_ray.questions.sources import matching

    if source.startswith("hub:") or not matching(source.replace("{language}", "*")):
        return None
    languages = list(dict.fromkeys([*config.languages, *config.asked_languages]))
    found = take_in(
        source, languages, on_bad_row="skip", language=config.questions.language, allow_missing=languages,
        allow_open=True,
    ).questions  # fmt: skip
    if not found:
        raise InputError(f"questions: {source} holds no question in {', '.join(languages)}")
    return found


def _distinct(questions: Sequence[Question]) -> int:
    return len({question["question_id"] for question in questions})


def _counts(align: Sequence[Question], evaluate: int) -> Counts:
    size = sum(len((question["text"] + "".join(question["choices"])).encode()) for question in align)
    choices = max(len(question["choices"]) for question in align)
    return Counts(_distinct(align), evaluate, True, max(1, size // len(align) // BYTES_PER_TOKEN), choices)


def work_of(config: Config, shape: Shape, counts: Counts) -> Work:
    """What one round takes: every completion as long as `sampling.max_new_tokens` lets it be, and in a pair."""
    sampling, languages = config.sampling, len(config.languages)
    prompt = min(counts.prompt_tokens, context_of(config, shape) - 1)
    reply = min(sampling.max_new_tokens, context_of(config, shape) - prompt)
    rows = counts.align * languages
    completions = rows * sampling.completions if config.samples else 0
    form = config.candidates.form if config.candidates else None
    side = reply if config.votes or form == "samples" else 1 if form == "letters" else CHOICE_TOKENS
    candidates = config.candidates.most if config.candidates and form == "samples" else counts.choices
    pairs = _pairs(config, counts)
    sides = 1 if config.objective == "sft" else 2
    scored = 0 if config.candidates is None else rows * _read_to_score(form, prompt, side, candidates)
    asked = counts.evaluate * len(config.asked_languages)
    translates = config.samples and config.preferences.translator == "model" and languages > 1
    disk = _disk(config, shape, completions, pairs, prompt, reply if config.samples else side)
    return Work(
        questions=counts.align, held_out=counts.evaluate, is_counted=counts.is_counted, prompt_tokens=prompt,
        completions=completions, sampled=completions * reply, translated=pairs * side if translates else 0,
        scored=scored, pairs=pairs, pair_tokens=sides * (prompt + side),
        answered=asked * reply if config.answers_by_writing else 0,
        asked=asked * (prompt if config.answers_by_writing else _read_to_score(form, prompt, side, candidates)),
        disk=disk, cache=_cache(config, shape),
    )  # fmt: skip


def _read_to_score(form: str | None, prompt: int, side: int, candidates: int) -> int:
    """Tokens read to score a question's candidates: letters in one request, others in one for each."""
    return prompt if form == "letters" else candidates * (prompt + side)


def _pairs(config: Config, counts: Counts) -> int:
    """Pairs of one round at most: of every completion that loses, or as many as are drawn of candidates."""
    languages = len(config.languages)
    if not config.rounds:  # nothing is trained
        return 0
    if config.votes:
        preferences = config.preferences
        losing = min(preferences.negatives or config.sampling.completions, config.sampling.completions)
        return counts.align * languages * losing * preferences.positives
    if config.method == "dco":
        return counts.align * config.dco.pairs * (2 if config.dco.languages == "bilingual" else languages)
    return counts.align * languages


def _disk(config: Config, shape: Shape, completions: int, pairs: int, prompt: int, reply: int) -> dict[str, int]:
    """Bytes of one round in the run's storage."""
    each = TOKEN_ID_BYTES + BYTES_PER_TOKEN
    policy, checkpoint = _trained(config, shape)
    return {
        "samples": completions * (prompt + reply) * each,
        "pairs": pairs * (prompt + 2 * reply) * each,
        "weights" if config.train.lora is None else "adapter": policy,
        "checkpoints": CHECKPOINTS * checkpoint,
    }


def _cache(config: Config, shape: Shape) -> dict[str, int]:
    """Bytes on a node's own disk: its copies, and a checkpoint on its way to or from the storage."""
    is_copied = config.model == WORLD or not RunModel(config.model).is_folder
    is_merged = config.engines.refresh == "merged" and config.train.lora is not None
    whole = BYTES["bfloat16"] * shape.parameters
    policy, checkpoint = _trained(config, shape)
    return {
        "model": whole * is_copied,
        f"{POLICIES} policies": POLICIES * policy,
        "2 merged models": 2 * whole * is_merged,  # the one of before goes when the new one is loaded
        "checkpoint": checkpoint,
    }


def _trained(config: Config, shape: Shape) -> tuple[int, int]:
    """Bytes of a policy, and of a checkpoint: what is trained and Adam's two moments, in float32."""
    lora = config.train.lora
    if lora is None:
        return BYTES["bfloat16"] * shape.parameters, 3 * FLOAT32 * shape.parameters
    trained = FLOAT32 * shape.lora_parameters(lora)
    return trained, 3 * trained
