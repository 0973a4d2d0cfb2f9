"""Does DCO align languages? Runs the DCO demo on several worlds, and on two languages with an anchor.

    python benchmarks/dco_worlds.py --seeds 0 1 2 3 4

Every run is a separate job (`jobs/dco.py` with overrides), kept under `storage`; finished runs are not repeated.
`joint` aligns four languages. `anchored` aligns two, the strongest (the anchor, strength 10) and the weakest by the
base model's accuracy on held-out questions. Prints a line per run, then the means.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from demo_worlds import line, summary_of

STRENGTH = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--storage", default=str(Path("~/calm_ray/worlds").expanduser()))
    options = parser.parse_args()
    Path(options.storage).parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {"joint": [], "anchored": []}
    for seed in options.seeds:
        world = f"world.seed={seed}"
        joint = summary_of("dco.py", f"dco-{seed}", options.storage, [world])
        results["joint"].append(figures(joint))
        print(line(f"joint {seed}", results["joint"][-1]), flush=True)
        by_accuracy = sorted(joint["languages"], key=joint["rounds"][0]["accuracy"].__getitem__)
        weakest, strongest = by_accuracy[0], by_accuracy[-1]
        keys = [world, f"languages=[{strongest},{weakest}]"]
        keys.append(f"dco.anchor={{language: {strongest}, strength: {STRENGTH}}}")
        anchored = summary_of("dco.py", f"dco-anchored-{seed}", options.storage, keys)
        changed = anchored["rounds"][1]["changed"]["0"]
        results["anchored"].append(
            {**figures(anchored), "anchor changed": 100 * changed[strongest], "other changed": 100 * changed[weakest]}
        )
        print(line(f"anchored {seed}, {strongest} for {weakest}", results["anchored"][-1]), flush=True)
    for name, rows in results.items():
        print(line(f"{name}, mean of {len(rows)}", {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}))


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """Metrics on held-out and training questions and of the optimal policy, in percent; the distance is in nats."""
    first, last = summary["rounds"][0], summary["rounds"][-1]
    start, end = first["training"]["rankc_mean"], last["training"]["rankc_mean"]
    optimal = last["optimal"]["held_out"]
    fractions = {
        "RankC": first["rankc_mean"],
        "after": last["rankc_mean"],
        "gain": last["rankc_mean"] - first["rankc_mean"],
        "accuracy": first["accuracy_mean"],
        "after ": last["accuracy_mean"],
        "gain ": last["accuracy_mean"] - first["accuracy_mean"],
        "optimal": optimal["accuracy_mean"],
        "trained on: RankC": start,
        "after  ": end,
        "of the way": (end - start) / (1 - start),
        "answers as optimal": optimal["top1_with_optimal"],
    }
    return {key: 100 * value for key, value in fractions.items()} | {"nats from optimal": optimal["margin_distance"]}


if __name__ == "__main__":
    main()
