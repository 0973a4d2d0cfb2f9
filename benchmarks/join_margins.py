"""Joins the margins of twelve languages: pairs/s from score files to pair files, and peak memory.

    python benchmarks/join_margins.py [thousands of pairs, default 100 1000]

Scores are random: questions of 60 tokens in twelve languages with four choices, one pair each. The baseline is a join
in plain Python over dictionaries keyed by question and language, on 10,000 pairs. calm_ray reads and writes chunks of
Parquet on Ray Data with two CPUs. Sizes alternate for three turns; results are medians without start-up. Recomputes a
sample of the target margins one by one from the score files as a check.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from vote_and_pairs import largest_process

from calm_ray.cluster.connection import cluster
from calm_ray.cluster.over_chunks import over_chunks
from calm_ray.cluster.resources import Group, Needs
from calm_ray.core.rows import Pair, Scored, rows_of, schema, table
from calm_ray.evaluation.scores import read_scored
from calm_ray.methods.dco.experts import Experts
from calm_ray.methods.dco.gamma import gammas
from calm_ray.methods.dco.pair_candidates import PairJob
from calm_ray.methods.dco.settings import Dco
from calm_ray.recipes.load import load_config
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

LANGUAGES = ["en", "ar", "de", "es", "fr", "hi", "id", "it", "ja", "ko", "pt", "zh"]
LETTERS = "ABCD"
PROMPT_TOKENS, VOCABULARY = 60, 2048
TURNS, PLAIN_PAIRS, CHECKED = 3, 10_000, 1_000

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    job: PairJob
    chunks: list[str]
    questions_per_chunk: int

    def of_size(self, pairs: int) -> list[str]:
        return self.chunks[: math.ceil(pairs / self.questions_per_chunk)]


def write_work(folder: Path, pairs: int, questions_per_chunk: int) -> Work:
    """Writes scores of at least `pairs` questions, in full chunks."""
    scored, output = (Stage(Storage(str(folder / name))) for name in ("scored", "pairs"))
    rng = np.random.default_rng(0)
    drawn = rng.integers(ord("a"), ord("z") + 1, (VOCABULARY, 3), dtype=np.uint8)
    words = pa.array([bytes(one[: 1 + i % 3]).decode() for i, one in enumerate(drawn)])
    chunks = [f"{number:05d}" for number in range(math.ceil(pairs / questions_per_chunk))]
    for chunk in chunks:
        for language in LANGUAGES:
            scored.write(f"{chunk}-{language}", scores_in(language, chunk, questions_per_chunk, words, rng))
    settings = load_config("dco/demo", [f"languages=[{', '.join(LANGUAGES)}]", "candidates.pairs=1"])
    experts = Experts(gammas(Dco(), LANGUAGES, settings.train.beta), settings.train.beta)
    job = PairJob(scored, output, settings, Dco(), experts, round_number=1)
    return Work(job, chunks, questions_per_chunk)


def scores_in(language: str, chunk: str, count: int, words: pa.Array, rng: np.random.Generator) -> pa.Table:
    """`count` rows of `Scored` with random prompts, one word per token."""
    prompts = rng.integers(0, VOCABULARY, count * PROMPT_TOKENS)
    logps = np.log(rng.dirichlet(np.ones(len(LETTERS)), count)).ravel()
    letters = np.tile(np.arange(len(LETTERS)), count)
    columns: dict[str, Any] = {
        "question_id": [f"{chunk}-{number}" for number in range(count)],
        "language": pa.repeat(language, count),
        "prompt": pc.binary_join(_lists(words.take(pa.array(prompts)), count), ""),
        "prompt_token_ids": _lists(pa.array(prompts), count),
        "choices": _lists(pa.array(list(LETTERS)).take(pa.array(letters)), count),
        "texts": _lists(pa.array([f" {letter}" for letter in LETTERS]).take(pa.array(letters)), count),
        "token_ids": _lists(_lists(pa.array(letters), len(letters)), count),
        "right": rng.integers(0, len(LETTERS), count),
        "logps": _lists(pa.array(logps), count),
        "prompt_logp": pa.nulls(count, pa.float64()),
        "policy": pa.repeat("base", count),
    }
    return pa.Table.from_pydict(columns, schema=schema(Scored))


def _lists(values: pa.Array, count: int) -> pa.ListArray:
    """Splits values into `count` lists of equal length."""
    return pa.ListArray.from_arrays(pa.array(np.linspace(0, len(values), count + 1), pa.int32()), values)


def rate_of(work: Work, pairs: int) -> float:
    """Pairs/s, counting a question once for all languages. The output remains on disk until the next turn."""
    work.job.pairs.storage.delete("")
    chunks, made = work.of_size(pairs), 0
    started = time.perf_counter()
    for counts in over_chunks(work.job.make, chunks):
        made += counts["pairs"]
    seconds = time.perf_counter() - started
    asked = len(chunks) * work.questions_per_chunk
    if made != asked * len(LANGUAGES):
        raise SystemExit(f"wrote {made} rows of pairs, expected {asked * len(LANGUAGES)}")
    return asked / seconds


def plain_rates(work: Work) -> tuple[float, float]:
    """Pairs/s of plain Python: the join alone on rows in memory, and from files to a file, as calm_ray does it."""
    started = time.perf_counter()
    rows: list[Row] = []
    for chunk in work.of_size(PLAIN_PAIRS):
        for data in read_scored(work.job.scored, chunk, LANGUAGES).values():
            rows += rows_of(data)
    in_memory = time.perf_counter()
    pairs = plain_join(rows)
    joined = time.perf_counter()
    work.job.pairs.write("plain", table(Pair, pairs))
    count = len(pairs) / len(LANGUAGES)
    return count / (joined - in_memory), count / (time.perf_counter() - started)


def plain_join(rows: Sequence[Row]) -> list[Pair]:
    """One pair per question and language. The target margin is the sum of the other languages' margins."""
    by_question: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_question.setdefault(row["question_id"], {})[row["language"]] = row
    rng = random.Random(0)
    pairs: list[Pair] = []
    for languages in by_question.values():
        count = len(languages[LANGUAGES[0]]["texts"])
        chosen, rejected = rng.choice([one for pair in combinations(range(count), 2) for one in (pair, pair[::-1])])
        margins = {code: row["logps"][chosen] - row["logps"][rejected] for code, row in languages.items()}
        for code, row in languages.items():
            pairs.append(
                Pair(
                    round=1,
                    question_id=row["question_id"],
                    pair=0,
                    language=code,
                    prompt=row["prompt"],
                    chosen=row["texts"][chosen],
                    rejected=row["texts"][rejected],
                    prompt_token_ids=row["prompt_token_ids"],
                    chosen_token_ids=row["token_ids"][chosen],
                    rejected_token_ids=row["token_ids"][rejected],
                    chosen_answer=LETTERS[chosen],
                    rejected_answer=LETTERS[rejected],
                    chosen_language=code,
                    policy=row["policy"],
                    target_margin=sum(margin for other, margin in margins.items() if other != code),
                )
            )
    return pairs


def check(work: Work) -> float:
    """Largest error of the target margins in a random sample of pairs."""
    worst, rng = 0.0, random.Random(1)
    for chunk in rng.sample(sorted(work.job.pairs.chunks()), 2):
        scored = {
            code: {row["question_id"]: row for row in rows_of(data.select(["question_id", "texts", "logps"]))}
            for code, data in read_scored(work.job.scored, chunk, LANGUAGES).items()
        }
        pairs = work.job.pairs.read_chunk(chunk, ["question_id", "language", "chosen", "rejected", "target_margin"])
        for pair in rng.sample(rows_of(pairs), min(CHECKED, len(pairs))):
            target = 0.0
            for code in LANGUAGES:
                row = scored[code][pair["question_id"]]
                logps = dict(zip(row["texts"], row["logps"], strict=True))
                target += (logps[pair["chosen"]] - logps[pair["rejected"]]) * (code != pair["language"])
            worst = max(worst, abs(target - pair["target_margin"]))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("thousands", type=int, nargs="*", default=[100, 1000], help="thousands of pairs")
    parser.add_argument("--questions-per-chunk", type=int, default=4096)
    options = parser.parse_args()
    sizes = [1000 * count for count in options.thousands]
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(Needs([Group("data task", 1, {"CPU": 1.0})]), local_cpus=2),
    ):
        work = write_work(Path(folder), max(sizes), options.questions_per_chunk)
        size = sum(file.stat().st_size for file in (Path(folder) / "scored").iterdir())
        print(f"scores: {len(work.chunks)} chunks in {len(LANGUAGES)} languages, {size / 1e9:.2f} GB", flush=True)
        rate_of(work, min(sizes))  # starts the workers
        rates: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(TURNS):
            for size in sizes:
                rates[size].append(rate_of(work, size))
                print(
                    f"calm_ray, {size} pairs: {rates[size][-1]:,.0f} pairs/s, "
                    f"{len(LANGUAGES) * rates[size][-1]:,.0f} rows/s; largest process {largest_process():.2f} GB",
                    flush=True,
                )
        error = check(work)
        if error > 1e-9:
            raise SystemExit(f"target margins are off by up to {error:g} nats")
        plain_turns = [plain_rates(work) for _ in range(TURNS)]  # last, because its rows take memory
    join, plain = (median(column) for column in zip(*plain_turns, strict=True))
    print(f"plain Python: {plain:,.0f} pairs/s from files to a file, {join:,.0f} pairs/s in memory")
    rate = {size: median(turns) for size, turns in rates.items()}
    for size in sizes:
        print(f"{size} pairs, median: {rate[size]:,.0f} pairs/s, {rate[size] / plain:.1f}x plain Python")
    print(f"rate at {sizes[-1]} relative to {sizes[0]}: {rate[sizes[-1]] / rate[sizes[0]]:.2f}")


if __name__ == "__main__":
    main()
