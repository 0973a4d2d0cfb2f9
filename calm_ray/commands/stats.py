"""`calm-ray stats`: which languages vote, win and are right, in a run or in completions on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calm_ray.core.console import use_stderr
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
    """Returns a title and the counts. `is_default` means that no counting rules were given; a run has its own.

    Raises InputError if a run has nothing to count, or is named together with anything else.
    """
    run = find_run(sources[0])
    if run is None:
        with use_stderr(as_json):
            counted = count_recorded(sources, preferences, seed=seed, questions=questions, on_bad_row=on_bad_row)
        return f"{sources[0]}, {preferences.preset}", counted
    if len(sources) > 1 or questions or not is_default:
        raise InputError(f"{run.uri} is a run and uses its own counting rules; name it alone")
    return f"{run.uri}, round {round_number}", _of_run(run, round_number)


def _of_run(run: RunDirectory, round_number: int) -> dict[str, Any]:
    """The statistics of a round's pairs and the vote behind them."""
    pairs = run.stage(round_number, VoteAndPair.name)
    if not pairs.is_finished:
        raise InputError(f"{run.uri}: round {round_number} has no pairs yet; choose another with --round")
    if "vote" not in pairs.record:
        raise InputError(f"{run.uri}: its pairs come from candidates, not from a vote; see them with `calm-ray show`")
    return dict(pairs.record["vote"])
