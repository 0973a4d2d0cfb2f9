"""Merging recipes, and the recipes of the two papers: every row is valid and fits on two nodes of eight A100s."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import read_questions, table_rows

from calm_ray.cluster.resources import shortage
from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.methods import METHODS
from calm_ray.methods.dco.gamma import gammas
from calm_ray.methods.dco.optimum import Optimum
from calm_ray.planning.needs import needs_of
from calm_ray.recipes.files import DEMO_RECIPE, shipped
from calm_ray.recipes.load import load_config, load_preferences
from calm_ray.training.objectives import SFT

CALM, DCO = table_rows("calm"), table_rows("dco")
A100_NODE = {"CPU": 96.0, "GPU": 8.0}
MODELS = {
    "qwen2.5": "Qwen/Qwen2.5-14B", "gemma3": "/shared/models/gemma-3-12b-pt", "qwen3": "Qwen/Qwen3-14B",
    "aya": "CohereLabs/aya-expanse-8b", "llama3.1": "meta-llama/Llama-3.1-8B",
}  # fmt: skip


def fits(config: Config, nodes: int) -> bool:
    available = {name: nodes * amount for name, amount in A100_NODE.items()}
    return shortage(needs_of(config), available, [A100_NODE]) is None


def choices_of(row: str) -> list[str]:
    return row.partition("[")[2].removesuffix("]").split(",")


def test_few_recipe_files_are_shipped() -> None:
    assert len(shipped()) <= 30


@pytest.mark.parametrize("row", CALM)
def test_calm_rows_are_valid_and_fit_on_two_nodes(row: str) -> None:
    config = load_config(row)
    assert config.name == "calm-" + "-".join(re.findall(r"[\w.]+", row.partition(":")[2]))
    assert fits(config, nodes=2)
    # CALM, tables 5 and 6.
    sampling, train = config.sampling, config.train
    assert (sampling.completions, sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (3, 1.0, 0.9, 512)
    dpo = {"learning_rate": 5e-6, "warmup_ratio": 0.1}
    sft = {"learning_rate": 5e-5, "warmup_ratio": 0.0}
    assert {key: getattr(train, key) for key in dpo} == (sft if isinstance(config.objective, SFT) else dpo)
    assert train.lora is not None
    assert (train.epochs, train.validation_fraction, train.lora.r, train.lora.alpha) == (3, 0.06, 8, 16)


def test_calm_tables_are_complete() -> None:
    tables = Counter(row.partition(":")[2].partition("[")[0] for row in CALM)
    assert tables == {"table1": 8, "table2": 8, "table3": 4, "table10": 3}
    owner = {"llama": "meta-llama", "mistral": "mistralai"}
    for row in CALM:
        config, choices = load_config(row), choices_of(row)
        model = next((owner[choice] for choice in choices if choice in owner), "meta-llama")
        method = next((choice for choice in choices if choice in METHODS), "calm")
        assert (config.model.split("/")[0], config.method) == (model, method)
    assert load_config("calm/tables:table10[en_fr_zh]").languages == ["en", "fr", "zh"]
    assert load_config("calm/tables:table1[xcsqa,llama,calm]").languages == ["en", "zh", "fr", "de", "it", "ja"]
    six = ["en", "fr", "zh", "it", "de", "ja"]
    assert load_config("calm/tables:table10[en]").evaluation_languages == six


@pytest.mark.parametrize("row", DCO)
def test_dco_rows_are_valid_and_fit_on_two_nodes(row: str) -> None:
    config = load_config(row)
    assert config.name == "dco-" + "-".join(re.findall(r"[\w.]+", row.partition(":")[2]))
    assert fits(config, nodes=1 if config.rounds == 0 else 2)
    # DCO, appendix G, section 6.1 and the released code.
    train = config.train
    assert (train.lora, config.engines.refresh, train.dtype) == (None, "merged", "bfloat16")
    assert (train.epochs, train.schedule, train.warmup_ratio, train.weight_decay) == (1, "linear", 0, 0)
    assert (train.max_pair_tokens, train.validation_fraction) == (1024, 0)
    assert train.batch_pairs == 4 * len(config.languages)
    rates = {"dco": 1e-5, "sft_gold": 5e-7, "dpo_gold": 5e-6, "calm": 5e-6}
    is_slower = row.startswith(("dco/tables:table2_xcsqa[gemma3", "dco/tables:table2_xcsqa[llama3.1"))
    assert train.learning_rate == (1e-6 if is_slower else rates[config.method])
    assert config.method != "dco" or (train.beta, train.reference) == (1, "previous")
    # Section 5 and appendix H.
    assert config.candidates is not None
    trained_on = config.questions.split.train if config.questions.split else None
    assert (config.candidates.form, config.candidates.pairs, trained_on) == {
        "MMMLU": ("letters", 1, None if "table3" in row else 5000),
        "xcsr": ("letters", 7, 800),
        "Cross-Lingual-Consistency": ("choices", 1, 5000),
    }[str(config.questions.align).split("/")[2]]


def test_dco_tables_are_complete() -> None:
    tables = Counter(row.partition(":")[2].partition("[")[0] for row in DCO)
    assert tables == {
        "table1": 25, "table2_mmmlu": 55, "table2_xcsqa": 75, "table2_bmlama": 80, "table3": 14, "fig2": 3, "fig3": 3,
        "section6.5": 1,
    }  # fmt: skip
    methods = {"sft_gold": "sft_gold", "dpo_gold": "dpo_gold", "calm": "calm", "dco": "dco", "dpo_gold_dco": "dco"}
    for model, name in MODELS.items():
        for choice, method in methods.items():
            config = load_config(f"dco/tables:table1[{model},{choice}]")
            assert (config.model, config.method, len(config.languages)) == (name, method, 12)
    for row in DCO:
        if "table2" in row:
            (model, language), config = choices_of(row), load_config(row)
            assert (config.model, config.languages) == (MODELS[model], ["en", language])


# One row of each data set as published, and the path of its files; `{name}` is the name of the language.
MMMLU = ("MMMLU/test/mmlu_{name}.csv", ",Question,A,B,C,D,Answer,Subject\n0,Q,a,b,c,d,A,law\n")
BMLAMA = (
    "Cross-Lingual-Consistency/1_easyrun/BMLAMA17/{name}.tsv",
    "Prompt\tAns\tCandidate Ans\tSubject\r\nIn <mask>.\tRome\tRome, Oslo\tItaly\r\n",
)


@pytest.mark.parametrize(
    ("data", "file", "names"),
    [
        ("mmmlu", MMMLU, "AR-XY DE-DE EN-US ES-LA FR-FR HI-IN ID-ID IT-IT JA-JP KO-KR PT-BR SW-KE YO-NG ZH-CN BN-BD"),
        ("bmlama", BMLAMA, "ar ca el en es fa fr he hu ja ko nl ru tr uk vi zh"),
    ],
)
def test_dco_recipes_read_files_as_published(tmp_path: Path, data: str, file: tuple[str, str], names: str) -> None:
    path, text = file
    for name in names.split():
        (tmp_path / path.format(name=name)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.format(name=name)).write_text(text)
    found = read_questions(
        question_source(tmp_path, data), [name[:2].lower() for name in names.split()], needs_gold=True
    )
    assert {row["language"] for row in found} == {name[:2].lower() for name in names.split()}


def test_x_csqa_is_read_from_its_validation_split(tmp_path: Path) -> None:
    for name in ("en", "jap"):
        for split, answer in (("validation", "B"), ("test", "")):
            choices = {"label": ["A", "B"], "text": ["cat", "dog"]}
            row = {"id": split, "lang": name, "question": {"stem": "Q?", "choices": choices}, "answerKey": answer}
            file = tmp_path / f"xcsr/X-CSQA-{name}/{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row]), file)
    found = read_questions(question_source(tmp_path, "xcsqa"), ["en", "ja"], needs_gold=True)
    assert [(row["question_id"], row["language"]) for row in found] == [("validation", "en"), ("validation", "ja")]


def question_source(shared: Path, data: str) -> str:
    """The recipe's question source, in `shared` instead of /shared."""
    source = load_config(f"dco/tables:table2_{data}[aya,fr]").questions.align
    assert source is not None
    return source.replace("/shared", str(shared))


@pytest.mark.parametrize("model", MODELS)
def test_dco_after_dpo_starts_from_the_run_of_the_same_model(model: str) -> None:
    config = load_config(f"dco/tables:table1[{model},dpo_gold_dco]")
    first = load_config(f"dco/tables:table1[{model},dpo_gold]")
    assert config.init_from == first.name
    for key in ("storage", "model", "languages", "questions", "seed", "candidates"):
        assert getattr(config, key) == getattr(first, key)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("neither", (1, 1)), ("en", (0.1, 10)), ("{other}", (10, 0.1))],
)
@pytest.mark.parametrize(("figure", "other"), [("fig2", "sw"), ("fig3", "yo")])
def test_stable_language_has_the_small_gamma(
    figure: str, other: str, choice: str, expected: tuple[float, float]
) -> None:
    """As in Eq. 11 and the released code, contrary to section 6.4."""
    config = load_config(f"dco/tables:{figure}[{choice.format(other=other)}]")
    assert config.languages == ["en", other]
    gamma = gammas(config.own, config.languages, config.train.beta)
    assert (gamma[0, 1], gamma[1, 0]) == expected


def test_table3_trains_on_one_subject_and_evaluates_others() -> None:
    questions = load_config("dco/tables:table3[fr]").questions
    assert questions.evaluate == questions.align
    assert questions.align_subjects == ["high_school_microeconomics"]
    assert len(questions.evaluate_subjects or []) == 5
    assert not set(questions.align_subjects) & set(questions.evaluate_subjects or [])


def test_optimum_needs_no_training() -> None:
    config = load_config("dco/tables:section6.5")
    assert (config.rounds, len(config.languages)) == (0, 12)
    assert any(isinstance(step, Optimum) for step in config.evaluation)


def test_only_gold_methods_train_on_gold_answers() -> None:
    for row in CALM + DCO:
        config = load_config(row)
        assert (config.model_dump()["preferences"]["winner"] == "gold") == row.endswith("gold]")
    with pytest.raises(InputError, match="winner: must be gold with method: dpo_gold or sft_gold, and only with these"):
        load_config(None, ["preferences.winner=gold"])
    with pytest.raises(InputError, match="winner: must be gold with method"):
        load_config(None, ["method=dpo_gold", "preferences.winner=vote"])
    assert isinstance(load_config(None, ["method=sft_gold"]).objective, SFT)


def write_recipes(folder: Path, **recipes: str) -> Path:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(recipes))}.yaml"


def test_recipe_overrides_the_recipes_it_extends(tmp_path: Path) -> None:
    path = write_recipes(
        tmp_path,
        mine="extends: [below.yaml, other.yaml]\nname: mine\ntrain: {epochs: 1}\nlanguages: [fr]\n",
        below=f"extends: {DEMO_RECIPE}\ntrain: {{epochs: 5, beta: 0.2}}\nrounds: 7\n",
        other="rounds: 3\nengines: {per_language: null, shared: 1}\n",
    )
    config, demo = load_config(path, ["seed=4"]), load_config()
    assert (config.name, config.rounds, config.seed, config.languages) == ("mine", 3, 4, ["fr"])
    assert (config.train.epochs, config.train.beta) == (1, 0.2)
    assert (config.engines.per_language, config.engines.shared, config.engines.args) == (None, 1, demo.engines.args)
    assert config.sampling == demo.sampling


def test_recipes_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    mine = write_recipes(tmp_path, mine="name: mine\nlanguages: [en, fr]\ntrain: {epochs: 2, beta: 0.2}\n")
    words: list[str | Path] = ["dco/base", "dco/mmmlu", "dco/joint", "dco/aya", mine]
    config = load_config(words, ["train.beta=0.3"])
    assert (config.name, config.languages, config.model) == ("mine", ["en", "fr"], MODELS["aya"])
    assert (config.train.epochs, config.train.beta, config.train.batch_pairs) == (2, 0.3, 48)
    assert load_config(["dco/base", "dco/mmmlu", mine, "dco/joint", "dco/aya"]).languages != config.languages


def test_recipe_extends_shipped_recipes_by_name(tmp_path: Path) -> None:
    path = write_recipes(tmp_path, mine="extends: [dco/base, dco/mmmlu, dco/joint, dco/aya]\nname: mine\n")
    row = load_config("dco/tables:table1[aya,dco]", ["name=mine"])
    assert load_config(path) == row


def test_user_defined_tables(tmp_path: Path) -> None:
    text = """
    sweep:
      about: two learning rates by two languages
      with: [demo, short]
      rate: [low, high]
      language: [fr, ru]
      set: {languages: [en, "{language}"], init_from: "sweep-{rate}"}
      but: {ru: {seed: 7}}
    parts:
      short: {rounds: 1}
      low: {train: {learning_rate: 1e-5}}
      high: {train: {learning_rate: 1e-4}}
    """
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text(textwrap.dedent(text))
    config = load_config(f"{tmp_path}/exp/mine.yaml:sweep[high, ru]")
    assert (config.name, config.rounds, config.languages, config.seed) == ("exp-sweep-high-ru", 1, ["en", "ru"], 7)
    assert (config.train.learning_rate, config.init_from) == (1e-4, "sweep-high")
    assert load_config(f"{tmp_path}/exp/mine:sweep[low,fr]").seed == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dco/tables", r"choose a row of a table, such as dco/tables:table1\[aya,dco\]"),
        ("dco/tables:table1", r"choose one of each, such as table1\[aya,dco\]: model \(aya, gemma3"),
        ("dco/tables:table1[aya]", "choose one of each"),
        ("dco/tables:table1[aya,dc]", r"method: dc is not known; did you mean dco\?"),
        ("dco/tables:tabel1[aya,dco]", r"table tabel1 is not known; did you mean table1\?"),
        ("dco/tabels:table1[aya,dco]", r"there is no such recipe; did you mean dco/tables\?"),
        ("demo:table1", "is not a file of tables: name"),
    ],
)
def test_unknown_rows_are_rejected(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(word)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: {with: demo}", "a.with: "),
        ("a: {with: [demo], seed: 1}", "a.seed: "),
        ("a: {but: {en: 1}}", "a.but.en: "),
        ("a: {set: [1]}", "a.set: "),
        ("a: 1", "a: "),
        ("a: {}\nparts: {en: [1]}", "en"),
    ],
)
def test_malformed_tables_are_rejected_by_key(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"mine.yaml is not a file of tables: {re.escape(where)}"):
        load_config(f"{tmp_path}/mine.yaml:a")


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, r"a\.yaml: extends itself by way of .*b\.yaml"),
        ({"a": "extends: none.yaml"}, r"none\.yaml: there is no such recipe"),
        ({"a": "extends: 3"}, "extends: name a recipe or a list of recipes"),
        ({"a": "extends: b.yaml", "b": "- 1"}, r"b\.yaml: a recipe is a mapping"),
    ],
)
def test_invalid_extends_is_rejected(tmp_path: Path, recipes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(write_recipes(tmp_path, **recipes))


def test_presets_accept_overrides() -> None:
    released = load_preferences("released", ["ties=drop"])
    assert (released.extraction, released.positive, released.judged_alone) == ("released", "last", ["en"])
    assert released.ties == "drop"
    assert load_preferences("strict", []).ties == "drop"
    with pytest.raises(InputError, match="positives: must be 1 with positive: last"):
        load_preferences("released", ["positives=2"])
    with pytest.raises(InputError, match="tys is not known; did you mean ties"):
        load_preferences("strict", ["tys=drop"])
    with pytest.raises(InputError, match="merge_order: xx is not known"):
        load_preferences("strict", ["merge_order=[xx]"])
