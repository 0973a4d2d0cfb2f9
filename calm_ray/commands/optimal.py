"""`calm-ray optimal`: the policy that DCO's reference leads to in closed form, beside what training made of it."""

from __future__ import annotations

import json
from typing import Any

from calm_ray.core.console import console
from calm_ray.core.errors import InputError
from calm_ray.evaluation.tables import percent, plain_table
from calm_ray.job.open_run import open_run
from calm_ray.methods.dco.gamma import describe_gamma, distance_from_rank_one, exponents, gammas
from calm_ray.run.directory import RunDirectory


def show_optimum(location: str, round_number: int | None, as_json: bool) -> None:
    """Prints a round's policy, the reference it was trained from and the optimal policy, on both sets of questions.

    Everything was computed from scores when the round was evaluated. Raises InputError where a run has none.
    """
    opened = open_run(location)
    run, config = opened.run, opened.config
    finished = [n for n in range(config.rounds + 1) if run.stage(n, "optimal").is_finished]
    if not finished:
        why = "no round of it has been scored"
        if config.method != "dco":
            why = "it is no run of method: dco"
        elif not config.has_optimum:
            why = "with dco.languages: bilingual every two languages have one of their own"
        raise InputError(f"{run.uri}: has no optimal policy, since {why}")
    number = max(finished) if round_number is None else round_number
    if number not in finished:
        raise InputError(f"{run.uri}: round {number} has no optimal policy; there are {finished}")
    policies = _policies(run, number, config.train.reference)
    gamma = gammas(config.dco, config.languages, config.train.beta)
    distance = distance_from_rank_one(gamma, config.train.beta)
    if as_json:
        print(json.dumps({"languages": config.languages, "gamma": gamma.tolist(), **policies}, indent=2))
        return
    console.print(describe_gamma(distance))
    _print_gamma(config.languages, exponents(gamma, config.train.beta).tolist())
    for part, title in (("held_out", "held-out questions"), ("training", "questions trained on")):
        if part in policies:
            _print_policies(f"{title}, percent", policies[part])


def _policies(run: RunDirectory, number: int, reference: str) -> dict[str, dict[str, Any]]:
    """part -> name of a policy -> its report."""
    parts = {"held_out": "evaluate", "training": "score"}
    before = 0 if reference == "base" else max(0, number - 1)
    found: dict[str, dict[str, Any]] = {}
    for part, optimum in run.stage(number, "optimal").record.items():
        stages = {"reference": run.stage(number, f"reference_{parts[part]}"), "policy": run.stage(number, parts[part])}
        if not stages["reference"].is_finished:
            stages["reference"] = run.stage(before, parts[part])
        found[part] = {name: stage.record["report"] for name, stage in stages.items()} | {"optimal": optimum}
    return found


def _print_gamma(languages: list[str], weights: list[list[float]]) -> None:
    table = plain_table("exponents of the product of experts: a row's policy, a column's likelihood")
    table.add_column("")
    for code in languages:
        table.add_column(code, justify="right")
    for code, row in zip(languages, weights, strict=True):
        table.add_row(code, *(f"{value:g}" for value in row))
    console.print(table)


def _print_policies(title: str, reports: dict[str, dict[str, Any]]) -> None:
    table = plain_table(title)
    languages = list(next(iter(reports.values())).get("accuracy", {}))
    for name in ("", "RankC\nmean", "RankC\nwith en", "top-1\nalike", *languages, "mean"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, report in reports.items():
        shares = [report["rankc_mean"], report["rankc_en"], report["top1"]]
        shares += [report["accuracy"][code] for code in languages] + [report.get("accuracy_mean")]
        table.add_row(name, *(percent(share) for share in shares))
    console.print(table)
    optimum = reports["optimal"]
    console.print(
        f"the policy answers as the optimal one to {percent(optimum['top1_with_optimal'])} percent; their margins are "
        f"{optimum['margin_distance']:.2f} nats apart in the mean\n"
    )
