"""PREFER: completions vote, and each losing one is paired with a winning one in its language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calm_ray.core.console import console
from calm_ray.core.rows import Pair, Question, Vote, gold_of, rows_of, table
from calm_ray.core.settings import RunSettings
from calm_ray.evaluation.tables import percent
from calm_ray.methods.base import ChunkJob, Column, Entry
from calm_ray.methods.calm.pairs import (
    Draft,
    Questions,
    draft_pairs,
    finish_pairs,
    reworded_losers,
    translate_winners,
)
from calm_ray.methods.calm.settings import OPTION_TEXT, Preferences
from calm_ray.methods.calm.vote_audit import print_vote_audit
from calm_ray.methods.calm.vote_report import columns_of_pairs, count_samples, sample_report
from calm_ray.methods.calm.voting import Ballots, Election, ballots_of, elect, right_answers, vote_rows
from calm_ray.methods.round import QuestionView, Round
from calm_ray.methods.shared.pairs import PAIRS_COLUMN, PairStep
from calm_ray.methods.shared.sample import completions_of
from calm_ray.methods.translation import load_tokenizer, make_translator
from calm_ray.methods.work import BYTES_PER_TOKEN, Sizes, Work
from calm_ray.run.policies import RunModel
from calm_ray.run.stage import Stage

if TYPE_CHECKING:
    from calm_ray.engines.text_service import TextService

VOTES = "votes"
MOSTLY = 0.5
"""Fraction of unparseable completions above which they are the reason that there are no pairs."""
VOTE_COLUMN = Column(
    "vote*",
    lambda entry: percent(entry.get("vote_accuracy")),
    "* accuracy of the vote over all languages on the sampled questions; gold is reported, never trained on",
)


@dataclass(frozen=True)
class VoteAndPair(PairStep):
    """Votes on every question and pairs the completions (CALM, section 2.2)."""

    settings: RunSettings
    preferences: Preferences

    title = "vote and pair"
    also_fills = (VOTES,)
    reads = ("questions", "sample")
    keys = ("preferences",)
    columns = (VOTE_COLUMN, PAIRS_COLUMN)

    def job(self, round: Round, output: Stage, inputs: Sequence[Stage]) -> ChunkJob:
        round.engines.refresh(round.start)  # the policy may also have to translate its completions
        return VoteJob(
            questions=inputs[0],
            completions=inputs[1],
            votes=round.stage(VOTES),
            pairs=output,
            settings=self.settings,
            preferences=self.preferences,
            model=round.model,
            round_number=round.number,
            text_service=round.engines.text_service,
        )

    def note(self, made: Counter[str]) -> str:
        dropped = made["drafts"] - made["pairs"]
        return f"{made['pairs']} pairs" + (f", {dropped} not translated" if dropped else "")

    def record(self, counts: Counter[str]) -> Entry:
        return {**super().record(counts), "vote": sample_report(counts)}

    def announce(self, record: Entry) -> None:
        if record["vote"]["audit"] is not None:
            print_vote_audit(record["vote"]["audit"], list(record["vote"]["pairs_by_language"]))

    def empty_reason(self, record: Entry) -> str:
        unparseable = record["vote"]["unparseable_samples"]
        if unparseable > MOSTLY:
            return (
                f"{unparseable:.0%} of the completions have no answer that could be read, so there was nothing to vote "
                "on; `calm-ray show` prints some. The model may be too small to answer with a letter, or "
                "sampling.max_new_tokens too low"
            )
        return "every question with a winner is unanimous"

    def work(self, sizes: Sizes, before: Mapping[str, Work]) -> Work:
        """Assumes that every completion loses and every chosen side must be translated."""
        preferences, completions = self.preferences, self.settings.sampling.completions
        losing = min(preferences.negatives or completions, completions)
        pairs = sizes.questions * sizes.languages * losing * preferences.positives
        translates = preferences.translator == "model" and sizes.languages > 1
        return Work(
            rows=pairs,
            unit="pairs",
            written=pairs * sizes.reply if translates else 0,
            side=sizes.reply,
            disk=pairs * (sizes.prompt + 2 * sizes.reply) * BYTES_PER_TOKEN,
        )

    def summary_of_start(self, record: Entry) -> Entry:
        """The voting completions were sampled from the policy the round starts from."""
        return {"vote_accuracy": record["vote"]["vote_accuracy"], "vote": record["vote"]}

    def show(self, view: QuestionView) -> None:
        gold = view.questions[0]["gold"]
        for row in view.rows(VOTES):
            _show_vote(row, gold)
        super().show(view)


@dataclass(frozen=True)
class VoteJob(ChunkJob):
    """Turns one chunk of completions, in all languages, into votes and pairs."""

    questions: Stage
    completions: Stage
    votes: Stage
    pairs: Stage
    settings: RunSettings
    preferences: Preferences
    model: RunModel
    round_number: int
    text_service: TextService

    def make(self, chunk: str) -> Counter[str]:
        completions = completions_of(self.completions, chunk, self.settings.languages)
        questions = {(q["question_id"], q["language"]): q for q in rows_of(self.questions.read_chunk(chunk))}
        ballots = ballots_of(completions)
        election = self._elect(ballots, questions.values())
        drafts = draft_pairs(completions, ballots, election, self.preferences, self.settings.seed)
        texts = self._chosen_texts(drafts, questions)
        form = self.settings.sampling.prompt
        pairs = finish_pairs(drafts, texts, questions, load_tokenizer(self.model), form, self.round_number)
        self.votes.write(chunk, table(Vote, vote_rows(ballots, election)))
        self.pairs.write(chunk, table(Pair, pairs))
        return Counter(drafts=len(drafts), pairs=len(pairs))

    def _chosen_texts(self, drafts: Sequence[Draft], questions: Questions) -> Sequence[str | None]:
        if self.preferences.translator == OPTION_TEXT:
            return reworded_losers(drafts, questions)
        translator = make_translator(self.preferences.translator, self.settings, self.text_service)
        return translate_winners(drafts, questions, translator)

    def count(self, chunk: str) -> Counter[str]:
        """Counts a chunk for the round's report, which compares with gold answers after the pairs have been written."""
        questions = rows_of(self.questions.read_chunk(chunk))
        ballots = ballots_of(completions_of(self.completions, chunk, self.settings.languages))
        pairs = columns_of_pairs(rows_of(self.pairs.read_chunk(chunk)), ballots)
        return count_samples(
            ballots,
            self._elect(ballots, questions),
            pairs,
            right_answers(ballots, gold_of(questions)),
            as_released=self.preferences.preset == "released",
        )

    def _elect(self, ballots: Ballots, questions: Iterable[Question]) -> Election:
        is_gold = self.preferences.winner == "gold"
        right = right_answers(ballots, gold_of(questions)) if is_gold else None
        return elect(ballots, self.preferences, self.settings.seed, right)


def _show_vote(vote: Vote, gold: str | None) -> None:
    counts = ", ".join(f"{answer}: {count}" for answer, count in vote["counts"].items())
    known = f"; gold answer, for reference: {gold}" if gold else ""
    winner = vote["winner"] or "none (tied)"
    console.print(f"vote: {counts}; winner {winner}, agreement {vote['agreement']:.0%}{known}\n")
