"""The optimal policy's experts: weights, what is chosen automatically, and targets of calibrated scores."""

import numpy as np
import pytest
from factories import scored_tables

from calm_ray.evaluation.ranking import probabilities
from calm_ray.evaluation.scores import scores_of
from calm_ray.methods.dco.calibration import candidate_sums, means_of
from calm_ray.methods.dco.experts import Experts
from calm_ray.methods.dco.gamma import RANK_ONE_TOLERANCE, distance_from_rank_one, exponents, gammas, weights_of
from calm_ray.methods.dco.pairs import draw_pairs, reference_margins, targets
from calm_ray.methods.dco.settings import Anchor, Dco

CODES = ["en", "fr", "sw"]


def test_weights_add_up_to_one_in_every_language() -> None:
    for settings in (Dco(weights="equal"), Dco(weights={"en": 6, "fr": 1, "sw": 1})):
        gamma = gammas(settings, CODES, 0.5)
        rows = exponents(gamma, 0.5)
        assert rows.sum(axis=1) == pytest.approx(1.0)
        assert rows[0] == pytest.approx(rows[2])
        assert distance_from_rank_one(gamma, 0.5) < RANK_ONE_TOLERANCE
    assert rows[0] == pytest.approx([0.75, 0.125, 0.125])


def test_automatic_weights_are_squares_above_one_half() -> None:
    agreement = {"en": 0.9, "fr": 0.7, "sw": 0.4}
    assert weights_of(Dco(weights="auto"), CODES, agreement) == pytest.approx([0.8, 0.2, 0.0])
    assert weights_of(Dco(weights="auto"), CODES, dict.fromkeys(CODES, 0.3)) == pytest.approx([1 / 3] * 3)


def test_automatic_anchor_is_the_language_that_agrees_most() -> None:
    auto, fr = (Dco(anchor=Anchor(language=code, strength=4)) for code in ("auto", "fr"))
    agreement = {"en": 0.6, "fr": 0.7, "sw": 0.5}
    assert gammas(auto, CODES, 1.0, agreement).tolist() == gammas(fr, CODES, 1.0).tolist()


@pytest.mark.parametrize("settings", [Dco(), Dco(weights={"en": 2, "fr": 1, "sw": 1})], ids=["gamma", "weights"])
@pytest.mark.parametrize("calibrates", [False, True])
def test_targets_lead_from_the_reference_to_the_optimal_policy(settings: Dco, calibrates: bool) -> None:
    rng, beta = np.random.default_rng(1), 0.4
    scored = scored_tables({code: rng.normal(size=(4, 3)).tolist() for code in CODES})
    scores = scores_of(scored)
    gamma = gammas(settings, CODES, beta)
    experts = Experts(gamma, beta, means_of(candidate_sums(scored)) if calibrates else None)
    drawn = draw_pairs(scores, 3, settings, seed=0)
    optimal = experts.optimal(scores, scored)
    margins = optimal[:, drawn.question, drawn.chosen] - optimal[:, drawn.question, drawn.rejected]
    expected = beta * (margins.T - reference_margins(scores, drawn))
    np.testing.assert_allclose(experts.targets(scores, scored, drawn), expected)
    if not calibrates:
        assert experts.targets(scores, scored, drawn).tolist() == targets(scores, drawn, gamma).tolist()


def test_random_targets_permute_the_optimal_ones_alike_in_all_languages() -> None:
    rng = np.random.default_rng(2)
    scored = scored_tables({code: rng.normal(size=(20, 4)).tolist() for code in CODES})
    scores = scores_of(scored)
    gamma = gammas(Dco(weights="equal"), CODES, 1.0)
    optimal, random, again = (
        Experts(gamma, 1.0, target=target, seed=seed).optimal(scores, scored)  # type: ignore[arg-type]
        for target, seed in (("optimal", 0), ("random", 0), ("random", 0))
    )
    assert np.sort(random).tolist() == np.sort(optimal).tolist()
    assert random.tolist() == again.tolist()
    same = (random.argmax(axis=2) == optimal.argmax(axis=2)).all(axis=0)
    assert 0 < same.sum() < 12  # a quarter by chance
    assert (random.argmax(axis=2) == random.argmax(axis=2)[0]).all()


def test_gold_targets_put_all_probability_on_the_right_candidate() -> None:
    scored = scored_tables({code: [[-1.0, -2.0, -3.0], [-1.0, -2.0]] for code in CODES}, [2, 0])
    scores = scores_of(scored)
    found = probabilities(Experts(gammas(Dco(), CODES, 1.0), 1.0, target="gold").optimal(scores, scored))
    assert found.tolist() == [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]] * 3


def test_probabilities_ignore_padding() -> None:
    assert probabilities(np.array([[0.0, np.log(3), -np.inf]])).tolist() == [pytest.approx([0.25, 0.75, 0.0])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "auto", "gamma": 2.0}, "weights: cannot be combined with gamma"),
        ({"weights": "auto", "languages": "bilingual"}, "weights: requires languages: joint"),
        ({"fit": "options", "languages": "bilingual"}, "fit: options requires languages: joint"),
        ({"fit": "pairs", "target": "random"}, "target: random requires fit: options"),
        ({"fit": "options", "exclude_gold": True}, "exclude_gold: requires fit: pairs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_exclude_each_other(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dco.model_validate(settings)
