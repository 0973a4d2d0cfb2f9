"""Which pairs of candidates are drawn, and the rows made from them."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from factories import scored, scored_tables

from calm_ray.core.rows import Pair, Scored, rows_of, schema, table
from calm_ray.evaluation.scores import Scores, Tables, scores_of
from calm_ray.methods.dco.gamma import gammas
from calm_ray.methods.dco.pairs import DrawnPairs, draw_pairs, pair_tables, reference_margins, targets
from calm_ray.methods.dco.settings import Anchor, Dco

CODES = ["en", "fr", "zh", "sw"]
MANY = 400

Drawn = dict[str, list[tuple[int, int, int, tuple[str, ...]]]]
"""Pairs of each question: number, chosen and rejected candidate, languages."""


def tables_of(counts: Sequence[int], languages: Sequence[str] = CODES, right: int | None = 0) -> Tables:
    """Questions q0, q1, ... with these numbers of candidates and random log-probabilities."""
    rng = np.random.default_rng(0)
    logps = {code: [rng.normal(size=n).tolist() for n in counts] for code in languages}
    return scored_tables(logps, [right] * len(counts))


def pairs_by_question(scores: Scores, drawn: DrawnPairs) -> Drawn:
    found: Drawn = {}
    for q, number, chosen, rejected, mask in zip(
        drawn.question, drawn.number, drawn.chosen, drawn.rejected, drawn.in_languages, strict=True
    ):
        names = tuple(code for code, there in zip(scores.languages, mask, strict=True) if there)
        found.setdefault(scores.questions[q], []).append((int(number), int(chosen), int(rejected), names))
    return found


GOLD = None
"""Settings of the gold baselines."""


def draw(tables: Tables, settings: Dco | None, pairs: int = 1, seed: int = 0) -> Drawn:
    scores = scores_of(tables)
    return pairs_by_question(scores, draw_pairs(scores, pairs, settings, seed=seed))


SETTINGS = [(Dco(), 1), (Dco(), 3), (Dco(languages="bilingual"), 2), (Dco(exclude_gold=True), 1)]


@pytest.mark.parametrize(("settings", "pairs"), [*SETTINGS, (GOLD, 1), (GOLD, 3)], ids=str)
def test_draws_depend_only_on_seed_and_question(settings: Dco | None, pairs: int) -> None:
    """Not on the order of questions, nor on others in the chunk, such as one with more candidates."""
    tables = tables_of([5, 4, 9, 2, 5, 6, 4, 5])
    whole = draw(tables, settings, pairs)
    backwards = draw({code: own.take([7, 6, 5, 4, 3, 2, 1, 0]) for code, own in tables.items()}, settings, pairs)
    assert backwards == whole
    apart = [draw({code: own.slice(i, 1) for code, own in tables.items()}, settings, pairs) for i in range(8)]
    assert {key: pairs for one in apart for key, pairs in one.items()} == whole
    assert draw(tables, settings, pairs, seed=1) != whole


@pytest.mark.parametrize(("settings", "pairs"), SETTINGS, ids=str)
def test_draws_do_not_depend_on_the_scores(settings: Dco, pairs: int) -> None:
    first, second = (
        scored_tables({code: np.random.default_rng(s).normal(size=(50, 4)).tolist() for code in CODES}, [0] * 50)
        for s in (1, 2)
    )
    assert draw(first, settings, pairs) == draw(second, settings, pairs)


@pytest.mark.parametrize("pairs", [1, 3, 6, 99])
def test_pairs_of_a_question_are_distinct_and_numbered(pairs: int) -> None:
    for found in draw(tables_of([4] * 50), Dco(), pairs).values():
        assert [number for number, *_ in found] == list(range(min(pairs, 6)))
        assert len({frozenset((chosen, rejected)) for _, chosen, rejected, _ in found}) == min(pairs, 6)
        assert all(chosen != rejected for _, chosen, rejected, _ in found)
        assert all(names == tuple(CODES) for *_, names in found)


def test_single_pairs_are_drawn_in_either_order() -> None:
    found = draw(tables_of([4] * MANY, ["en", "fr"]), Dco())
    seen = Counter((chosen, rejected) for pairs in found.values() for _, chosen, rejected, _ in pairs)
    assert len(seen) == 12
    assert min(seen.values()) > MANY / 12 / 3


def test_exhaustive_pairs_are_in_either_order() -> None:
    found = draw(tables_of([4] * MANY, ["en", "fr"]), Dco(), pairs=6)
    seen = Counter((chosen, rejected) for pairs in found.values() for _, chosen, rejected, _ in pairs)
    for one, other in combinations(range(4), 2):
        assert seen[one, other] + seen[other, one] == MANY
        assert 0.4 * MANY < seen[one, other] < 0.6 * MANY


def test_bilingual_pairs_are_trained_in_two_languages() -> None:
    found = draw(tables_of([4] * MANY), Dco(languages="bilingual"), pairs=2)
    seen = Counter(names for pairs in found.values() for *_, names in pairs)
    assert set(seen) == set(combinations(CODES, 2))
    assert min(seen.values()) > 2 * MANY / 6 / 2
    # A question's pairs are not all trained in the same two languages.
    assert any(pairs[0][3] != pairs[1][3] for pairs in found.values())


def test_languages_are_drawn_independently_of_candidates() -> None:
    found = draw(tables_of([2] * MANY), Dco(languages="bilingual"))
    seen = Counter((names, chosen) for pairs in found.values() for _, chosen, _, names in pairs)
    assert len(seen) == 12
    assert min(seen.values()) > MANY / 12 / 3


def test_gold_candidate_can_be_excluded() -> None:
    found = draw(tables_of([4] * 50, right=2), Dco(exclude_gold=True), pairs=99)
    assert {frozenset(pair[1:3]) for pairs in found.values() for pair in pairs} == {
        frozenset((0, 1)), frozenset((0, 3)), frozenset((1, 3)),
    }  # fmt: skip
    assert all(len(pairs) == 3 for pairs in found.values())
    assert draw(tables_of([2] * 5, right=1), Dco(exclude_gold=True)) == {}
    assert len(draw(tables_of([2] * 5, right=None), Dco(exclude_gold=True))) == 5  # the gold candidate is unknown


def test_gold_pairs_choose_the_right_candidate_in_all_languages() -> None:
    found = draw(tables_of([4] * 50, right=2), GOLD, pairs=2)
    for pairs in found.values():
        assert [chosen for _, chosen, *_ in pairs] == [2, 2]
        assert len({rejected for _, _, rejected, _ in pairs} - {2}) == 2
        assert all(names == tuple(CODES) for *_, names in pairs)
    assert {rejected for pairs in found.values() for _, _, rejected, _ in pairs} == {0, 1, 3}
    every = draw(tables_of([4], right=2), GOLD, pairs=99)["q0"]
    assert sorted(rejected for _, _, rejected, _ in every) == [0, 1, 3]
    assert draw(tables_of([4] * 5, right=None), GOLD) == {}


def test_single_candidate_gives_no_pair() -> None:
    assert draw(tables_of([1, 3, 1]), Dco(), pairs=2).keys() == {"q1"}
    assert draw(tables_of([1]), Dco(languages="bilingual")) == {}
    assert draw(tables_of([]), Dco(), pairs=2) == {}


LOGPS = {"en": [-1.0, -3.0, -7.0], "fr": [-2.0, -2.5, -1.0], "zh": [-4.0, -1.0, -1.5]}


def one_pair(mask: Sequence[bool] = (True, True, True)) -> tuple[Scores, DrawnPairs]:
    """Candidate 0 against candidate 1, with margins 2, 0.5 and -3."""
    columns = {
        name: np.array([value]) for name, value in (("question", 0), ("number", 0), ("chosen", 0), ("rejected", 1))
    }
    drawn = DrawnPairs(**columns, in_languages=np.array([mask]))
    return scores_of(scored_tables({code: [row] for code, row in LOGPS.items()})), drawn


def test_targets_on_a_small_example() -> None:
    """DCO, Eq. 15: the other languages' margins, weighted by gamma."""
    scores, drawn = one_pair()
    assert reference_margins(scores, drawn).tolist() == [[2.0, 0.5, -3.0]]
    assert targets(scores, drawn, gammas(Dco(), CODES[:3], 0.5)).tolist() == [[-1.25, -0.5, 1.25]]
    cyclic = gammas(Dco(gamma={"en-fr": 4, "fr-zh": 0.1, "zh-en": 3}), CODES[:3], 1.0)
    assert targets(scores, drawn, cyclic).tolist() == [[pytest.approx(2 - 3), pytest.approx(2 - 0.3), 6.5]]
    anchored = gammas(Dco(anchor=Anchor(language="en", strength=10)), CODES[:3], 1.0)
    assert targets(scores, drawn, anchored).tolist() == [[pytest.approx(-0.25), pytest.approx(17), pytest.approx(20.5)]]


def test_bilingual_targets_come_from_the_other_language() -> None:
    scores, drawn = one_pair((True, False, True))
    en, _, zh = targets(scores, drawn, gammas(Dco(gamma={"en-zh": 2, "zh-en": 0.5}), CODES[:3], 1.0))[0]
    assert (en, zh) == (-6.0, 1.0)


def parallel_tables() -> Tables:
    """Three questions, in a different order in each language; fr and zh have one more that the others lack."""
    order = {"en": ["a", "b", "c"], "fr": ["c", "b", "a", "x"], "zh": ["y", "b", "a", "c"]}
    counts = {"a": 3, "b": 5, "c": 2, "x": 4, "y": 3}
    rng = np.random.default_rng(3)
    found = {}
    for code, questions in order.items():
        rows = []
        for key in questions:
            choices = [f"{code} {key} {n}" for n in range(counts[key])]
            rows.append(scored(rng.normal(size=counts[key]).tolist(), key, code, choices=choices))
        parts = [table(Scored, rows[:1]), table(Scored, rows[1:])]
        found[code] = pa.concat_tables(parts)
    return found


@pytest.mark.parametrize("languages", ["joint", "bilingual"])
def test_pair_rows_match_the_drawn_pairs(languages: str) -> None:
    tables = parallel_tables()
    settings = Dco(languages=languages)  # type: ignore[arg-type]
    scores = scores_of(tables)
    drawn = draw_pairs(scores, 2, settings, seed=0)
    target = targets(scores, drawn, gammas(settings, scores.languages, 1.0))
    found = pair_tables(tables, drawn, target, scores, 3)
    assert found.schema == schema(Pair)
    rows: list[Pair] = rows_of(found)
    by_pair = {
        (key, number): (chosen, rejected, names)
        for key, pairs in pairs_by_question(scores, drawn).items()
        for number, chosen, rejected, names in pairs
    }
    assert len(by_pair) == 2 + 2 + 1
    assert Counter((row["question_id"], row["pair"]) for row in rows) == {
        key: len(names) for key, (_, _, names) in by_pair.items()
    }
    index_of = {
        (scores.questions[q], int(n)): p for p, (q, n) in enumerate(zip(drawn.question, drawn.number, strict=True))
    }
    for row in rows:
        key, code = row["question_id"], row["language"]
        chosen, rejected, names = by_pair[key, row["pair"]]
        assert code in names
        assert row == {
            "round": 3, "question_id": key, "pair": row["pair"], "language": code, "prompt": f"{code} {key}:",
            "chosen": f"{code} {key} {chosen}", "rejected": f"{code} {key} {rejected}",
            "prompt_token_ids": list(row["prompt"].encode()), "chosen_token_ids": list(row["chosen"].encode()),
            "rejected_token_ids": list(row["rejected"].encode()), "chosen_answer": "ABCDE"[chosen],
            "rejected_answer": "ABCDE"[rejected], "chosen_language": code, "policy": "base",
            "target_margin": target[index_of[key, row["pair"]], scores.languages.index(code)],
        }  # fmt: skip


def test_gold_pair_rows_have_no_target() -> None:
    tables = tables_of([3, 3], right=1)
    scores = scores_of(tables)
    found = pair_tables(tables, draw_pairs(scores, 1, GOLD, seed=0), None, scores, 1)
    assert found.schema == schema(Pair)
    assert len(found) == 2 * len(CODES)
    assert found["target_margin"].null_count == len(found)
    assert set(found["chosen_answer"].to_pylist()) == {"B"}


def test_targets_sum_the_margins_of_the_other_languages() -> None:
    """Recomputed from the rows: the sum of the same pair's margins in the other languages."""
    tables = parallel_tables()
    judged = [row for own in tables.values() for row in rows_of(own)]
    logps = {text: logp for row in judged for text, logp in zip(row["texts"], row["logps"], strict=True)}
    scores = scores_of(tables)
    drawn = draw_pairs(scores, 9, Dco(), seed=0)
    found = pair_tables(tables, drawn, targets(scores, drawn, gammas(Dco(), scores.languages, 1.0)), scores, 1)
    for row in rows_of(found):
        others = [code for code in scores.languages if code != row["language"]]
        texts = [[f"{code} {row[side].partition(' ')[2]}" for side in ("chosen", "rejected")] for code in others]
        assert row["target_margin"] == pytest.approx(sum(logps[chosen] - logps[rejected] for chosen, rejected in texts))
