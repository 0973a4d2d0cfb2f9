"""Votes and pairs on Ray Data equal those of the pure functions, and depend only on completions."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from calm_ray.cluster.over_chunks import over_chunks, sum_over_chunks
from calm_ray.core.rows import Completion, Question, rows_of, table
from calm_ray.demo.generator import World, build_world, lexicon, world_questions
from calm_ray.demo.tokenizer import build_tokenizer
from calm_ray.demo.translator import WorldTranslator
from calm_ray.engines.health import Heartbeats
from calm_ray.engines.replica import EngineHandle
from calm_ray.engines.requests import Write
from calm_ray.engines.text_service import TextService
from calm_ray.methods.calm.pairs import draft_pairs, finish_pairs, translate_winners
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_and_pair import VoteJob
from calm_ray.methods.calm.voting import ballots_of, elect, vote_rows
from calm_ray.prompts.questions import LETTERS, prompt_text
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.questions.reader import write_chunks
from calm_ray.recipes.load import load_config
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.testing import write_tiny_model

pytestmark = pytest.mark.usefixtures("ray_8_cpus")

LANGUAGES = ["en", "fr", "ru"]
CPUS = 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), build_tokenizer(build_world(100)))


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    rows, _ = world_questions(build_world(100))
    return [row for row in rows[: 4 * 30] if row["language"] in LANGUAGES]


def completion(world: World, question: Question, sample: int, letter: str, prompt: list[int]) -> Completion:
    """A completion by a model that chooses `letter` in this world."""
    topic, name = question["question_id"].split("-")
    town = next(number for number in range(len(world.towns)) if world.name(number, "en").lower() == name)
    values = lexicon()["topics"][topic]["values"][question["language"]]
    options = [values.index(choice) for choice in question["choices"]]
    text = world.answer(town, topic, options[LETTERS.index(letter)], options, question["language"])
    return Completion(
        question_id=question["question_id"], language=question["language"], sample=sample, round=1, text=text,
        prompt_token_ids=prompt, token_ids=[50 + sample, 1], logp=-1.0, answer=letter, policy="base",
        finish_reason="stop",
    )  # fmt: skip


def make_text_service(engines: list[EngineHandle]) -> TextService:
    return TextService(
        engines,
        Policy(),
        heartbeats=ray.remote(num_cpus=0)(Heartbeats).remote(),
        seconds=60,
        heartbeat_timeout_s=60,
    )


def make_job(folder: Path, model: Path, questions: list[Question], **changes: Any) -> VoteJob:
    """A job on these questions with random completions, which only depend on question and language."""

    def stage(name: str) -> Stage:
        return Stage(Storage(str(folder / name)))

    job = VoteJob(
        questions=stage("questions"), completions=stage("sample"), votes=stage("votes"), pairs=stage("pairs"),
        settings=load_config(None, ["world.seed=100", f"languages=[{', '.join(LANGUAGES)}]"]),
        preferences=Preferences(translator="world"), model=RunModel(str(model)), round_number=1,
        text_service=make_text_service([]),
    )  # fmt: skip
    write_chunks(questions, job.questions, prompts_per_chunk=15)
    world, tokenizer = build_world(100), build_tokenizer(build_world(100))
    for chunk in job.questions.chunks():
        for language in LANGUAGES:
            rows = []
            for question in rows_of(job.questions.read_chunk(chunk)):
                if question["language"] == language:
                    rng = random.Random(question["question_id"] + language)
                    prompt = encode_prompt(tokenizer, prompt_text(question, "choices"))
                    rows += [completion(world, question, n, rng.choice("AAB"), prompt) for n in range(3)]
            job.completions.write(f"{chunk}-{language}", table(Completion, rows))
    return replace(job, **changes)


def run_job(job: VoteJob) -> None:
    list(over_chunks(job.make, sorted(job.questions.chunks())))


def test_pipeline_matches_the_pure_functions(tmp_path: Path, model: Path, questions: list[Question]) -> None:
    job = make_job(tmp_path, model, questions)
    run_job(job)
    groups: dict[str, list[Completion]] = {}
    for row in rows_of(job.completions.read()):
        groups.setdefault(row["question_id"], []).append(row)
    lookup = {(row["question_id"], row["language"]): row for row in questions}
    votes, pairs = [], []
    for rows in groups.values():
        ballots = ballots_of(rows)
        election = elect(ballots, job.preferences, 0)
        votes += vote_rows(ballots, election)
        drafts = draft_pairs(rows, ballots, election, job.preferences, 0)
        texts = translate_winners(drafts, lookup, WorldTranslator(build_world(100)))
        pairs += finish_pairs(drafts, texts, lookup, build_tokenizer(build_world(100)), "choices", 1)

    def by_id(rows: list[Any]) -> list[Any]:
        return sorted(rows, key=lambda row: (row["question_id"], row.get("pair", 0)))

    assert by_id(rows_of(job.votes.read())) == by_id(votes)
    written = by_id(rows_of(job.pairs.read()))
    assert written == by_id(pairs)
    assert {row["language"] for row in written} == set(LANGUAGES)
    translated = [row for row in written if row["chosen_language"] != row["language"]]
    assert translated
    for row in written:
        assert row["chosen_answer"] != row["rejected_answer"]
        assert row["chosen_token_ids"][-1] == row["rejected_token_ids"][-1] == 1
    assert len(job.questions.chunks()) == 2
    assert sum_over_chunks(job.count, sorted(job.questions.chunks()))["pairs"] == len(pairs)


def test_pairs_do_not_depend_on_gold_answers(tmp_path: Path, model: Path, questions: list[Question]) -> None:
    def with_gold(gold: str | None) -> list[Question]:
        return [Question(**{**row, "gold": gold}) for row in questions]

    jobs = [
        make_job(tmp_path / str(gold), model, rows)
        for gold, rows in (("true", questions), ("C", with_gold("C")), ("none", with_gold(None)))
    ]
    for job in jobs:
        run_job(job)
    for chunk in jobs[0].questions.chunks():
        for other in jobs[1:]:
            assert other.pairs.read_chunk(chunk).equals(jobs[0].pairs.read_chunk(chunk))
            assert other.votes.read_chunk(chunk).equals(jobs[0].votes.read_chunk(chunk))
    # The reports do depend on gold: no completion answers C.
    reports = [sum_over_chunks(job.count, sorted(job.questions.chunks())) for job in jobs]
    assert reports[0] != reports[1] != reports[2]
    assert reports[0]["pairs"] == reports[1]["pairs"] == reports[2]["pairs"] > 0


def start_fake_engines(count: int) -> list[EngineHandle]:
    """Actors that translate by a rule, and always fail to translate into French."""

    class FakeEngine:
        def write(self, request: Write, policy: Policy, ticket: int) -> list[str]:
            return [self._reply(message) for message in request.messages]

        def _reply(self, message: str) -> str:
            if "into French" in message:
                return "Je ne sais pas."
            marker = "Answer:" if "into English" in message else "Ответ:"
            return f"{marker} {message.strip()[-1]}"

    return [EngineHandle(ray.remote(num_cpus=0)(FakeEngine).remote()) for _ in range(count)]


def test_engines_translate_and_bad_translations_are_dropped(
    tmp_path: Path, model: Path, questions: list[Question]
) -> None:
    engines = start_fake_engines(2)
    preferences = Preferences(translator="model")
    job = make_job(tmp_path, model, questions, preferences=preferences, text_service=make_text_service(engines))
    run_job(job)
    expected, translated = (
        [row for row in pairs if row["chosen_language"] != row["language"]]
        for pairs in (exactly_translated_pairs(tmp_path / "exact", model, questions), rows_of(job.pairs.read()))
    )
    assert "fr" in {row["language"] for row in expected}
    assert {row["language"] for row in translated} == {row["language"] for row in expected} - {"fr"}
    for row in translated:
        assert row["chosen"] == f"{'Answer' if row['language'] == 'en' else 'Ответ'}: {row['chosen_answer']}"
        assert row["chosen_token_ids"][-1] == 1
    for engine in engines:
        engine.stop()


def exactly_translated_pairs(folder: Path, model: Path, questions: list[Question]) -> list[Any]:
    """The pairs when the demo world translates, which never fails."""
    job = make_job(folder, model, questions)
    run_job(job)
    return rows_of(job.pairs.read())
