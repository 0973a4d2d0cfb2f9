"""Sequence-to-sequence models in Ray actors: small real ones, trained in seconds to translate eight words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import processors
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    NllbTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from calm_ray.cli import main
from calm_ray.core.errors import InputError
from calm_ray.core.rows import Question, rows_of
from calm_ray.questions.seq2seq import Direction, Seq2SeqModel, Seq2SeqTranslator, direction
from calm_ray.questions.translation import translate_missing
from calm_ray.run.directory import RunDirectory
from calm_ray.run.policies import RunModel
from calm_ray.run.storage import Storage
from calm_ray.testing import word_tokenizer, write_tiny_model

WORDS = {
    "en": ["which", "animal", "flies", "swims", "eagle", "bear", "fish", "the"],
    "fr": ["quel", "bête", "vole", "nage", "aigle", "ours", "poisson", "le"],
    "de": ["welches", "Tier", "fliegt", "schwimmt", "Adler", "Bär", "Fisch", "das"],
}
FLORES = {"en": "eng_Latn", "fr": "fra_Latn", "de": "deu_Latn"}
Encode = Callable[[str, str, str], tuple[list[int], list[int]]]
"""Maps a text, its translation and the target language to input and output token ids."""


def translate_words(text: str, target: str) -> str:
    lines = [[WORDS[target][WORDS["en"].index(word)] for word in line.split()] for line in text.split("\n")]
    return "\n".join(" ".join(line) for line in lines)


def random_words(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS["en"], k=rng.randint(1, 4)))


def train_dictionary(model: Any, encode: Encode) -> None:
    """Trains the model until it translates 60 batches in a row without a mistake."""
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=1e-3)
    flawless = 0
    for _ in range(3000):
        texts, targets = [random_words(rng) for _ in range(64)], rng.choices(["fr", "de"], k=64)
        pairs = [encode(text, translate_words(text, to), to) for text, to in zip(texts, targets, strict=True)]
        inputs, labels = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in side], True, -100)
            for side in zip(*pairs, strict=True)
        )
        mask = (inputs != -100).long()
        output = model(input_ids=inputs.clamp(min=0), attention_mask=mask, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        # Except the first token, which may be the target language: the model cannot know it.
        wrong = (output.logits.argmax(-1) != labels) & (labels != -100)
        flawless = flawless + 1 if not wrong[:, 1:].any() else 0
        if flawless == 60:
            return
    raise AssertionError("the model did not learn the dictionary")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with a language token before the text, like MADLAD."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = word_tokenizer(["<2en>", "<2fr>", "<2de>", *(word for words in WORDS.values() for word in words)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_decoder_layers=1, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    train_dictionary(model, lambda text, result, to: (tokenizer.encode(f"<2{to}> {text}"), tokenizer.encode(result)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with NLLB's architecture and tokenizer, for lines of up to 40 tokens."""
    folder = tmp_path_factory.mktemp("nllb")
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁": 4}
    merges: Any = []
    for word in (word for words in WORDS.values() for word in words):
        for end in range(len(word)):
            vocabulary.setdefault(word[end], len(vocabulary))
            if f"▁{word[: end + 1]}" not in vocabulary:
                vocabulary[f"▁{word[: end + 1]}"] = len(vocabulary)
                merges.append((f"▁{word[:end]}", word[end]))
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=list(FLORES.values()))
    config = M2M100Config(
        vocab_size=len(tokenizer), d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0, attention_dropout=0.0,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, max_position_embeddings=40,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = M2M100ForConditionalGeneration(config)
    code = {to: tokenizer.convert_tokens_to_ids(FLORES[to]) for to in FLORES}

    def encode(text: str, result: str, to: str) -> tuple[list[int], list[int]]:
        return tokenizer.encode(text), [code[to], *tokenizer.encode(result)[1:]]

    train_dictionary(model, encode)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["t5", "nllb"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def questions(count: int) -> list[Question]:
    rng = random.Random(1)
    return [
        Question(
            question_id=f"q{number}", language="en", text=f"{random_words(rng)}\n{random_words(rng)}",
            choices=[random_words(rng) for _ in range(4)], gold="C", subject=None,
        )
        for number in range(count)
    ]  # fmt: skip


def translator(folder: Path, **options: Any) -> Seq2SeqTranslator:
    return Seq2SeqTranslator(RunModel(str(folder)), **options)


def local_model(folder: Path, max_new_tokens: int = 256) -> Seq2SeqModel:
    return Seq2SeqModel(RunModel(str(folder)), "cpu", max_new_tokens)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_8_cpus")
def test_actors_translate_each_question_once(folder: Path, tmp_path: Path) -> None:
    originals, cache = questions(100), Storage(str(tmp_path))
    rows, report = translate_missing(originals, ["en", "fr", "de"], translator(folder, actors=2, cpus=0.5), cache)
    expected = [
        Question(
            question_id=row["question_id"], language=language, text=translate_words(row["text"], language),
            choices=[translate_words(choice, language) for choice in row["choices"]], gold="C", subject=None,
        )
        for row in originals
        for language in ("en", "fr", "de")
    ]  # fmt: skip
    assert rows == expected
    count = {"asked": 100, "cached": 0, "translated": 100, "failed": 0, "identical": 0}
    assert report == {"fr": count, "de": count}
    files = list(tmp_path.rglob("*.parquet"))
    assert len(files) == 4  # of 64 and 36 questions, in two languages
    # Again with one more question: only that one is translated.
    more = [*originals, Question(**{**originals[0], "question_id": "more", "text": "the bear"})]
    rows, report = translate_missing(more, ["en", "fr", "de"], translator(folder, cpus=0.5), cache)
    assert rows[:300] == expected
    assert rows[301]["text"] == "le ours"
    assert report["fr"] == {"asked": 101, "cached": 100, "translated": 101, "failed": 0, "identical": 0}
    assert len(list(tmp_path.rglob("*.parquet"))) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("ray_8_cpus")
def test_texts_are_translated_line_by_line(folder: Path) -> None:
    texts = ["the bear swims\n\n  the eagle flies\n", "", "which fish"]
    translations = local_model(folder).translate(texts, "en", "de")
    assert translations == ["das Bär schwimmt\n\ndas Adler fliegt", "", "welches Fisch"]
    assert local_model(folder).translate([], "en", "de") == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_8_cpus")
def test_truncated_and_too_long_translations_fail(nllb: Path, t5: Path, tmp_path: Path) -> None:
    rows = questions(3)
    rows[0] |= {"text": "the bear", "choices": ["eagle", "fish"]}
    rows[1] |= {"text": "the bear", "choices": ["eagle", "the eagle flies"]}
    rows[2] |= {"text": "the " * 39, "choices": ["eagle", "fish"]}
    # Room for the language token, two words and end-of-sequence.
    limited = translator(nllb, cpus=0.5, max_new_tokens=4)
    translated, report = translate_missing(rows, ["en", "fr"], limited, Storage(str(tmp_path)))
    assert [row["question_id"] for row in translated if row["language"] == "fr"] == ["q0"]
    assert report["fr"] == {"asked": 3, "cached": 0, "translated": 1, "failed": 2, "identical": 0}
    # Room for two words and end-of-sequence.
    assert local_model(t5, max_new_tokens=3).translate(["the bear", "the bear swims"], "en", "fr") == [
        "le ours",
        None,
    ]


@pytest.mark.slow
def test_identity_depends_on_weights_and_max_new_tokens(t5: Path, nllb: Path) -> None:
    identities = {translator(t5).identity, translator(nllb).identity, translator(t5, max_new_tokens=9).identity}
    assert len(identities) == 3
    assert translator(t5, actors=3).identity in identities


@pytest.mark.slow
def test_unsupported_language_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    rows, cache = questions(1), Storage(str(tmp_path))
    with pytest.raises(InputError, match=rf"{folder} does not translate into Japanese \('ja'\)"):
        translate_missing(rows, ["en", "fr", "ja"], translator(folder), cache)
    with pytest.raises(InputError, match=rf"{folder} does not translate from Chinese \('zh'\)"):
        translator(folder).check("zh", ["fr"])
    with pytest.raises(InputError, match="unknown language 'tlh'"):
        translator(folder).check("en", ["tlh"])


def test_unsuitable_models_are_refused(t5: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in t5.iterdir():
        if file.suffix == ".safetensors":
            torch.save({}, pickled / "pytorch_model.bin")
        else:
            (pickled / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"has no \*\.safetensors weights \(pytorch_model\.bin\)"):
        translator(pickled).check("en", ["fr"])
    llama = write_tiny_model(tmp_path / "llama", word_tokenizer(["<2en>", "<2fr>"]))
    with pytest.raises(InputError, match="llama is not a sequence-to-sequence model"):
        translator(llama).check("en", ["fr"])
    with pytest.raises(InputError, match="there is no folder"):
        translator(tmp_path / "nowhere").check("en", ["fr"])


def train_sentencepiece(folder: Path, words: Iterable[str]) -> str:
    """Trains a SentencePiece model, as used by M2M100 and Marian, and returns its path."""
    (folder / "words.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "pieces"), vocab_size=20, minloglevel=2
    )
    return str(folder / "pieces.model")


def marian_tokenizer(folder: Path, tags: list[str], **languages: Any) -> Any:
    pieces = train_sentencepiece(folder, WORDS["en"])
    names = ["</s>", "<unk>", *tags, "▁the", "<pad>"]
    (folder / "vocab.json").write_text("{" + ", ".join(f'"{name}": {i}' for i, name in enumerate(names)) + "}")
    return MarianTokenizer(pieces, pieces, str(folder / "vocab.json"), **languages)


def test_languages_are_set_for_every_model_family(tmp_path: Path) -> None:
    nllb = NllbTokenizer()
    assert direction(nllb, "nllb", "zh", "ar") == Direction(src_lang="zho_Hans", forced="arb_Arab")
    mbart = MBart50Tokenizer()
    assert direction(mbart, "mbart", "en", "zh") == Direction(src_lang="en_XX", forced="zh_CN")
    bilingual = marian_tokenizer(tmp_path, [], source_lang="en", target_lang="deu")
    romance = marian_tokenizer(tmp_path, [">>fra<<", ">>it<<"], source_lang="eng", target_lang="ROMANCE")
    assert direction(bilingual, "marian", "en", "de") == Direction()
    assert direction(romance, "marian", "en", "fr") == Direction(prefix=">>fra<< ")
    assert direction(romance, "marian", "en", "it") == Direction(prefix=">>it<< ")
    unsupported = [(bilingual, "fr", "de"), (bilingual, "en", "fr"), (romance, "de", "fr"), (mbart, "en", "el")]
    for tokenizer, source, target in unsupported:
        with pytest.raises(InputError, match="the model m does not translate"):
            direction(tokenizer, "m", source, target)


def test_languages_are_set_for_a_reloaded_m2m100(tmp_path: Path) -> None:
    pieces = train_sentencepiece(tmp_path, WORDS["en"])
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁the": 4}')
    codes = [f"__{code}__" for code in ("en", "fr", "de")]
    tokenizer = M2M100Tokenizer(str(tmp_path / "vocab.json"), pieces, additional_special_tokens=codes)
    tokenizer.save_pretrained(tmp_path / "saved")
    reloaded = M2M100Tokenizer.from_pretrained(tmp_path / "saved")
    for one in (tokenizer, reloaded):
        found = direction(one, "m2m", "de", "fr")
        assert found == Direction(src_lang="de", forced="__fr__")
        one.src_lang = found.src_lang
        ids = one("the")["input_ids"]
        assert one.convert_ids_to_tokens(ids)[0] == "__de__"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_8_cpus")
def test_run_translates_a_monolingual_file_once(make_recipe: Callable[..., Path], t5: Path, tmp_path: Path) -> None:
    """Three questions already exist in French. A second run reuses all translations."""
    rows = questions(12)
    french = [Question(**{**row, "language": "fr", "text": "le poisson"}) for row in rows[:3]]
    file = tmp_path / "align.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, *french]))
    recipe = make_recipe(
        name="translated", storage=str(tmp_path), questions={"align": str(file), "evaluate": None, "translate": str(t5)}
    )
    assert main(["align", str(recipe)]) == 0
    run = RunDirectory(str(tmp_path), "translated")
    stored = {(row["question_id"], row["language"]): row for row in rows_of(run.questions("align").read())}
    record = run.questions("align").record["translated"]["fr"]
    assert record == {"asked": 9, "cached": 0, "translated": 9, "failed": 0, "identical": 0}
    assert len(stored) == 24
    assert stored["q0", "fr"]["text"] == "le poisson"
    assert stored["q5", "fr"]["text"] == translate_words(rows[5]["text"], "fr")
    assert stored["q5", "fr"]["gold"] == "C"
    sampled = {(row["question_id"], row["language"]) for row in rows_of(run.stage(1, "sample").read())}
    assert sampled == set(stored)
    again = make_recipe(
        name="again", storage=str(tmp_path), questions={"align": str(file), "evaluate": None, "translate": str(t5)}
    )
    assert main(["align", str(again)]) == 0
    assert RunDirectory(str(tmp_path), "again").questions("align").record["translated"]["fr"]["cached"] == 9
