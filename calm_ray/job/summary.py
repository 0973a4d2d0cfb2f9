"""summary.json: one entry for each round, put together from what the stages noted."""

from __future__ import annotations

from typing import Any

from calm_ray.config import Config
from calm_ray.core.console import console
from calm_ray.evaluation.tables import percent, plain_table
from calm_ray.run.directory import RunDirectory


def summarise(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Writes summary.json for the rounds that are finished, and gathers their training metrics."""
    rounds = [entry for number in range(config.rounds + 1) if (entry := _entry(run, number)) is not None]
    summary = {"method": config.method, "seed": config.seed, "languages": config.languages, "rounds": rounds}
    run.storage.write_json("summary.json", summary)
    run.write_metrics(config.rounds)
    return summary


def _entry(run: RunDirectory, number: int) -> dict[str, Any] | None:
    """Round `number`: how its policy does, and what making it took; None where it is not finished.

    The vote is that of the samples this policy wrote, which the next round draws: null for the last round's policy.
    """
    evaluation = run.stage(number, "evaluate")
    if not evaluation.is_finished:
        return None
    evaluated = evaluation.record
    sample, pairs, train = (_record(run, number, name) for name in ("sample", "pairs", "train"))
    vote = _record(run, number + 1, "pairs").get("vote", {})
    return {
        "round": number,
        "policy": evaluated["policy"],
        **evaluated["report"],
        **_consistency(run, number),
        "changed": _record(run, number, "changed"),
        "vote_accuracy": vote.get("vote_accuracy"),
        "vote": vote,
        "pairs": pairs.get("pairs", 0),
        "seconds": {
            "sample": sample.get("seconds", 0.0),
            "prefer": pairs.get("seconds", 0.0),
            "train": train.get("seconds", 0.0),
            "refresh": evaluated["refresh_seconds"],
            "evaluate": evaluated["seconds"],
            **({"score": scored["seconds"]} if (scored := _record(run, number, "score")) else {}),
        },
    }


def _consistency(run: RunDirectory, number: int) -> dict[str, Any]:
    """What only runs with candidates have: the questions trained on, and the optimal policy."""
    scored, optimal = _record(run, number, "score"), _record(run, number, "optimal")
    return ({"training": scored["report"]} if scored else {}) | ({"optimal": optimal} if optimal else {})


def _record(run: RunDirectory, number: int, name: str) -> dict[str, Any]:
    stage = run.stage(number, name)
    return stage.record if stage.is_finished else {}


def print_summary(summary: dict[str, Any]) -> None:
    """The closing table: a line for each round, in percent."""
    # Those of the held-out questions, which may be more than the run aligns.
    languages = list(summary["rounds"][0].get("accuracy", summary["languages"]))
    table = plain_table(f"{summary['method']}: held-out questions, percent")
    # Headers in two lines, so that the table of a few languages fits into 80 columns.
    for name in [
        "round", *languages, "mean", "Consis-\ntency_2", "AC3_2", "unread-\nable", "vote*", "pairs", "seconds",
    ]:  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for entry in summary["rounds"]:
        cells = [str(entry["round"])]
        if "accuracy" in entry:
            cells += [percent(entry["accuracy"][code]) for code in languages]
            cells += [percent(entry["accuracy_mean"]), percent(entry["consistency"].get("2"))]
            cells += [percent(entry["ac3"].get("2")), percent(entry["unreadable"])]
        else:
            cells += ["-"] * (len(languages) + 4)
        cells += [percent(entry["vote_accuracy"]), str(entry["pairs"]), f"{sum(entry['seconds'].values()):.0f}"]
        table.add_row(*cells)
    console.print(table)
    if any(entry["vote_accuracy"] is not None for entry in summary["rounds"]):
        console.print(
            "* accuracy of the vote over all languages on the sampled questions; gold is reported, never trained on"
        )
    if since := summary["rounds"][-1].get("changed", {}).get("0"):
        changed = "  ".join(f"{code} {percent(share)}" for code, share in since.items())
        console.print(f"answers that are not those of round 0, percent: {changed}")
    if "training" in summary["rounds"][0] or "optimal" in summary["rounds"][-1]:
        print_consistency(summary)


def print_consistency(summary: dict[str, Any]) -> None:
    """How alike the languages rank their candidates, round for round, beside the optimal policy of the first."""
    for part, name in (("held_out", "held-out questions"), ("training", "questions trained on")):
        rounds = summary["rounds"]
        rows = [(str(e["round"]), e if part == "held_out" else e.get("training", {})) for e in rounds]
        optimal = first_optimum(rounds, part)
        rows += [("optimal", optimal)] if optimal else []
        if not any("rankc" in report for _, report in rows):
            continue
        table = plain_table(f"{summary['method']}: {name}, candidates, percent")
        for column in ("round", "RankC\nmean", "RankC\nwith en", "top-1\nalike", "accuracy", "entropy\nright", "wrong"):
            table.add_column(column, justify="right", no_wrap=True)
        for label, report in rows:
            if "rankc" in report:
                table.add_row(label, *_consistency_cells(report))
        console.print(table)


def first_optimum(rounds: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """The report of the optimal policy that a run's first reference leads to; empty where there is none."""
    found = [entry["optimal"][part] for entry in rounds[1:] or rounds if part in entry.get("optimal", {})]
    return found[0] if found else {}


def _consistency_cells(report: dict[str, Any]) -> list[str]:
    """RankC, agreement and accuracy in percent, entropies in nats."""
    entropies = [report.get("entropy", {}).get(name, {}).get("mean") for name in ("right", "wrong")]
    shares = [report["rankc_mean"], report["rankc_en"], report["top1"], report.get("accuracy_mean")]
    return [percent(one) for one in shares] + ["-" if one is None else f"{one:.2f}" for one in entropies]
