"""Brings questions into a run in all its languages: translates missing ones and writes chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from calm_ray.config import Config
from calm_ray.core.console import say
from calm_ray.core.errors import BadRow
from calm_ray.core.rows import BASE_POLICY, Question
from calm_ray.engines.pool import EnginePool
from calm_ray.job.preflight import Inputs
from calm_ray.job.prompt_limits import candidate_check, too_long
from calm_ray.questions.parallel import BAD_ROWS, as_lines
from calm_ray.questions.reader import Intake, write_chunks
from calm_ray.questions.seq2seq import Seq2SeqTranslator
from calm_ray.questions.translation import (
    BATCH,
    ModelQuestionTranslator,
    QuestionTranslator,
    Report,
    translate_missing,
)
from calm_ray.run.directory import RunDirectory, Split
from calm_ray.run.policies import RunModel
from calm_ray.run.storage import Storage

HELD_OUT: Split = "held_out"
TRANSLATIONS = ".translations"
"""Under `storage`, next to the runs, so that all runs share translations."""


def take_questions(config: Config, run: RunDirectory, model: RunModel, pool: EnginePool, inputs: Inputs) -> None:
    """Writes the training and held-out questions into the run, once, and lists the dropped rows."""
    splits: list[tuple[Split, Intake, list[str]]] = [
        ("align", inputs.align, config.languages),
        (HELD_OUT, inputs.evaluate, config.evaluation_languages),
    ]
    for split, intake, languages in splits:
        stage = run.questions(split)
        if stage.is_finished:
            continue
        questions, report = list(intake.questions), Report()
        if config.questions.translate is not None:
            questions, report = _translated(questions, languages, config, model, pool)
        if split == HELD_OUT:
            complete = complete_questions(questions, languages)
            if lost := len(ids_of(questions)) - len(ids_of(complete)):
                say(f"questions, held out: dropped {lost} missing in some language")
            questions = complete
        if intake.skipped:
            say(f"questions, {split}: dropped {len(intake.skipped)} bad rows; see {stage.storage.uri(BAD_ROWS)}")
            stage.storage.write(BAD_ROWS, as_lines(intake.skipped))
        write_chunks(
            questions,
            stage,
            config.sampling.prompts_per_chunk,
            skipped=len(intake.skipped),
            repaired=intake.repaired,
            translated=report,
        )


def _translated(
    questions: list[Question], languages: Sequence[str], config: Config, model: RunModel, pool: EnginePool
) -> tuple[list[Question], Report]:
    translator = _translator(config, model, pool)
    cache = Storage(config.storage).under(TRANSLATIONS)
    questions, report = translate_missing(questions, languages, translator, cache)
    for language, count in report.items():
        rest = f"{count['failed']} failed and {count['identical']} came back unchanged, and do not vote"
        say(f"  {language}: {count['translated']} of {count['asked']} questions translated; {rest}")
    check = candidate_check(model.local_folder(weights=False), config)
    lost = {id(row) for row in questions if check is not None and _is_flawed(row, check)}
    if lost:
        say(f"  dropped {len(lost)} translated questions with candidates that cannot be scored")
    questions = [row for row in questions if id(row) not in lost]
    lost = {id(row) for row, *_ in too_long(model.local_folder(weights=False), questions, config)}
    if lost:
        say(f"  dropped {len(lost)} translated questions that are too long for the engines")
    return [row for row in questions if id(row) not in lost], report


def _translator(config: Config, run_model: RunModel, pool: EnginePool) -> QuestionTranslator:
    max_new_tokens = config.sampling.max_new_tokens
    if config.questions.translate == "model":
        identity = f"{run_model.name} {run_model.sha256} {BASE_POLICY} {max_new_tokens}"
        batch = BATCH * len(pool.replicas)
        return ModelQuestionTranslator(lambda messages: pool.text_service(messages, max_new_tokens), identity, batch)
    # Uses the resources of the training workers, which have not started yet.
    train, gpus = config.train, 1.0 if config.device == "gpu" else 0.0
    model = RunModel(str(config.questions.translate))
    return Seq2SeqTranslator(model, train.max_workers, train.cpus_per_worker, gpus)


def _is_flawed(question: Question, check: Callable[[Question], None]) -> bool:
    try:
        check(question)
    except BadRow:
        return True
    return False


def ids_of(questions: Sequence[Question]) -> set[str]:
    return {row["question_id"] for row in questions}


def complete_questions(questions: Sequence[Question], languages: Sequence[str]) -> list[Question]:
    """Returns the questions present in every language; only those can be compared across languages."""
    present = {(row["question_id"], row["language"]) for row in questions}
    return [row for row in questions if all((row["question_id"], code) in present for code in languages)]
