"""Cost of resuming a run with nothing left to do: verifies 10,000 chunks against their manifests.

    python benchmarks/resume.py [--chunks 10000] [--rows 192]

Writes a run directory with chunks of completions, half in a finished round and half in a round still being sampled,
then times what `calm-ray align` does first: reading the manifests and hashing every file. The baseline reads every
chunk once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

from calm_ray.core.rows import Completion, table
from calm_ray.recipes.load import load_config
from calm_ray.run.directory import RunDirectory
from calm_ray.run.repair import repair
from calm_ray.run.stage import Stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=192, help="completions per chunk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder, "run")
        run.begin({}, {}, None)
        stages = [run.stage(number, "sample") for number in (1, 2)]
        for stage in stages:
            fill(stage, options.chunks // 2, options.rows)
        stages[0].finish({"policy": "base"})
        size = sum(entry["bytes"] for stage in stages for entry in stage.manifest().values())
        print(f"{options.chunks} chunks of {options.rows} completions, {size / 1e6:.0f} MB")
        checking = seconds(lambda: repair(run, load_config().graph))
        reading = seconds(lambda: [stage.read() for stage in stages])
        print(f"verifying: {checking:.1f} s; reading once: {reading:.1f} s ({reading / checking:.1f}x as long)")


def fill(stage: Stage, chunks: int, rows: int) -> None:
    data = table(Completion, [row(number) for number in range(rows)])
    for number in range(chunks):
        stage.write(f"{number:05d}-en", data, counts={"tokens": 40 * rows})


def row(number: int) -> Completion:
    return Completion(
        question_id=f"q{number // 3}",
        language="en",
        sample=number % 3,
        round=1,
        text=f"Explanation: number {number} is said to be an eagle, and so it is.\nAnswer: A",
        prompt_token_ids=[(7 * number + i) % 997 for i in range(60)],
        token_ids=[(11 * number + i) % 997 for i in range(40)],
        logp=-1.0,
        answer="A",
        policy="base",
        finish_reason="stop",
    )


def seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
