import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import golden_metrics, scored_tables

from calm_ray.evaluation.scores import scores_of
from calm_ray.methods.dco.gamma import gammas, optimal_logps, target_margins
from calm_ray.methods.dco.objective import dco_losses, option_loss
from calm_ray.methods.dco.pairs import draw_pairs, reference_margins, targets
from calm_ray.methods.dco.settings import Anchor, Dco
from calm_ray.training.losses import dpo_losses, sft_losses
from calm_ray.training.schedule import learning_rate_factor


def test_dpo_loss_on_a_small_example() -> None:
    chosen, rejected = torch.tensor([-10.0, -4.0]), torch.tensor([-12.0, -3.0])
    ref_margins = torch.tensor([1.0, 1.0])
    # Margins (2 - 1) and (-1 - 1); -log sigmoid(beta m).
    expected = [math.log(1 + math.exp(-0.5 * 1.0)), math.log(1 + math.exp(-0.5 * -2.0))]
    assert dpo_losses(chosen, rejected, ref_margins, beta=0.5).tolist() == pytest.approx(expected)


def test_dpo_loss_is_ln_2_if_the_policy_is_the_reference() -> None:
    chosen, rejected = torch.randn(8), torch.randn(8)
    losses = dpo_losses(chosen, rejected, chosen - rejected, beta=0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 8)


def test_dpo_loss_depends_only_on_margins() -> None:
    chosen, rejected, ref = torch.randn(8), torch.randn(8), torch.randn(8)
    same = dpo_losses(chosen + 3, rejected + 3, ref, beta=0.1)
    assert torch.allclose(dpo_losses(chosen, rejected, ref, beta=0.1), same)


def test_sft_loss_is_a_mean_over_tokens() -> None:
    assert sft_losses(torch.tensor([-6.0, -2.0]), torch.tensor([3.0, 2.0])).tolist() == [2.0, 1.0]


def test_learning_rate_warms_up_and_decays() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[9] == factors[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert factors[55] == pytest.approx(0.5, abs=0.02)
    assert 0 < factors[99] < 0.001
    assert learning_rate_factor(0, 100, 0.0) == 1.0


def golden_loss(case: dict[str, Any]) -> float:
    """Sum of both languages' losses for one pair, as in DCO's released code."""
    gamma = gammas(
        Dco(gamma={"en-sw": case["gamma_1_of_eq_11"], "sw-en": case["gamma_2_of_eq_11"]}), ["en", "sw"], beta=1.0
    )
    policy, reference = (
        torch.tensor(case[f"{name}_logps_c1_r1_c2_r2"], dtype=torch.float64).reshape(2, 2)
        for name in ("policy", "reference")
    )
    ref_margins = reference[:, 0] - reference[:, 1]
    wanted = torch.from_numpy(target_margins(ref_margins[None].numpy(), gamma))[0]
    return float(dco_losses(policy[:, 0] - policy[:, 1] - ref_margins, wanted, beta=1.0).sum())


def test_dco_loss_matches_the_released_code() -> None:
    """Betswish/ConsistencyRL, e0e8f46, dco_trainer.py, run elsewhere; its beta of 10 means gammas of 0.1 and 10."""
    case = {
        "policy_logps_c1_r1_c2_r2": [-0.7, -2.3, -2.1, -3.9],
        "reference_logps_c1_r1_c2_r2": [-1.2, -1.9, -2.6, -3.1],
    }
    for first, second, loss in ((1.0, 1.0, 1.0), (0.1, 10.0, 6.55), (10.0, 0.1, 5.33)):
        assert golden_loss({**case, "gamma_1_of_eq_11": first, "gamma_2_of_eq_11": second}) == pytest.approx(loss)


def test_golden_dco_loss(data: Path) -> None:
    for case in golden_metrics(data)["dco_loss"]:
        assert golden_loss(case) == pytest.approx(case["loss"], abs=1e-6), case["name"]


def test_dco_loss_on_a_small_example() -> None:
    margins, wanted = torch.tensor([1.0, -4.0, 0.5]), torch.tensor([2.0, 1.0, 0.25])
    # beta m - target: -1.5, -3, 0.
    assert dco_losses(margins, wanted, beta=0.5).tolist() == [1.5, 3.0, 0.0]
    assert dco_losses(margins, wanted, beta=0.5, kind="squared").tolist() == [2.25, 9.0, 0.0]
    assert dco_losses(margins, wanted, beta=0.5, kind="huber").tolist() == [1.0, 2.5, 0.0]
    assert dco_losses(torch.tensor([0.5]), torch.tensor([1.0]), beta=1.0, kind="huber").tolist() == [0.125]


def test_dco_loss_is_the_target_if_the_policy_is_the_reference() -> None:
    wanted = torch.tensor([0.5, -2.0, 0.0])
    assert dco_losses(torch.zeros(3), wanted, beta=0.3).tolist() == [0.5, 2.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "beta"),
    [
        (Dco(), 1.0),
        (Dco(), 0.4),
        (Dco(anchor=Anchor(language="en", strength=3)), 1.0),
        (Dco(anchor=Anchor(language="sw", strength=0.5)), 2.0),
        (Dco(gamma={"en-fr": 0.2, "fr-sw": 1.7}), 1.0),
        (Dco(loss="huber"), 1.0),
        (Dco(loss="squared"), 0.7),
    ],
    ids=lambda value: str(value) if isinstance(value, float) else value.model_dump_json(exclude_defaults=True),
)
def test_gradient_descent_on_dco_reaches_the_optimal_policy(settings: Dco, beta: float) -> None:
    """DCO, Lemma 2: starts at the reference, a table of logits, and uses all pairs of candidates."""
    languages, rng = ["en", "fr", "sw"], np.random.default_rng(0)
    scores = scores_of(scored_tables({code: rng.normal(size=(3, 5)).tolist() for code in languages}))
    gamma = gammas(settings, languages, beta)
    drawn = draw_pairs(scores, 99, settings, seed=0)
    assert len(drawn.question) == 3 * 10
    wanted = torch.from_numpy(targets(scores, drawn, gamma))
    ref_margins = torch.from_numpy(reference_margins(scores, drawn))
    optimal = torch.from_numpy(optimal_logps(scores.logps, gamma, beta)).softmax(-1)
    question, chosen, rejected = (torch.from_numpy(x) for x in (drawn.question, drawn.chosen, drawn.rejected))

    logits = torch.from_numpy(scores.logps.copy()).requires_grad_()
    assert distance(logits, optimal) > 0.2
    steps, rate = 1000, 0.05
    optimizer = torch.optim.Adam([logits])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        logps = logits.log_softmax(-1)
        margins = (logps[:, question, chosen] - logps[:, question, rejected]).T - ref_margins
        losses = dco_losses(margins, wanted, beta=beta, kind=settings.loss)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert losses.max() < 0.01
    assert distance(logits, optimal) <= 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        Dco(),
        Dco(anchor=Anchor(language="en", strength=3)),
        Dco(weights="equal"),
        Dco(weights={"en": 4, "fr": 1, "sw": 1}),
    ],
    ids=lambda value: value.model_dump_json(exclude_defaults=True),
)
def test_fitting_options_reaches_the_same_optimal_policy(settings: Dco) -> None:
    languages, rng = ["en", "fr", "sw"], np.random.default_rng(0)
    scores = scores_of(scored_tables({code: rng.normal(size=(3, 5)).tolist() for code in languages}))
    optimal = torch.from_numpy(optimal_logps(scores.logps, gammas(settings, languages, 1.0), 1.0)).softmax(-1)
    logits = torch.from_numpy(scores.logps.copy()).requires_grad_()
    assert distance(logits, optimal) > 0.1
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = option_loss(logits, optimal).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert option_loss(logits, optimal).max() < 1e-6
    assert distance(logits, optimal) <= 1e-3


def distance(logits: torch.Tensor, optimal: torch.Tensor) -> float:
    """The largest total variation distance between two policies over languages and questions."""
    return float((logits.detach().softmax(-1) - optimal).abs().sum(-1).max() / 2)
