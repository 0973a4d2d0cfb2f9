"""Translates with a Hugging Face sequence-to-sequence model in Ray actors: NLLB, M2M100, mBART, MADLAD or Marian.

A Ray Data pipeline streams batches through the actors, each of which loads the model once.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import ray
import ray.data
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from calm_ray.core.errors import InputError
from calm_ray.core.languages import LANGUAGES, language_code
from calm_ray.core.rows import rows_of, table
from calm_ray.questions.translation import BATCH, Answer, Request, Wording, check_codes, lines_of, with_lines
from calm_ray.run.policies import RunModel, require_safetensors


@dataclass(frozen=True)
class Family:
    """How a family of models is told which languages to translate between."""

    token: str
    """Regular expression of a language token; takes {code}, {flores} and {iso3}."""
    forced: bool
    """Whether the target's token is forced as first output token (and `src_lang` names the source) or prefixes the
    input."""


FAMILIES = {
    "NLLB": Family(r"{flores}", forced=True),
    "M2M100": Family(r"__{code}__", forced=True),
    "mBART-50": Family(r"{code}_[A-Z]{{2}}", forced=True),
    "MADLAD-400": Family(r"<2{code}>", forced=False),
    "multilingual Marian": Family(r">>({code}|{iso3})<<", forced=False),
}


@dataclass(frozen=True)
class Direction:
    """What a model needs to translate one pair of languages."""

    src_lang: str | None = None
    """Set on the tokenizer."""
    forced: str | None = None
    """First output token."""
    prefix: str = ""
    """Prepended to the input."""


def direction(tokenizer: PreTrainedTokenizerBase, model: str, source: str, target: str) -> Direction:
    """How to make the model translate from `source` into `target`; the tokenizer's vocabulary determines its family.

    A Marian model without language tokens translates only the pair that its tokenizer names. Raises InputError if the
    model does not support a language.
    """
    vocabulary = list(tokenizer.get_vocab())
    for family in FAMILIES.values():
        # A large vocabulary may hold "fr_FR" as a word; forced language tokens are always special tokens.
        tokens = tokenizer.all_special_tokens if family.forced else vocabulary
        found, known = _language_token(family, target, tokens), _language_token(family, source, tokens)
        if found is None:
            continue
        if family.forced and known is not None:
            # `src_lang` takes the token's name; for M2M100, without the underscores.
            return Direction(src_lang=known.strip("_"), forced=found)
        if not family.forced and (known is not None or _is_fixed(tokenizer, "source_lang", source)):
            return Direction(prefix=f"{found} ")
        raise _unknown(model, source, "from")
    if not _is_fixed(tokenizer, "target_lang", target):
        raise _unknown(model, target, "into")
    if not _is_fixed(tokenizer, "source_lang", source):
        raise _unknown(model, source, "from")
    return Direction()


def _language_token(family: Family, language: str, tokens: Sequence[str]) -> str | None:
    flores = LANGUAGES[language].flores
    pattern = re.compile(family.token.format(code=language, flores=flores, iso3=flores[:3]))
    return next((token for token in tokens if pattern.fullmatch(token)), None)


def _is_fixed(tokenizer: PreTrainedTokenizerBase, side: str, language: str) -> bool:
    name = getattr(tokenizer, side, None)
    return name is not None and language_code(name) == language


def _unknown(model: str, language: str, side: str) -> InputError:
    return InputError(
        f"translation: the model {model} does not translate {side} {LANGUAGES[language].name} ({language!r}); "
        f"supported models: {', '.join(FAMILIES)} and bilingual Marian"
    )


class Seq2SeqModel:
    """The model in this process. Uses greedy or beam search, as its generation config says; never samples."""

    def __init__(self, model: RunModel, device: str, max_new_tokens: int, lines_per_batch: int = 64) -> None:
        folder = model.local_folder()
        require_safetensors(folder)
        self._name, self._max_new_tokens, self._lines_per_batch = model.name, max_new_tokens, lines_per_batch
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._model = AutoModelForSeq2SeqLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
        self._model.to(device).eval()
        # Truncated output must not end in EOS like finished output, and `max_new_tokens` sets its length.
        self._model.generation_config.forced_eos_token_id = None
        self._model.generation_config.max_length = None

    @property
    def _max_input_tokens(self) -> int:
        positions = getattr(self._model.config, "max_position_embeddings", None) or self._tokenizer.model_max_length
        return int(min(positions, self._tokenizer.model_max_length))

    def translate(self, texts: Sequence[str], source: str, target: str) -> list[str | None]:
        """Translates each text line by line; None if a line is too long or its translation is empty.

        Also None if a line's translation does not finish within `max_new_tokens`: it is truncated or repetitive.
        """
        pair = direction(self._tokenizer, self._name, source, target)
        # Deduplicated, and sorted by length to reduce padding.
        lines = sorted({line for text in texts for line in lines_of(text)}, key=lambda line: (len(line), line))
        if pair.src_lang is not None:
            self._tokenizer.src_lang = pair.src_lang
        done: dict[str, str | None] = {}
        for first in range(0, len(lines), self._lines_per_batch):
            done |= self._generate(lines[first : first + self._lines_per_batch], pair)
        found = [[done[line] for line in lines_of(text)] for text in texts]
        return [
            None if None in parts else with_lines(text, [part for part in parts if part is not None])
            for text, parts in zip(texts, found, strict=True)
        ]

    def _generate(self, lines: Sequence[str], pair: Direction) -> dict[str, str | None]:
        ids = [self._tokenizer(pair.prefix + line)["input_ids"] for line in lines]
        fitting = [i for i, one in enumerate(ids) if len(one) <= self._max_input_tokens]
        done: dict[str, str | None] = dict.fromkeys(lines)
        if not fitting:
            return done
        padded = self._tokenizer.pad({"input_ids": [ids[i] for i in fitting]}, return_tensors="pt")
        output = self._model.generate(
            input_ids=padded["input_ids"].to(self._model.device),
            attention_mask=padded["attention_mask"].to(self._model.device),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            forced_bos_token_id=self._tokenizer.convert_tokens_to_ids(pair.forced) if pair.forced else None,
        )
        # Drop the decoder start token, which some models share with EOS.
        for i, one in zip(fitting, output[:, 1:].tolist(), strict=True):
            text = str(self._tokenizer.decode(one, skip_special_tokens=True)).strip()
            done[lines[i]] = text if self._tokenizer.eos_token_id in one and text else None
        return done


class _Job(TypedDict):
    """Texts to translate into one language; afterwards, their translations."""

    number: int
    source: str
    target: str
    texts: list[str | None]


class _Translate:
    """Ray actor that translates blocks of jobs."""

    def __init__(self, *model: Any) -> None:
        self._model = Seq2SeqModel(*model)

    def __call__(self, block: pa.Table) -> pa.Table:
        rows: list[_Job] = rows_of(block)
        by_pair: dict[tuple[str, str], list[_Job]] = defaultdict(list)
        for row in rows:
            by_pair[row["source"], row["target"]].append(row)
        for pair, jobs in by_pair.items():
            texts = [text for job in jobs for text in job["texts"] if text is not None]
            done = dict(zip(texts, self._model.translate(texts, *pair), strict=True))
            for job in jobs:
                job["texts"] = [done[text] for text in job["texts"] if text is not None]
        return table(_Job, rows)


@dataclass(frozen=True)
class Seq2SeqTranslator:
    """A `QuestionTranslator` that runs a model, given by Hub name or folder, in `actors` actors."""

    model: RunModel
    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    """Per actor, like `cpus`; the model runs on the CPU if this is 0."""
    max_new_tokens: int = 256
    """Per line; a longer translation fails."""

    @cached_property
    def _folder(self) -> Path:
        """The model's local folder, checked."""
        folder = self.model.local_folder()
        require_safetensors(folder)
        if not AutoConfig.from_pretrained(folder, trust_remote_code=False).is_encoder_decoder:
            raise InputError(f"translation: {self.model.name} is not a sequence-to-sequence model")
        return folder

    @cached_property
    def identity(self) -> str:
        """The model's name, a hash of its files and `max_new_tokens`."""
        digest = hashlib.sha256()
        for file in sorted(self._folder.iterdir()):
            if file.suffix in (".json", ".txt", ".model", ".spm", ".safetensors"):
                digest.update(file.name.encode() + b"\0")
                with open(file, "rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
        return f"{Path(self.model.name).name} {digest.hexdigest()} {self.max_new_tokens}"

    def check(self, source: str, targets: Sequence[str]) -> None:
        check_codes([source, *targets])
        tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
        for target in targets:
            direction(tokenizer, self.model.name, source, target)

    def translate(self, requests: Sequence[Request]) -> Iterator[Answer]:
        jobs = [
            _Job(number=i, source=one.source, target=one.target, texts=[one.wording.text, *one.wording.choices])
            for i, one in enumerate(requests)
        ]
        for job in self._stream(jobs):
            texts = [text for text in job["texts"] if text is not None]
            is_whole = len(texts) == len(job["texts"])
            yield requests[job["number"]], Wording(texts[0], tuple(texts[1:])) if is_whole else None

    def _stream(self, jobs: Sequence[_Job]) -> Iterator[_Job]:
        """Yields the jobs as they finish, in any order."""
        if not jobs:
            return
        blocks = [table(_Job, jobs[first : first + BATCH]) for first in range(0, len(jobs), BATCH)]
        translated = ray.data.from_arrow(blocks).map_batches(
            _Translate,
            fn_constructor_args=(self.model, "cuda" if self.gpus else "cpu", self.max_new_tokens),
            batch_size=None,  # one block at a time
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(self.actors, len(blocks))),
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )
        yield from translated.iter_rows()
