from collections.abc import Sequence

from factories import completion, completions, question

from calm_ray.core.rows import Completion
from calm_ray.methods.calm.pairs import Draft, draft_pairs, finish_pairs, reworded_losers, translate_winners
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.voting import ballots_of, elect
from calm_ray.methods.translation import ModelTranslator
from calm_ray.prompts.passages import Passage
from calm_ray.testing import word_tokenizer


class UpperCaseTranslator:
    """Translates by upper-casing, but fails on the text in `fails`."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def translate(self, passages: Sequence[Passage]) -> list[str | None]:
        return [None if p.text == self.fails else f"{p.target}: {p.text.upper()}" for p in passages]


def drafts_of(rows: list[Completion], preferences: Preferences, seed: int = 0) -> list[Draft]:
    ballots = ballots_of(rows)
    return draft_pairs(rows, ballots, elect(ballots, preferences, seed), preferences, seed)


def letters_of(drafts: list[Draft]) -> list[tuple[str, str | None, str, str | None]]:
    return [(d.winner["language"], d.winner["answer"], d.loser["language"], d.loser["answer"]) for d in drafts]


def test_losing_completions_prefer_a_winner_in_their_language() -> None:
    drafts = drafts_of(completions({"en": "BBA", "fr": "ABB"}), Preferences())
    assert letters_of(drafts) == [("en", "B", "en", "A"), ("fr", "B", "fr", "A")]
    assert not any(draft.is_translated for draft in drafts)


def test_winner_is_translated_if_the_language_has_none() -> None:
    drafts = drafts_of(completions({"en": "BBB", "fr": "ACA"}), Preferences())
    assert letters_of(drafts) == [("en", "B", "fr", "A"), ("en", "B", "fr", "C"), ("en", "B", "fr", "A")]
    assert all(draft.is_translated for draft in drafts)


def test_unparseable_completions_neither_win_nor_lose() -> None:
    drafts = drafts_of(completions({"en": "BB-", "fr": "-A-"}), Preferences())
    assert [(d.loser["language"], d.loser["sample"]) for d in drafts] == [("fr", 1)]


def test_dropped_tie_gives_no_pairs() -> None:
    rows = completions({"en": "AB", "fr": "BA"})
    assert drafts_of(rows, Preferences()) == []
    assert len(drafts_of(rows, Preferences(ties="smallest"))) == 2


def test_positives_and_negatives_set_the_number_of_pairs() -> None:
    rows = completions({"en": "BBB", "fr": "AAC"})
    assert len(drafts_of(rows, Preferences(positives=2))) == 6
    assert len(drafts_of(rows, Preferences(positives=9))) == 9
    assert len(drafts_of(rows, Preferences(negatives=1))) == 1


def test_positives_of_a_completion_are_distinct() -> None:
    rows = [completion("B", "en", n, text="the same") for n in range(3)] + [completion("A", "en", 3)]
    assert len(drafts_of(rows, Preferences(positives=3))) == 1


def test_own_language_scope_votes_and_pairs_per_language() -> None:
    rows = completions({"en": "BBA", "fr": "AAB"})
    drafts = drafts_of(rows, Preferences(scope="own_language"))
    assert letters_of(drafts) == [("en", "B", "en", "A"), ("fr", "A", "fr", "B")]


def test_seed_decides_which_winner_is_chosen() -> None:
    rows = completions({"en": "BBBBBBBB", "fr": "A"})
    chosen = {drafts_of(rows, Preferences(), seed)[0].winner["sample"] for seed in range(50)}
    assert len(chosen) > 4


def test_translations_end_like_their_originals() -> None:
    tokenizer = word_tokenizer(["EN", "SAYS", "B", "fr:", "(0)", "(1)", "fr"])
    questions = {("q1", code): question("q1", code) for code in ("en", "fr")}
    rows = [completion("B", "en", 0), completion("B", "en", 1, finish_reason="length"), completion("A", "fr", 2)]
    drafts = drafts_of(rows, Preferences(positives=2))
    texts = translate_winners(drafts, questions, UpperCaseTranslator())
    pairs = finish_pairs(drafts, texts, questions, tokenizer, form="choices", round_number=3)
    by_text = {pair["chosen"]: pair for pair in pairs}
    assert set(by_text) == {"fr: EN SAYS B (0)", "fr: EN SAYS B (1)"}
    stopped, cut = by_text["fr: EN SAYS B (0)"], by_text["fr: EN SAYS B (1)"]
    assert stopped["chosen_token_ids"][-1] == tokenizer.eos_token_id
    assert cut["chosen_token_ids"][-1] != tokenizer.eos_token_id
    assert stopped["rejected_token_ids"] == [12, 1]  # as sampled, not tokenized again
    turn_end = 7  # a chat model's end-of-turn token, not the tokenizer's EOS
    drafts[0].winner["token_ids"][-1] = drafts[1].winner["token_ids"][-1] = turn_end
    again = finish_pairs(drafts, texts, questions, tokenizer, form="choices", round_number=3)
    assert turn_end in {pair["chosen_token_ids"][-1] for pair in again}
    assert tokenizer.eos_token_id not in {pair["chosen_token_ids"][-1] for pair in again}
    assert sorted(pair["pair"] for pair in pairs) == [0, 1]
    assert {(p["language"], p["chosen_language"], p["round"]) for p in pairs} == {("fr", "en", 3)}
    assert stopped["prompt"].startswith("Question q1?\nA. fr choice 0")


def test_losing_texts_are_reworded() -> None:
    questions = {("q1", code): question("q1", code) for code in ("en", "fr")}
    rows = [
        completion("B", "en", 0, text="It is en choice 1."),
        completion("A", "fr", 1, text="C'est fr choice 0."),
        completion("A", "en", 2, text="It is en choice 0."),
    ]
    drafts = drafts_of([*rows, *(completion("B", "en", n, text="en choice 1") for n in (3, 4))], Preferences())
    texts = dict(zip((draft.loser["text"] for draft in drafts), reworded_losers(drafts, questions), strict=True))
    assert texts["C'est fr choice 0."] == "C'est fr choice 1."
    assert texts["It is en choice 0."] in ("It is en choice 1.", "en choice 1")  # sampled in English, so unchanged


def test_failed_translations_are_dropped_without_gaps_in_numbers() -> None:
    questions = {("q1", code): question("q1", code) for code in ("en", "fr")}
    rows = completions({"en": "BB", "fr": "AC"})
    drafts = drafts_of(rows, Preferences(positives=2))
    texts = translate_winners(drafts, questions, UpperCaseTranslator(fails="en says B (0)"))
    pairs = finish_pairs(drafts, texts, questions, word_tokenizer(["x"]), form="choices", round_number=1)
    assert (len(drafts), len(pairs)) == (4, 2)
    assert [pair["pair"] for pair in pairs] == [0, 1]


def test_model_translates_each_text_once_and_must_keep_the_letter() -> None:
    asked: list[str] = []

    def write(messages: list[str]) -> list[str]:
        asked.extend(messages)
        return ["Explication : oui\nRéponse : B" if "good" in message else "Réponse : C" for message in messages]

    good = Passage("good\nAnswer: B", "en", "fr", "B", "ABCD")
    bad = Passage("bad\nAnswer: B", "en", "fr", "B", "ABCD")
    assert ModelTranslator(write).translate([good, bad, good]) == [
        "Explication : oui\nRéponse : B", None, "Explication : oui\nRéponse : B",
    ]  # fmt: skip
    assert len(asked) == 2
    assert "from English into French" in asked[0]
