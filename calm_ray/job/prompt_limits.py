"""Limits on prompts: candidates can be scored, letters can be written, and an answer fits the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from calm_ray.config import Config
from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.rows import Question
from calm_ray.methods.candidates import candidate_form
from calm_ray.prompts.questions import letters, prompt_text
from calm_ray.prompts.rendering import encode_prompt
from calm_ray.run.model_files import context_tokens


def candidate_check(folder: Path, config: Config) -> Callable[[Question], None] | None:
    """A check that raises BadRow for candidates the run cannot score; None if it does not score given candidates."""
    from transformers import AutoTokenizer

    form = candidate_form(config.candidates, config.world.seed) if config.candidates is not None else None
    if form is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    limit = context_tokens(folder, config.engines.args)

    def check(question: Question) -> None:
        candidates = form.of(question, tokenizer)
        longest = len(candidates["prompt_token_ids"]) + max(map(len, candidates["token_ids"]))
        if limit is not None and longest >= limit:
            raise BadRow("a candidate does not fit into the engines' context", f"{longest} tokens with its prompt")

    return check


def check_letters(folder: Path, questions: list[Question]) -> None:
    """Raises InputError unless the folder's tokenizer can write the questions' answer letters."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    needed = max((letters(row) for row in questions), key=len)
    unwritable = [letter for letter in needed if letter not in tokenizer.decode(tokenizer.encode(letter))]
    if unwritable:
        raise InputError(f"model: the tokenizer in {folder} cannot write the answer letters {', '.join(unwritable)}")


def check_lengths(folder: Path, questions: list[Question], config: Config) -> None:
    """Raises InputError for a question that leaves no room for an answer in the engines' context."""
    for row, length, limit in too_long(folder, questions, config):
        raise InputError(
            f"question {row['question_id']} in {row['language']}: its prompt has {length} tokens, but the "
            f"engines take {limit}; remove it, or raise engines.args.max_model_len if the model allows it"
        )


def too_long(folder: Path, questions: list[Question], config: Config) -> Iterator[tuple[Question, int, int]]:
    """Yields questions that leave no room for an answer, with the prompt's length and the engines' limit in tokens."""
    from transformers import AutoTokenizer

    limit = context_tokens(folder, config.engines.args)
    if limit is None:
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for row in questions:
        length = len(encode_prompt(tokenizer, prompt_text(row, config.sampling.prompt)))
        if length >= limit:
            yield row, length, limit
