"""Does CALM align languages? Compares it on demo worlds with equal-budget controls and the paper's SFT baseline.

    python benchmarks/demo_worlds.py --seeds 0 1 2 3 4

Every run is a separate job (`jobs/calm.py` with overrides), kept under `storage`; finished runs are not repeated.
Pretrains models for worlds not yet cached on this machine. Prints a line per run, then the means.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, list[str]] = {
    "calm": [],
    "random": ["preferences.winner=random"],
    "own_language": ["preferences.scope=own_language"],
    "sft": ["method=sft", "train.learning_rate=3e-4", "train.warmup_ratio=0.1", "train.sft_weight=0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--storage", default=str(Path("~/calm_ray/worlds").expanduser()))
    options = parser.parse_args()
    Path(options.storage).parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        for variant in options.variants:
            results[variant].append(run(variant, seed, options.storage))
            print(line(f"{variant} {seed}", results[variant][-1]), flush=True)
    print()
    for variant, rows in results.items():
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        print(line(f"{variant}, mean of {len(rows)}", means))


def run(variant: str, seed: int, storage: str) -> dict[str, float]:
    """Metrics of one run, in percent."""
    summary = summary_of("calm.py", f"{variant}-{seed}", storage, [f"world.seed={seed}", *VARIANTS[variant]])
    first, last = summary["rounds"][0], summary["rounds"][-1]
    gains = {code: last["accuracy"][code] - first["accuracy"][code] for code in summary["languages"]}
    vote = first["vote"]
    fractions = {
        "base": first["accuracy_mean"],
        "after": last["accuracy_mean"],
        "gain": last["accuracy_mean"] - first["accuracy_mean"],
        "Consistency_2": first["consistency"]["2"],
        "after ": last["consistency"]["2"],
        "gain ": last["consistency"]["2"] - first["consistency"]["2"],
        **gains,
        "unparseable": first["unparseable"],
        "after  ": last["unparseable"],
        "vote": vote["vote_accuracy"],
        "best language": max(*vote["own_vote_accuracy"].values(), *vote["sample_accuracy"].values()),
    }
    return {key: 100 * value for key, value in fractions.items()}


def summary_of(job: str, name: str, storage: str, keys: list[str]) -> dict[str, Any]:
    """summary.json of a run; starts or resumes the run first if it is not finished."""
    folder = Path(storage) / name
    if not (folder / "finished.json").is_file():
        with open(f"{storage}-{name}.log", "w") as log:
            command = [sys.executable, str(ROOT / "jobs" / job), f"name={name}", f"storage={storage}", *keys]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, cwd=ROOT)
    return dict(json.loads((folder / "summary.json").read_text()))


def line(title: str, figures: dict[str, float]) -> str:
    return f"{title:24}" + "  ".join(f"{key.strip()} {value:.1f}" for key, value in figures.items())


if __name__ == "__main__":
    main()
