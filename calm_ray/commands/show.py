"""`calm-ray show`: follows one question of a run through the steps of a round."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from calm_ray.core.console import console
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question, rows_of
from calm_ray.job.open_run import open_run
from calm_ray.job.summary import print_summary
from calm_ray.methods.round import QuestionView
from calm_ray.prompts.questions import question_text
from calm_ray.run.stage import Stage


def show(location: str, round_number: int, question_id: str | None, plugins: Sequence[str] = ()) -> None:
    """Prints a question in its languages and what each step made of it."""
    opened = open_run(location, plugins)
    run, config = opened.run, opened.config
    if run.storage.exists("summary.json"):
        print_summary(config, run.summary)
    examples = run.stage(round_number, config.steps[-1].name)
    if not examples.is_finished:
        raise InputError(f"{run.uri}: round {round_number} has no pairs yet; choose another with --round")
    chunk, found = _find(examples, run.questions("align"), question_id)
    rows = rows_of(run.questions("align").read_chunk(chunk))
    questions = [row for row in rows if row["question_id"] == found]
    _show_questions(questions)
    view = QuestionView(run, round_number, config.languages, chunk, questions)
    for step in (*config.steps, *config.evaluation):
        step.show(view)


def _find(examples: Stage, questions: Stage, question_id: str | None) -> tuple[str, str]:
    """The chunk and id of the question; by default, of the first that is trained on, or of the first of all."""
    for stage in (examples, questions) if question_id is None else (questions,):
        for chunk in sorted(questions.chunks()):
            for row in rows_of(stage.read_chunk(chunk)):
                if question_id in (None, row["question_id"]):
                    return chunk, row["question_id"]
    raise InputError(f"question {question_id!r} is not in this run" if question_id else "this run has no questions")


def _show_questions(questions: list[Question]) -> None:
    table = Table(title=f"question {questions[0]['question_id']}", title_justify="left", show_lines=True)
    for row in questions:
        table.add_column(row["language"])
    table.add_row(*(question_text(row) for row in questions))
    console.print(table)
