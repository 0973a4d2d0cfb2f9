"""`calm-ray stats`: who votes, wins and is right, of a run or of completions that lie on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calm_ray.core.console import on_stderr
from calm_ray.core.errors import InputError
from calm_ray.job.open_run import find_run
from calm_ray.methods.calm.from_disk import count_recorded
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_and_pair import VoteAndPair
from calm_ray.questions.reader import OnBadRow
from calm_ray.run.directory import RunDirectory


def statistics(
    sources: Sequence[str],
    preferences: Preferences,
    *,
    round_number: int,
    seed: int,
    questions: str | None,
    on_bad_row: OnBadRow,
    is_default: bool,
    as_json: bool,
) -> tuple[str, dict[str, Any]]:
    """A title, and what was counted. `is_default`: no rule of counting was named, as a run has its own.

    Raises InputError where a run has nothing to count, or is named beside something else.
    """
    run = find_run(sources[0])
    if run is None:
        with on_stderr(as_json):
            counted = count_recorded(sources, preferences, seed=seed, questions=questions, on_bad_row=on_bad_row)
        return f"{sources[0]}, {preferences.preset}", counted
    if len(sources) > 1 or questions or not is_default:
        raise InputError(f"{run.uri} is a run, which was counted by its own rules; name it alone")
    return f"{run.uri}, round {round_number}", _of_run(run, round_number)


def _of_run(run: RunDirectory, round_number: int) -> dict[str, Any]:
    """What the pairs of a round and the vote behind them amount to."""
    pairs = run.stage(round_number, VoteAndPair.name)
    if not pairs.is_finished:
        raise InputError(f"{run.uri}: round {round_number} has no pairs yet; name another with --round")
    if "vote" not in pairs.record:
        raise InputError(f"{run.uri}: its pairs come from candidates, not from a vote; see it with `calm-ray show`")
    return dict(pairs.record["vote"])
