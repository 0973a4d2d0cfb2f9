"""How much faster is packed training than padded? Compares calm_ray's loop with TRL's DPOTrainer on the same pairs.

    CALM_RAY_DATA=... python benchmarks/packed_training.py

Uses the published X-CSQA pairs (`calm_xcsqa/pairs/DPO_*.json`) for a realistic distribution of lengths, a tokenizer
trained on their texts, and a small Llama with random weights. Both engines use the same pairs, batch size, adapter,
precomputed reference and number of Ray Train workers. They alternate twice; start-up is excluded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Literal

import ray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from calm_ray.core.rows import Pair, table
from calm_ray.core.sections import Lora, Train
from calm_ray.run.policies import Policy, RunModel
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.testing import write_tiny_model
from calm_ray.training.job import TrainJob
from calm_ray.training.objectives import DPO
from calm_ray.training.workers import train_round

LANGUAGES = ["cn", "de", "en", "fr", "it", "ja"]
ENGINES: dict[str, Literal["fsdp", "trl"]] = {"packed": "fsdp", "padded": "trl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=384, help="pairs to draw from all languages")
    parser.add_argument("--batch-pairs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    texts = read_pairs(options.pairs)
    tokenizer = train_tokenizer([side for row in texts for side in row])
    os.environ.setdefault("RAY_AUTH_TOKEN", "a" * 64)  # otherwise Ray writes one to the home folder
    ray.init(num_cpus=options.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = write_tiny_model(root / "model", tokenizer, width=options.width, layers=options.layers)
        pairs = Stage(Storage(str(root / "pairs")))
        rows = [to_pair(number, texts[number], tokenizer) for number in range(len(texts))]
        pairs.write("00000", table(Pair, rows))
        describe(rows, options.batch_pairs // options.workers)
        seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
        for turn in range(2):
            for name, engine in ENGINES.items():
                output = Stage(Storage(str(root / f"{name}-{turn}")))
                seconds[name].append(train(engine, model, pairs, output, options.batch_pairs, options.workers))
                print(f"{name}: {len(rows) / seconds[name][-1]:.1f} pairs/s", flush=True)
    print(f"packed : padded = {min(seconds['padded']) / min(seconds['packed']):.2f}")


def read_pairs(count: int) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) texts."""
    folder = Path(os.environ.get("CALM_RAY_DATA", "../shared/data")) / "calm_xcsqa" / "pairs"
    rows = [row for code in LANGUAGES for row in json.loads((folder / f"DPO_{code}.json").read_text())]
    drawn = random.Random(0).sample(rows, count)
    return [(f"{row['instruction']}\n{row['input']}\n", row["chosen"], row["rejected"]) for row in drawn]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def to_pair(number: int, texts: tuple[str, str, str], tokenizer: PreTrainedTokenizerFast) -> Pair:
    prompt, chosen, rejected = texts
    eos = [tokenizer.eos_token_id]
    return Pair(
        round=1, question_id=str(number), pair=0, language="en", prompt=prompt, chosen=chosen, rejected=rejected,
        prompt_token_ids=tokenizer.encode(prompt), chosen_token_ids=tokenizer.encode(chosen) + eos,
        rejected_token_ids=tokenizer.encode(rejected) + eos, chosen_answer="A", rejected_answer="B",
        chosen_language="en", policy="base", target_margin=None,
    )  # fmt: skip


def describe(rows: list[Pair], pairs_per_forward: int) -> None:
    """Prints quantiles of sequence lengths and the fraction of padding in padded batches of random pairs."""
    lengths = [
        len(row["prompt_token_ids"]) + len(side)
        for row in rows
        for side in (row["chosen_token_ids"], row["rejected_token_ids"])
    ]
    size = 2 * pairs_per_forward
    padded = sum(max(lengths[i : i + size]) * len(lengths[i : i + size]) for i in range(0, len(lengths), size))
    ordered = sorted(lengths)
    quantiles = [ordered[round(q * (len(ordered) - 1))] for q in (0, 0.5, 0.9, 1)]
    print(f"{len(rows)} pairs; tokens per sequence: min, median, 90%, max = {quantiles}")
    print(f"padding in a padded batch: {1 - sum(lengths) / padded:.0%}")


def train(
    engine: Literal["fsdp", "trl"], model: Path, pairs: Stage, output: Stage, batch_pairs: int, workers: int
) -> float:
    """Trains one epoch; returns the seconds spent in its steps."""
    settings = Train(
        engine=engine, learning_rate=1e-5, warmup_ratio=0.1, epochs=1, batch_pairs=batch_pairs, validation_fraction=0,
        dtype="float32", workers=workers, lora=Lora(), max_pair_tokens=512,
    )  # fmt: skip
    job = TrainJob(pairs, output, RunModel(str(model)), Policy(), Policy(), settings, DPO(0.1), 0, 1)
    metrics: list[dict[str, float]] = []
    train_round(job, "cpu", metrics.append)
    steps = [row["seconds"] for row in metrics if "seconds" in row]
    return sum(steps) if steps else next(row["trl/train_runtime"] for row in metrics if "trl/train_runtime" in row)


if __name__ == "__main__":
    main()
