import pytest
from factories import completions

from calm_ray.config import Preferences
from calm_ray.preferences.voting import most_frequent, vote


def test_majority_over_all_languages_and_samples() -> None:
    result = vote(completions({"en": "BBA", "fr": "AAB", "zh": "BBB"}), Preferences(), seed=0)
    assert result["winner"] == "B"
    assert result["counts"] == {"A": 3, "B": 6}
    assert result["agreement"] == pytest.approx(6 / 9)
    assert result["by_language"] == {"en": "B", "fr": "A", "zh": "B"}
    assert not result["tied"]


def test_unreadable_completions_do_not_vote() -> None:
    result = vote(completions({"en": "---", "fr": "-A-"}), Preferences(), seed=0)
    assert (result["winner"], result["agreement"]) == ("A", 1.0)
    assert result["by_language"] == {"en": None, "fr": "A"}
    assert vote(completions({"en": "--"}), Preferences(), seed=0)["winner"] is None


@pytest.mark.parametrize(("ties", "winner"), [("drop", None), ("smallest", "B")])
def test_tie_rules(ties: str, winner: str | None) -> None:
    assert most_frequent(["C", "B", "C", "B", "A"], ties) == (winner, True)


def test_random_winner_is_one_of_the_given_answers_and_repeats_with_its_seed() -> None:
    rows = completions({"en": "AAAAAAC"})
    control = Preferences(winner="random")
    winners = [vote(rows, control, seed)["winner"] for seed in range(200)]
    assert set(winners) == {"A", "C"}
    # Each given answer once: the rare answer wins about as often as the frequent one.
    assert 60 < winners.count("C") < 140
    assert winners == [vote(rows, control, seed)["winner"] for seed in range(200)]
