"""`calm-ray optimal`: compares a trained policy with the closed-form optimal policy of its DCO reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from calm_ray.core.console import console
from calm_ray.core.errors import InputError
from calm_ray.evaluation.tables import OPTIMAL, PARTS, percent, plain_table
from calm_ray.job.open_run import OpenedRun, open_run
from calm_ray.methods.dco.gamma import describe_gamma, distance_from_rank_one, exponents
from calm_ray.methods.dco.optimum import Optimum, find_optimum
from calm_ray.run.policies import Policy


def show_optimum(location: str, round_number: int | None, as_json: bool, plugins: Sequence[str] = ()) -> None:
    """Prints a round's policy, the reference it was trained from and the optimal policy, on both sets of questions.

    Shows what was computed from scores when the round was evaluated. Raises InputError if the run has none.
    """
    opened = open_run(location, plugins)
    run, config = opened.run, opened.config
    finished = [n for n in range(config.rounds + 1) if run.stage(n, Optimum.name).is_finished]
    optimum = find_optimum(config.evaluation)
    if optimum is None or not finished:
        why = "no round has been scored"
        if optimum is None:
            why = "it requires method: dco, and dco.languages: joint or two languages"
        raise InputError(f"{run.uri}: has no optimal policy: {why}")
    number = max(finished) if round_number is None else round_number
    if number not in finished:
        raise InputError(f"{run.uri}: round {number} has no optimal policy; rounds with one: {finished}")
    policies = _policies(opened, number, optimum)
    beta = config.train.beta
    gamma = optimum.gamma(run, number)
    if as_json:
        print(json.dumps({"languages": config.languages, "gamma": gamma.tolist(), **policies}, indent=2))
        return
    console.print(describe_gamma(distance_from_rank_one(gamma, beta)))
    _print_gamma(config.languages, exponents(gamma, beta).tolist())
    for part, title in PARTS.items():
        if part in policies:
            _print_policies(f"{title}, percent", policies[part])


def _policies(opened: OpenedRun, number: int, optimum: Optimum) -> dict[str, dict[str, Any]]:
    """part -> policy name -> report."""
    run, is_base = opened.run, opened.config.train.reference == "base"
    reference = Policy() if is_base else opened.policy(max(0, number - 1))
    optimal = run.stage(number, optimum.name).record
    found: dict[str, dict[str, Any]] = {}
    for scores, of_reference in optimum.scored:
        if scores.part in optimal:
            stages = [of_reference.found(run, number, reference.name), run.stage(number, scores.name)]
            before, after = (stage.record["report"] for stage in stages)
            found[scores.part] = {"reference": before, "policy": after, OPTIMAL: optimal[scores.part]}
    return found


def _print_gamma(languages: list[str], weights: list[list[float]]) -> None:
    table = plain_table("product-of-experts exponents: policy per row, likelihood per column")
    table.add_column("")
    for code in languages:
        table.add_column(code, justify="right")
    for code, row in zip(languages, weights, strict=True):
        table.add_row(code, *(f"{value:g}" for value in row))
    console.print(table)


def _print_policies(title: str, reports: dict[str, dict[str, Any]]) -> None:
    table = plain_table(title)
    languages = list(next(iter(reports.values())).get("accuracy", {}))
    for name in ("", "RankC\nmean", "RankC\nwith en", "top-1\nagree", *languages, "mean"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, report in reports.items():
        rates = [report["rankc_mean"], report["rankc_en"], report["top1"]]
        rates += [report["accuracy"][code] for code in languages] + [report.get("accuracy_mean")]
        table.add_row(name, *(percent(rate) for rate in rates))
    console.print(table)
    *_, optimum = reports.values()
    console.print(
        f"the policy agrees with the optimal one on {percent(optimum['top1_with_optimal'])} percent of answers; their "
        f"margins differ by {optimum['margin_distance']:.2f} nats on average\n"
    )
