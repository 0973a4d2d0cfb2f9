"""Test helpers for calm_ray and its users: a deterministic generator, a small tokenizer, a small model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calm_ray.engines.generator import Decoding, Generated, Likelihoods


class ScriptedGenerator:
    """A `Generator` that answers by rules instead of a model.

    `reply` takes a prompt's text and the sample's index. `logp` takes the texts of a prompt and a candidate and returns
    the candidate's log-probability in nats; by default, each token has -1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        reply: Callable[[str, int], str],
        logp: Callable[[str, str], float] | None = None,
    ) -> None:
        self.policy = "base"
        self.context_tokens = 1 << 20
        self.tokenizer = tokenizer
        self._reply = reply
        self._logp = logp

    def generate(self, prompts: Sequence[list[int]], decoding: Decoding, seeds: Sequence[int]) -> list[list[Generated]]:
        return [self._generate_one(prompt, decoding) for prompt in prompts]

    def _generate_one(self, prompt: list[int], decoding: Decoding) -> list[Generated]:
        prompt_text = str(self.tokenizer.decode(prompt))
        texts = [self._reply(prompt_text, number) for number in range(decoding.samples)]
        eos = self.tokenizer.eos_token_id
        sides = [[*self.tokenizer.encode(text), eos] for text in texts]
        logps = [self._score(prompt, side) for side in sides]
        return [Generated(text, side, "stop", logp) for text, side, logp in zip(texts, sides, logps, strict=True)]

    def score(
        self, prompts: Sequence[list[int]], candidates: Sequence[list[list[int]]], *, with_prompt: bool
    ) -> list[Likelihoods]:
        return [
            Likelihoods(
                [self._score(prompt, side) for side in sides],
                self._score(prompt[:1], prompt[1:]) if with_prompt else None,
            )
            for prompt, sides in zip(prompts, candidates, strict=True)
        ]

    def _score(self, before: list[int], side: list[int]) -> float:
        if self._logp is None:
            return -float(len(side))
        return self._logp(str(self.tokenizer.decode(before)), str(self.tokenizer.decode(side)))


def word_tokenizer(words: Iterable[str], chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A whitespace tokenizer over `words`; unknown words become `<unk>`."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


def write_tiny_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    width: int = 64,
    layers: int = 2,
    key_value_heads: int = 1,
    tied: bool = False,
) -> Path:
    """Writes a randomly initialized Llama and the tokenizer as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
