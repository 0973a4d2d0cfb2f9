"""`calm-ray show`: one question of a run, as it went through the round."""

from __future__ import annotations

from difflib import SequenceMatcher
from math import exp

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from calm_ray.core.console import console
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Completion, Pair, Question, Scored, Vote, rows_of
from calm_ray.job.open_run import OpenedRun, open_run
from calm_ray.job.summary import print_summary
from calm_ray.prompts.questions import question_text
from calm_ray.run.stage import Stage


def show(location: str, round_number: int, question_id: str | None) -> None:
    """Prints a question in its languages, its completions, the vote and a coloured pair."""
    opened = open_run(location)
    if opened.run.storage.exists("summary.json"):
        print_summary(opened.run.summary)
    pairs = opened.run.stage(round_number, "pairs")
    if not pairs.is_finished:
        raise InputError(f"{opened.run.uri}: round {round_number} has no pairs yet; name another with --round")
    chunk, question_id = _find(pairs, opened.run.questions("align"), question_id)
    questions = _rows(opened.run.questions("align"), chunk, question_id)
    _show_questions(questions)
    if opened.config.samples:
        _show_completions(opened, round_number, chunk, question_id)
    if opened.config.votes:
        for row in _rows(opened.run.stage(round_number, "votes"), chunk, question_id):
            _show_vote(row, questions[0]["gold"])
    else:
        _show_scores(opened, round_number, chunk, question_id)
    for pair in _rows(pairs, chunk, question_id)[:1]:
        _show_pair(pair)


def _find(pairs: Stage, questions: Stage, question_id: str | None) -> tuple[str, str]:
    """The chunk that holds the question; where none is named, the first question that has a pair."""
    for chunk in sorted(questions.chunks()):
        stage = pairs if question_id is None else questions
        for row in rows_of(stage.read_chunk(chunk)):
            if question_id in (None, row["question_id"]):
                return chunk, row["question_id"]
    raise InputError(
        f"question {question_id!r} is not in this run" if question_id else "no question of this round has a pair"
    )


def _rows(stage: Stage, chunk: str, question_id: str) -> list:  # type: ignore[type-arg]
    return [row for row in rows_of(stage.read_chunk(chunk)) if row["question_id"] == question_id]


def _show_questions(questions: list[Question]) -> None:
    table = Table(title=f"question {questions[0]['question_id']}", title_justify="left", show_lines=True)
    for row in questions:
        table.add_column(row["language"])
    table.add_row(*(question_text(row) for row in questions))
    console.print(table)


def _show_completions(opened: OpenedRun, round_number: int, chunk: str, question_id: str) -> None:
    stage = opened.run.stage(round_number, "sample")
    table = Table(title=f"completions, round {round_number}", title_justify="left")
    for name in ("language", "sample", "answer", "completion", "policy"):
        table.add_column(name)
    for language in opened.config.languages:
        completions: list[Completion] = _rows(stage, f"{chunk}-{language}", question_id)
        for row in completions:
            table.add_row(
                language, str(row["sample"]), row["answer"] or "-", row["text"].replace("\n", " / "), row["policy"]
            )
    console.print(table)


def _show_scores(opened: OpenedRun, round_number: int, chunk: str, question_id: str) -> None:
    """How likely the round's policy finds each candidate, in nats, and its share among them; the likeliest is bold."""
    if not opened.run.stage(round_number, "score").is_finished:
        console.print(f"round {round_number} has not been scored yet")
        return
    table = Table(title=f"candidates, policy of round {round_number}", title_justify="left")
    for name in ("language", "candidate", "log p", "share"):
        table.add_column(name)
    for language in opened.config.languages:
        stage = opened.run.stage(round_number, "score")
        rows: list[Scored] = _rows(stage, f"{chunk}-{language}", question_id)
        for row in rows:
            top = max(row["logps"])
            total = sum(exp(logp - top) for logp in row["logps"])
            for choice, logp in zip(row["choices"], row["logps"], strict=True):
                cells = [language, choice.replace("\n", " / "), f"{logp:.2f}", f"{exp(logp - top) / total:.0%}"]
                table.add_row(*(escape(cell) for cell in cells), style="bold" if logp == top else "")
    console.print(table)


def _show_vote(vote: Vote, gold: str | None) -> None:
    counts = ", ".join(f"{answer}: {count}" for answer, count in vote["counts"].items())
    known = f"; the right answer, which takes no part: {gold}" if gold else ""
    winner = vote["winner"] or "none (tied)"
    console.print(f"vote: {counts}; winner {winner}, agreement {vote['agreement']:.0%}{known}\n")


def _show_pair(pair: Pair) -> None:
    carried = "" if pair["language"] == pair["chosen_language"] else f", carried over from {pair['chosen_language']}"
    sides = f"chosen {pair['chosen_answer']}{carried}, rejected {pair['rejected_answer']}"
    if (target := pair.get("target_margin")) is not None:
        sides = f"{pair['chosen_answer']} beside {pair['rejected_answer']}, target margin {target:+.2f} nats"
    console.print(f"a pair in {pair['language']}: {sides}")
    chosen, rejected = pair["chosen"], pair["rejected"]
    left, right = Text(), Text()
    for kind, a, b, c, d in SequenceMatcher(None, chosen, rejected, autojunk=False).get_opcodes():
        left.append(chosen[a:b], style="" if kind == "equal" else "bold green")
        right.append(rejected[c:d], style="" if kind == "equal" else "bold red")
    table = Table(show_header=True)
    table.add_column("chosen", style="green")
    table.add_column("rejected", style="red")
    table.add_row(left, right)
    console.print(table)
