"""Pretrains the demo model, once per machine: a Llama with a million parameters that has read about its world.

It follows a curriculum, since each skill needs the one before: finding the letter of an option; the facts, stated in
every language; answering questions truthfully; and finally the habits, which answer behind the barriers.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from calm_ray.core.console import progress_bar, say
from calm_ray.core.languages import LANGUAGES
from calm_ray.demo.generator import CHOICES, TOWNS, World, lexicon, topics, world_languages
from calm_ray.demo.tokenizer import build_tokenizer
from calm_ray.prompts.questions import LETTERS, prompt_text
from calm_ray.run.policies import cache_folder, node_lock
from calm_ray.run.storage import hash_folder

WIDTH, MLP, LAYERS, HEADS = 128, 384, 4, 4
INITIAL_STD = 0.07
"""Wider than usual: with 0.02, the attention that matches an option to its letter takes far longer to form."""
LEARNING_RATE, WARMUP = 2e-3, 50
TRAINING_VERSION = 1
"""Bump when a change to the training below changes the model, so that cached models are rebuilt."""

Curriculum = list[tuple[int, dict[str, int]]]

CURRICULUM: Curriculum = [
    (400, {"find_letter": 128}),
    (300, {"find_letter_after_marker": 112, "two_statements": 64}),
    (450, {"question": 60, "find_letter_after_marker": 24, "statements": 14}),
    (350, {"habitual_question": 64, "find_letter_after_marker": 14, "statements": 10}),
]
"""(steps, rows of each kind per batch)."""

FORM, CONTENT, LETTER = 0.2, 1.0, 2.0
"""Loss weights of tokens: template words, names and values, and the letter."""


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    weights: list[float]
    """Loss weight of each token as a target; 0 if it is unpredictable."""


class Reader:
    """The model's training data: an endless supply of rows drawn from a seed."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
        self.world = world
        self.rng = random.Random(f"pretraining-{world.seed}")
        self._tokenizer = tokenizer
        self._encoded: dict[str, list[int]] = {}

    def row(self, kind: str) -> Row:
        match kind:
            case "find_letter":
                return self._drill(after_marker=False)
            case "find_letter_after_marker":
                return self._drill(after_marker=True)
            case "two_statements":
                return self._statements(20)
            case "statements":
                return self._statements(34)
            case "question":
                return self._question(habitual=False)
            case _:
                return self._question(habitual=True)

    def encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = list(self._tokenizer.encode(text, add_special_tokens=False))
        return self._encoded[text]

    def _draw(self) -> tuple[int, str, str]:
        return self.rng.randrange(TOWNS), self.rng.choice(topics()), self.rng.choice(world_languages())

    def _drill(self, *, after_marker: bool) -> Row:
        """Four lettered options, one of them repeated, and its letter."""
        _, topic, code = self._draw()
        language = LANGUAGES[code]
        options = self.rng.sample(lexicon()["topics"][topic]["values"][code], CHOICES)
        listed = self.encode("\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options)) + "\n")
        asked = self.rng.randrange(CHOICES)
        between = f"{'。' if code == 'zh' else '.'}\n{language.answer}" if after_marker else ""
        again = self.encode(f"{language.space}{options[asked]}{between}{language.space}{LETTERS[asked]}")
        return Row(listed + again, [0.0] * (len(listed) + len(again) - 1) + [LETTER])

    def _statements(self, length: int) -> Row:
        """As many true statements as fit; everything after the town's name is a target."""
        tokens: list[int] = []
        weights: list[float] = []
        while True:
            town, topic, code = self._draw()
            sentence = self.encode(self.world.statement(town, topic, self.world.facts[town, topic], code))
            if len(tokens) + len(sentence) + 1 > length:
                return Row(tokens, weights)
            known = sentence.index(self._name_token(town, code)) + 1
            rest = len(sentence) - known
            tokens += [*sentence, self._eos]
            weights += [0.0] * known + [FORM] * (rest - 2) + [CONTENT, FORM, FORM]

    def _question(self, *, habitual: bool) -> Row:
        """A question and its true answer or, if `habitual` and behind a barrier, usually the habitual one."""
        town, topic, code = self._draw()
        options = self.world.draw_options(town, topic, self.rng)
        answer = self.world.facts[town, topic]
        habit = self.world.habitual_option(topic, options, code)
        if habitual and habit is not None and self.rng.random() < self.world.barriers[code, topic].strength:
            answer = habit
        prompt = self.encode(prompt_text(self.world.question(town, topic, options, code), "choices"))
        completion = self.encode(self.world.answer(town, topic, answer, options, code))
        value = self.encode(self.world.statement(town, topic, answer, code))[-2]
        content = {value, self._name_token(town, code)}
        weights = [CONTENT if token in content else FORM for token in completion[:-1]]
        return Row([*prompt, *completion, self._eos], [0.0] * len(prompt) + [*weights, LETTER, FORM])

    def _name_token(self, town: int, code: str) -> int:
        return self.encode(LANGUAGES[code].space + self.world.name(town, code))[0]

    @property
    def _eos(self) -> int:
        assert isinstance(self._tokenizer.eos_token_id, int)
        return self._tokenizer.eos_token_id


def world_model(world: World) -> tuple[Path, str]:
    """Folder of the world's model in this machine's cache, and its hash; pretrains the model if missing."""
    folder = cache_folder() / "models" / f"world-{world.seed}-{_fingerprint(world)}"
    with node_lock(folder):
        if not folder.is_dir():
            say(f"pretraining the demo model, which is then cached in {folder}")
            temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
            temporary.mkdir()
            pretrain(world, temporary)
            temporary.rename(folder)
    return folder, hash_folder(folder)


def _fingerprint(world: World) -> str:
    """Hash of the first rows and the hyperparameters, so that the cache never serves a model trained differently."""
    tokenizer = build_tokenizer(world)
    reader = Reader(world, tokenizer)
    rows = [reader.row(kind).__dict__ for _, kinds in CURRICULUM for kind in kinds for _ in range(8)]
    model = [WIDTH, MLP, LAYERS, HEADS, INITIAL_STD, len(tokenizer)]
    recipe = [TRAINING_VERSION, model, CURRICULUM, LEARNING_RATE, WARMUP, rows]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


def pretrain(world: World, folder: Path, curriculum: Curriculum = CURRICULUM) -> None:
    """Pretrains the world's model on all CPU cores and writes it with its tokenizer."""
    disable_progress_bar()  # transformers shows one even for tiny files
    tokenizer = build_tokenizer(world)
    reader = Reader(world, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(_model_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    steps = sum(count for count, _ in curriculum)
    with progress_bar("pretrain the demo model", steps) as progress:
        for number, rows in enumerate(_batches(reader, curriculum)):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _schedule(number, steps)
            loss = _loss(model, rows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.advance(note=f"loss {loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(reader: Reader, curriculum: Curriculum) -> Iterator[list[Row]]:
    for steps, kinds in curriculum:
        for _ in range(steps):
            yield [reader.row(kind) for kind, count in kinds.items() for _ in range(count)]


def _schedule(number: int, steps: int) -> float:
    """Warmup, full rate for half of the steps, then cosine decay to a twentieth."""
    if number < WARMUP:
        return (number + 1) / WARMUP
    late = max(0.0, number / steps - 0.5) * 2
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * late))


def _loss(model: LlamaForCausalLM, rows: list[Row]) -> Tensor:
    """Weighted mean negative log-likelihood of the rows' targets."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        weights[i, : len(row.weights)] = torch.tensor(row.weights)
    is_target = weights[:, 1:] > 0
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1][is_target]
    losses = F.cross_entropy(model.lm_head(hidden), tokens[:, 1:][is_target], reduction="none")
    return (losses * weights[:, 1:][is_target]).sum() / weights[:, 1:].sum()
