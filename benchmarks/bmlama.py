"""DCO on BMLAMA-17, end to end on a small machine: does RankC rise, and how long does each part take?

    CALM_RAY_DATA=... python benchmarks/bmlama.py

Eight languages, 500 training questions and 100 held out. Trains a tokenizer on the questions and pretrains a small
Llama on the correct answers to a different half of the questions in each language, so that the languages know different
facts. Then runs DCO through the regular job.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm_ray.core.rows import Question
from calm_ray.prompts.candidates import MASK
from calm_ray.prompts.questions import LETTERS
from calm_ray.questions.reader import load_questions

ROOT = Path(__file__).parents[1]
LANGUAGES = ["ar", "en", "es", "fr", "ja", "ko", "ru", "zh"]
WIDTH, LAYERS, VOCABULARY, CONTEXT = 128, 4, 8192, 256
KNOWN_FRACTION, RIGHT_FRACTION = 0.5, 0.6
BATCH, LEARNING_RATE = 64, 2e-3
RECIPE: dict[str, Any] = {
    "name": "bmlama",
    "method": "dco",
    "rounds": 1,
    "languages": LANGUAGES,
    "device": "cpu",
    "candidates": {"form": "choices", "pairs": 8},
    "sampling": {"prompts_per_chunk": 100},
    "engines": {
        "shared": 2, "cpus": 0.2, "dtype": "float32", "refresh": "merged",
        "args": {"max_model_len": CONTEXT, "max_num_seqs": 128},
    },
    "train": {
        "learning_rate": 1e-3, "epochs": 1, "batch_pairs": 64, "dtype": "float32", "lora": None,
        "workers": 2, "cpus_per_worker": 0.2,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500, help="training questions")
    parser.add_argument("--held-out", type=int, default=100, help="held-out questions")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of pretraining")
    parser.add_argument("overrides", nargs="*", help="recipe overrides: section.key=value")
    options = parser.parse_args()
    data = Path(os.environ.get("CALM_RAY_DATA", "../shared/data")) / "bmlama17"
    if not data.is_dir():
        raise SystemExit(f"{data} is not a folder: set CALM_RAY_DATA to the folder with bmlama17/{{language}}.tsv")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = write_subsets(data, root, {"align": options.questions, "evaluate": options.held_out})
        with timed("tokenizer and pretraining"):
            questions = [row for subset in folders.values() for row in load_questions(subset, LANGUAGES).questions]
            pretrain(root / "model", questions, options.epochs)
        recipe = {**RECIPE, "model": str(root / "model"), "storage": str(root / "runs")}
        recipe["questions"] = {**folders, "on_bad_row": "skip"}
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with timed("job"):
            command = [sys.executable, str(ROOT / "jobs" / "dco.py"), str(root / "recipe.yaml"), *options.overrides]
            subprocess.run(command, check=True)
        report(root / "runs" / "bmlama")
    print(f"total: {time.perf_counter() - started:.0f} s")


@contextmanager
def timed(name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def write_subsets(data: Path, root: Path, counts: dict[str, int]) -> dict[str, str]:
    """Writes disjoint random subsets of BMLAMA, one folder per entry of `counts`; returns their paths."""
    lines = {code: (data / f"{code}.tsv").read_text("utf-8").rstrip("\n").split("\n") for code in LANGUAGES}
    drawn = random.Random(0).sample(range(1, len(lines["en"])), sum(counts.values()))
    for name, count in counts.items():
        numbers, drawn = drawn[:count], drawn[count:]
        (root / name).mkdir()
        for code, language_lines in lines.items():
            rows = [language_lines[number] for number in (0, *numbers)]
            (root / name / f"{code}.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    return {name: str(root / name) for name in counts}


def pretrain(folder: Path, questions: list[Question], epochs: int) -> None:
    """Pretrains a model on the correct answers to a random half of the questions in each language and saves it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([filled(row, choice) for row in questions for choice in row["choices"]])
    model = LlamaForCausalLM(model_config(tokenizer))
    steps = epochs * -(-len(questions) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    loss = 0.0
    for texts in batches(questions, epochs):
        rows = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
        loss = step(model, rows, tokenizer.pad_token_id, optimizer)
        schedule.step()
    print(f"pretrained: {steps} steps, final loss {loss:.2f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32,
        num_key_value_heads=WIDTH // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def filled(row: Question, choice: str) -> str:
    return row["text"].replace(MASK, choice)


def batches(questions: list[Question], epochs: int) -> Iterator[list[str]]:
    """Batches of texts: each epoch has every question in every language, filled with one of its candidates."""
    rng = random.Random(0)
    known = [rng.random() < KNOWN_FRACTION for _ in questions]
    for _ in range(epochs):
        texts = []
        for row, is_known in zip(questions, known, strict=True):
            is_right = is_known and rng.random() < RIGHT_FRACTION
            choice = LETTERS.index(str(row["gold"])) if is_right else rng.randrange(len(row["choices"]))
            texts.append(filled(row, row["choices"][choice]))
        rng.shuffle(texts)
        yield from (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))


def step(model: LlamaForCausalLM, rows: list[list[int]], pad: int, optimizer: torch.optim.Optimizer) -> float:
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    labels = tokens.masked_fill(tokens == pad, -100)
    loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.item())


def report(run: Path) -> None:
    """Prints the metrics of the run's summary, in percent."""
    before, after = json.loads((run / "summary.json").read_text())["rounds"]
    for title, base, policy, optimal in (
        ("training", before["training"], after["training"], after["optimal"]["training"]),
        ("held out", before, after, after["optimal"]["held_out"]),
    ):
        for name in ("rankc_mean", "top1", "accuracy_mean"):
            values = " -> ".join(f"{100 * one[name]:.1f}" for one in (base, policy))
            print(f"{title}: {name} {values}; pi* {100 * optimal[name]:.1f}")
        print(f"{title}: same answer as pi* {100 * optimal['top1_with_optimal']:.1f}")
    print("seconds:", {name: round(before["seconds"].get(name, 0) + value) for name, value in after["seconds"].items()})


if __name__ == "__main__":
    main()
