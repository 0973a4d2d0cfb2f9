"""Throughput from completions on disk to pairs, compared with the published algorithm in plain Python.

Both build the pairs published with CALM from its samples (Llama 3, X-CSQA, six languages), repeated to one and ten
million completions: extract answers, vote, pick winners, and write out both sides of every pair as text. The baseline,
like the released script, is one process with lists and dictionaries; it starts from records in memory and does not
translate. calm_ray reads chunks of Parquet and returns the pairs as Arrow tables, on Ray Data. Results are medians of
three runs, without start-up.

    CALM_RAY_DATA=... python benchmarks/vote_and_pairs.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pyarrow as pa

from calm_ray.cluster.connection import cluster
from calm_ray.cluster.resources import Group, Needs
from calm_ray.methods.calm.from_disk import RecordedJob, pairs_of_chunks
from calm_ray.methods.calm.import_completions import UNCOMPRESSED, open_completions
from calm_ray.methods.calm.recorded import RecordedChunks
from calm_ray.methods.calm.settings import Preferences
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

COPIES_PER_CHUNK, COMPLETIONS_PER_COPY = 3, 16_182
TURNS = 3
MARKERS = {
    "en": ["Answer:"], "cn": ["答案:", "答案："], "fr": ["Réponse:", "Réponse :"],
    "de": ["Antwort:"], "it": ["Risposta:"], "ja": ["答え:", "答え："],
}  # fmt: skip
PREFIXES = {
    "en": "Explanation:", "cn": "解释:", "fr": "Explication:", "de": "Erklärung:", "it": "Spiegazione:", "ja": "説明:"
}  # fmt: skip
MERGED = ["ja", "fr", "cn", "it", "de", "en"]

Records = dict[str, list[dict[str, Any]]]


def read_letter(response: str, language: str) -> str | None:
    for marker in MARKERS[language]:
        response = response.split(marker)[-1]
    response = response.strip()
    if len(response) == 1:
        return response
    for place in (1, 0):
        if len(response) > place and response[place] in "ABCDE":
            return response[place]
    return None


def winner_of(entries: list[tuple[str, str, str]]) -> str | None:
    counts: dict[str, int] = {}
    for answer, _, _ in entries:
        counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=lambda answer: counts[answer]) if counts else None


def explanation_of(response: str, language: str) -> str:
    for marker in MARKERS[language]:
        response = response.rsplit(marker, 1)[0]
    return response.strip().removeprefix(PREFIXES[language]).strip()


def plain_pairs(records: Records) -> list[dict[str, str]]:
    """The published algorithm, one question at a time."""
    pairs = []
    for number in range(len(records["en"])):
        merged = []
        for language in MERGED:
            for response in records[language][number]["pred"]:
                answer = read_letter(response, language)
                if answer is not None:
                    merged.append((answer, language, response))
        for language in MARKERS:
            judged = [entry for entry in merged if entry[1] == language]
            voters = judged if language == "en" else merged
            winner = winner_of(voters)
            if winner is None:
                continue
            _, source, response = next(entry for entry in reversed(voters) if entry[0] == winner)
            question = records[language][number]["input"]
            option = next((line for line in question.split("\n") if line.startswith(f"{winner}. ")), winner)
            chosen = f"{PREFIXES[language]} {explanation_of(response, source)}\n{MARKERS[language][0]}{option}"
            for answer, _, rejected in judged:
                if answer != winner:
                    pairs.append({"input": question, "chosen": chosen, "rejected": rejected})
    return pairs


def write_chunks(samples: Path, copies: int, folder: Path) -> RecordedChunks:
    """Writes chunks with `copies` copies of the samples, each under different ids."""
    stage = Stage(Storage(str(folder)))
    once = open_completions(
        [str(samples)], Stage(stage.storage.under("once")), questions=None, on_bad_row="refuse", own_codes=True
    ).chunks
    (name,) = once.chunks
    recorded = once.read(name)
    asked, completions = (Stage(stage.storage.under(part)) for part in ("asked", "completions"))
    chunks: dict[str, list[str]] = {}
    for first in range(0, copies, COPIES_PER_CHUNK):
        numbers = range(first, min(copies, first + COPIES_PER_CHUNK))
        chunk = f"{len(chunks):05d}"
        asked.write(chunk, pa.concat_tables([_renamed(recorded.asked, number) for number in numbers]), UNCOMPRESSED)
        together = pa.concat_tables([_renamed(recorded.completions, number) for number in numbers])
        completions.write(chunk, together.sort_by("language"), UNCOMPRESSED)
        chunks[chunk] = [chunk]
    return RecordedChunks(asked, completions, chunks)


def _renamed(table: pa.Table, copy: int) -> pa.Table:
    ids = pa.array([f"{copy}-{name}" for name in table["question_id"].to_pylist()])
    return table.set_column(0, "question_id", ids)


def largest_process() -> float:
    """Peak resident memory in GB, shared pages included, of this process and its descendants."""
    me = psutil.Process()
    peaks = []
    for process in [me, *me.children(recursive=True)]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peaks += [int(line.split()[1]) / 1e6 for line in status.splitlines() if line.startswith("VmHWM:")]
    return max(peaks)


def plain_rate(samples: Path) -> tuple[float, float]:
    """(completions/s, pairs per completion) of the plain algorithm on a million completions."""
    records = {code: json.loads((samples / f"x_csqa_{code}_train_sampled.json").read_text("utf-8")) for code in MARKERS}
    one_copy = sum(len(record["pred"]) for responses in records.values() for record in responses)
    copies = round(1e6 / one_copy)
    started = time.perf_counter()
    pairs = len(plain_pairs({code: responses * copies for code, responses in records.items()}))
    return copies * one_copy / (time.perf_counter() - started), pairs / (copies * one_copy)


def calm_rate(chunks: RecordedChunks) -> tuple[float, Counter[str]]:
    """(completions/s, counts) of calm_ray, from the files to the last pair in this process."""
    started = time.perf_counter()
    total: Counter[str] = Counter()
    for table, counts in pairs_of_chunks(RecordedJob(chunks, Preferences(preset="released"), 0)):
        total.update({"pairs": len(table), "completions": counts["completions"]})
    return total["completions"] / (time.perf_counter() - started), total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("millions", type=float, nargs="*", default=[1.0, 10.0], help="millions of completions")
    millions = parser.parse_args().millions
    samples = Path(os.environ["CALM_RAY_DATA"]) / "calm_xcsqa" / "samples"
    runs = [plain_rate(samples) for _ in range(TURNS)]
    plain, pairs_per_completion = median(rate for rate, _ in runs), runs[0][1]
    print(f"plain Python: {plain:,.0f} completions/s", flush=True)
    rates = []
    with (
        cluster(Needs([Group("data task", 1, {"CPU": 1.0})]), local_cpus=os.cpu_count() or 1),
        tempfile.TemporaryDirectory() as folder,
    ):
        chunks = write_chunks(samples, math.ceil(max(millions) * 1e6 / COMPLETIONS_PER_COPY), Path(folder))
        for size in millions:
            count = math.ceil(size * 1e6 / COMPLETIONS_PER_COPY / COPIES_PER_CHUNK)
            some = replace(chunks, chunks=dict(islice(chunks.chunks.items(), count)))
            calm_rate(some)  # starts the workers
            turns = [calm_rate(some) for _ in range(TURNS)]
            rate, total = median(rate for rate, _ in turns), turns[0][1]
            if abs(total["pairs"] - pairs_per_completion * total["completions"]) > 0.5:
                raise SystemExit(f"unexpected number of pairs: {total}")
            rates.append(rate)
            print(
                f"calm_ray, {total['completions']} completions, {total['pairs']} pairs: {rate:,.0f} completions/s, "
                f"{rate / plain:.2f}x; largest process {largest_process():.2f} GB",
                flush=True,
            )
    print(f"rate at {millions[-1]:g} M relative to {millions[0]:g} M: {rates[-1] / rates[0]:.2f}")


if __name__ == "__main__":
    main()
