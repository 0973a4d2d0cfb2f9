"""Questions in, completions, predictions or scores out, through any `Generator`. Knows nothing of Ray or vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from calm_ray.core.rows import CandidateSet, Completion, Prediction, Question, Scored
from calm_ray.core.seeds import derive_seed
from calm_ray.engines.generator import Decoding, Generated, Generator
from calm_ray.prompts.extraction import read_answers
from calm_ray.prompts.questions import prompt_text
from calm_ray.prompts.rendering import encode_prompt


def complete(
    generator: Generator,
    questions: Sequence[Question],
    decoding: Decoding,
    *,
    instruction: bool,
    extraction: str = "strict",
    seed: int,
    round_number: int,
) -> list[Completion]:
    """`decoding.samples` completions of each question, in the questions' order; `extraction` says how they are read.

    A question's seed is a hash of (seed, round, question, language), so it does not matter which engine it falls on.
    """
    prompts = [encode_prompt(generator.tokenizer, prompt_text(question, instruction)) for question in questions]
    seeds = [derive_seed(seed, round_number, row["question_id"], row["language"]) for row in questions]
    rows = []
    for question, prompt, generated in zip(
        questions, prompts, generator.generate(prompts, decoding, seeds), strict=True
    ):
        texts = [completion.text for completion in generated]
        answers = read_answers(extraction, texts, question["language"], question["choices"])
        for sample, (completion, answer) in enumerate(zip(generated, answers, strict=True)):
            rows.append(_row(question, prompt, completion, answer, sample, round_number, generator.policy))
    return rows


def predict(
    generator: Generator,
    questions: Sequence[Question],
    *,
    instruction: bool,
    max_new_tokens: int,
    extraction: str = "strict",
) -> list[Prediction]:
    """The greedy answer to each question."""
    greedy = Decoding(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens)
    rows = complete(
        generator, questions, greedy, instruction=instruction, extraction=extraction, seed=0, round_number=0
    )
    return [
        Prediction(
            question_id=row["question_id"],
            language=row["language"],
            answer=row["answer"],
            text=row["text"],
            policy=row["policy"],
        )
        for row in rows
    ]


def unanswered(question: Question, policy: str) -> Prediction:
    """What stands for the answer to a question that no engine survives."""
    return Prediction(
        question_id=question["question_id"], language=question["language"], answer=None, text="", policy=policy
    )


def score(generator: Generator, candidates: Sequence[CandidateSet], *, with_prompt: bool) -> list[Scored]:
    """How likely the generator's policy finds each candidate of each question, in the questions' order."""
    prompts = [row["prompt_token_ids"] for row in candidates]
    found = generator.score(prompts, [row["token_ids"] for row in candidates], with_prompt=with_prompt)
    return [
        Scored(**row, logps=one.logps, prompt_logp=one.prompt_logp, policy=generator.policy)
        for row, one in zip(candidates, found, strict=True)
    ]


def _row(
    question: Question,
    prompt: list[int],
    completion: Generated,
    answer: str | None,
    sample: int,
    round_number: int,
    policy: str,
) -> Completion:
    return Completion(
        question_id=question["question_id"],
        language=question["language"],
        sample=sample,
        round=round_number,
        text=completion.text,
        prompt_token_ids=prompt,
        token_ids=completion.token_ids,
        answer=answer,
        policy=policy,
        finish_reason=completion.finish_reason,
    )
