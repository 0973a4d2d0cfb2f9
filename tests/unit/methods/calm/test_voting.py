import pytest
from factories import completions

from calm_ray.core.rows import Completion, Vote
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.voting import ballots_of, elect, merge_order, right_answers, vote_rows


def hold_vote(rows: list[Completion], preferences: Preferences, seed: int = 0) -> Vote:
    ballots = ballots_of(rows)
    (result,) = vote_rows(ballots, elect(ballots, preferences, seed))
    return result


def test_majority_across_languages_and_samples() -> None:
    result = hold_vote(completions({"en": "BBA", "fr": "AAB", "zh": "BBB"}), Preferences())
    assert result["winner"] == "B"
    assert result["counts"] == {"A": 3, "B": 6}
    assert result["agreement"] == pytest.approx(6 / 9)
    assert result["by_language"] == {"en": "B", "fr": "A", "zh": "B"}
    assert not result["tied"]


def test_questions_are_counted_separately() -> None:
    rows = completions({"en": "AA", "fr": "B-"}, "q1") + completions({"fr": "CC", "en": "--"}, "q2")
    ballots = ballots_of(rows)
    first, second = vote_rows(ballots, elect(ballots, Preferences(), 0))
    assert (first["question_id"], first["winner"], first["counts"]) == ("q1", "A", {"A": 2, "B": 1})
    assert (second["question_id"], second["winner"], second["by_language"]) == ("q2", "C", {"en": None, "fr": "C"})


def test_unparseable_completions_do_not_vote() -> None:
    result = hold_vote(completions({"en": "---", "fr": "-A-"}), Preferences())
    assert (result["winner"], result["agreement"]) == ("A", 1.0)
    assert result["by_language"] == {"en": None, "fr": "A"}
    assert hold_vote(completions({"en": "--"}), Preferences())["winner"] is None


@pytest.mark.parametrize(
    ("preferences", "winner"),
    [
        (Preferences(), None),
        (Preferences(ties="smallest"), "A"),
        (Preferences(ties="first"), "C"),
        (Preferences(ties="first", merge_order=["fr", "en"]), "B"),
        # English is split between A and C; French always answers B.
        (Preferences(ties="lowest_entropy"), "B"),
    ],
)
def test_tie_rules(preferences: Preferences, winner: str | None) -> None:
    result = hold_vote(completions({"en": "CACA", "fr": "BB"}), preferences)
    assert (result["winner"], result["tied"]) == (winner, True)


def test_equal_entropies_leave_the_tie_to_the_smallest_letter() -> None:
    assert hold_vote(completions({"en": "CC", "fr": "BB"}), Preferences(ties="lowest_entropy"))["winner"] == "B"


def test_winner_needs_the_minimum_agreement() -> None:
    rows = completions({"en": "AAB", "fr": "-CA"})
    assert hold_vote(rows, Preferences(min_agreement=0.6))["winner"] == "A"
    assert hold_vote(rows, Preferences(min_agreement=0.61))["winner"] is None


@pytest.mark.parametrize(("answers", "minimum"), [("A" * 7 + "BCD" * 6, 0.28), ("A" * 14 + "BC" * 5 + "D", 0.56)])
def test_exactly_the_minimum_agreement_is_enough(answers: str, minimum: float) -> None:
    assert hold_vote(completions({"en": answers}), Preferences(min_agreement=minimum))["winner"] == "A"


def test_languages_missing_from_the_merge_order_come_first() -> None:
    ballots = ballots_of(completions({"en": "A", "cn": "B", "es": "C", "ja": "D"}))
    order = merge_order(ballots, ["ja", "zh", "en"])
    assert [ballots.languages[ballots.language[i]] for i in order] == ["es", "ja", "cn", "en"]


def test_random_winner_is_a_given_answer_and_reproducible() -> None:
    rows = completions({"en": "AAAAAAC"})
    control = Preferences(winner="random")
    winners = [hold_vote(rows, control, seed)["winner"] for seed in range(200)]
    assert set(winners) == {"A", "C"}
    # Drawn from the distinct answers: the rare one wins about as often as the frequent one.
    assert 60 < winners.count("C") < 140
    assert winners == [hold_vote(rows, control, seed)["winner"] for seed in range(200)]


def test_gold_wins_only_if_the_vote_is_right() -> None:
    rows = completions({"en": "AAB"}, "q1") + completions({"en": "AAB"}, "q2")
    ballots = ballots_of(rows)
    right = right_answers(ballots, {"q1": "A", "q2": "B"})
    election = elect(ballots, Preferences(winner="gold"), 0, right)
    assert [row["winner"] for row in vote_rows(ballots, election)] == ["A", None]
    with pytest.raises(ValueError, match="needs the gold answers"):
        elect(ballots, Preferences(winner="gold"), 0)
