from pathlib import Path

import pytest

from calm_ray.core.errors import InputError
from calm_ray.recipes.load import load_config


@pytest.mark.parametrize("recipe", ["demo", "llama3_8b", "dco/demo", "dco/compare_demo"])
def test_every_recipe_is_valid(recipe: str) -> None:
    assert load_config(recipe).name


def test_overrides_are_parsed_with_their_types() -> None:
    config = load_config(None, ["train.learning_rate=5e-6", "rounds=3", "train.lora.targets=[q_proj]", "seed=7"])
    assert (config.train.learning_rate, config.rounds, config.seed) == (5e-6, 3, 7)
    assert config.train.lora is not None
    assert config.train.lora.targets == ["q_proj"]
    assert config.train.lora.r == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rouds=2", "rouds is not known; did you mean rounds?"),
        ("train.lerning_rate=1", "train.lerning_rate: lerning_rate is not known; did you mean learning_rate?"),
        ("train.lora.rank=4", "train.lora.rank"),
        ("rounds=0", "rounds: must be 1 or more; 0 only scores candidates, and there is no candidates section"),
        ("rounds=two", "rounds: Input should be a valid integer"),
        ("sampling.top_p=1.5", "sampling.top_p"),
        ("languages=[en, xx]", "languages: xx is not known"),
        ("languages=[en, en]", "contains a language twice"),
        ("engines.shared=1", "set exactly one of engines.per_language and engines.shared"),
        ("engines.args.trust_remote_code=true", "engines.args may not set trust_remote_code"),
        ("name=../elsewhere", "name:"),
        ("train={engine: trl, workers: 3, batch_pairs: 8}", "train.batch_pairs: with train.engine: trl"),
        ("train={engine: trl, trl: {per_device_train_batch_size: 0}}", "train.batch_pairs: with train.engine: trl"),
        ("engines.min_engines=9", "engines.min_engines: is more than the run's number of engines"),
        ("train.workers=[3,1]", "train.workers: [min, max] requires min <= max"),
        ("train.shards=3", "train.shards: must divide train.workers"),
        ("rounds.more=1", "rounds is a value, not a section"),
        ("rounds", "an override looks like section.key=value"),
        ("model=/nowhere", "questions.align"),
        ("device=tpu", "device"),
    ],
)
def test_bad_overrides_are_reported(override: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        load_config(None, [override])
    assert message in str(raised.value)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(InputError) as raised:
        load_config(None, ["rouds=2", "train.epochs=0"])
    assert "rouds" in str(raised.value)
    assert "train.epochs" in str(raised.value)


AUTO = "engines.refresh=auto"


@pytest.mark.parametrize(
    ("overrides", "uses_adapters"),
    [(["device=gpu", AUTO], True), (["device=cpu", AUTO], False), (["device=gpu", "train.lora=null", AUTO], False),
     (["device=cpu", "engines.refresh=adapter"], True), (["device=gpu", "engines.refresh=merged"], False)],
)  # fmt: skip
def test_engines_use_adapters_where_they_are_fast(overrides: list[str], uses_adapters: bool) -> None:
    config = load_config("demo", overrides)
    lora, device = config.train.lora, config.device
    assert config.engines.uses_adapters(lora, device) == uses_adapters
    assert config.engines.merges_adapters(lora, device) == (lora is not None and not uses_adapters)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.prompt=question"], r"sampling\.prompt: question does not show the letters"),
        (["preferences={translator: option_text}"], r"translator: option_text requires extraction: option_text"),
    ],
)
def test_answers_in_own_words_are_read_by_choice(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("demo", overrides)
    load_config("demo", [*overrides, "preferences.extraction=option_text"])


def test_full_fine_tuning_has_no_adapters() -> None:
    with pytest.raises(InputError, match=r"engines\.refresh: full fine-tuning"):
        load_config("demo", ["train.lora=null", "engines.refresh=adapter"])


def test_defaults_match_the_paper(tmp_path: Path) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text(
        "name: plain\nlanguages: [en]\nmodel: some/model\nquestions: {align: q.jsonl}\nengines: {per_language: 1}\n"
    )
    config = load_config(recipe)
    assert (config.sampling.completions, config.sampling.temperature, config.sampling.top_p) == (3, 1.0, 0.9)
    assert config.sampling.max_new_tokens == 512
    train = config.train
    assert (train.beta, train.learning_rate, train.epochs, train.warmup_ratio) == (0.1, 5e-6, 3, 0.1)
    assert train.lora is not None
    assert (train.lora.r, train.lora.alpha, train.lora.targets) == (8, 16, ["q_proj", "v_proj"])
    assert (train.validation_fraction, train.sft_weight, train.reference) == (0.06, 0.0, "base")
    sft = load_config(recipe, ["method=sft"]).train
    assert (sft.learning_rate, sft.warmup_ratio) == (5e-5, 0.0)


def test_invalid_recipe_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such recipe"):
        load_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load_config(bad)
    bad.write_text("- a list")
    with pytest.raises(InputError, match="a recipe is a mapping"):
        load_config(bad)
