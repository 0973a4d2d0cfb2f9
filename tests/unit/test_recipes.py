"""Recipes that extend others, and those of the two papers, each parsed and planned for two machines of eight A100."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from factories import read_questions

from calm_ray.cluster.resources import shortage
from calm_ray.config import Config
from calm_ray.core.errors import InputError
from calm_ray.methods.dco.gamma import gammas
from calm_ray.methods.dco.optimum import Optimum
from calm_ray.planning.needs import needs_of
from calm_ray.recipes import DEMO_RECIPE, RECIPES, load_config, load_preferences
from calm_ray.training.objectives import SFT

CALM = sorted((RECIPES / "calm").glob("table*.yaml"))
DCO_PIECES = {
    *("base", "bilingual", "joint", "mmmlu", "xcsqa", "bmlama", "sft_gold", "dpo_gold", "calm"),
    *("qwen2.5", "gemma3", "qwen3", "aya", "llama3.1"),
}
"""What the recipes of DCO extend, and what is no recipe by itself."""
DCO = [path for path in sorted((RECIPES / "dco").glob("*.yaml")) if path.stem not in DCO_PIECES]
DATA, MODELS = ("xcsqa", "medqa"), ("llama", "mistral")
A100_NODE = {"CPU": 96.0, "GPU": 8.0}


def fits(config: Config, machines: int) -> bool:
    most = {name: machines * amount for name, amount in A100_NODE.items()}
    return shortage(needs_of(config), most, [A100_NODE]) is None


@pytest.mark.parametrize("path", CALM, ids=lambda path: path.stem)
def test_the_recipes_of_calm_are_valid_and_fit_two_machines(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem.replace("_", "-")
    assert fits(config, machines=2)
    # CALM, tables 5 and 6.
    sampling, train = config.sampling, config.train
    assert (sampling.completions, sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (3, 1.0, 0.9, 512)
    dpo = {"learning_rate": 5e-6, "warmup_share": 0.1}
    sft = {"learning_rate": 5e-5, "warmup_share": 0.0}
    assert {key: getattr(train, key) for key in dpo} == (sft if isinstance(config.objective, SFT) else dpo)
    assert train.lora is not None
    assert (train.epochs, train.validation_share, train.lora.r, train.lora.alpha) == (3, 0.06, 8, 16)


def test_every_table_of_calm_is_there() -> None:
    experiments = {
        (config.name.split("-")[0], config.model.split("/")[0], config.method) for config in map(load_config, CALM)
    }
    models = ("meta-llama", "mistralai")
    names = {
        *(f"table1_{data}_{model}_{m}" for data in DATA for model in MODELS for m in ("calm", "sft")),
        *(f"table2_{data}_{model}_{m}_gold" for data in DATA for model in MODELS for m in ("dpo", "sft")),
        *(f"table3_{way}_{model}" for way in ("medqa_to_xcsqa", "xcsqa_to_medqa") for model in MODELS),
        *(f"table10_{languages}" for languages in ("en", "en_fr", "en_fr_zh")),
    }
    assert {path.stem for path in CALM} == names
    assert experiments == {
        *(("table1", model, method) for model in models for method in ("calm", "sft")),
        *(("table2", model, method) for model in models for method in ("dpo_gold", "sft_gold")),
        *(("table3", model, "calm") for model in models),
        ("table10", "meta-llama", "calm"),
    }
    languages = {path.stem: load_config(path).languages for path in CALM}
    assert languages["table10_en_fr_zh"] == ["en", "fr", "zh"]
    assert languages["table1_xcsqa_llama_calm"] == ["en", "zh", "fr", "de", "it", "ja"]
    assert load_config(RECIPES / "calm" / "table10_en.yaml").asked_languages == ["en", "fr", "zh", "it", "de", "ja"]


@pytest.mark.parametrize("path", DCO, ids=lambda path: path.stem)
def test_the_recipes_of_dco_are_valid_and_fit_two_machines(path: Path) -> None:
    config = load_config(path)
    assert config.name == "dco-" + path.stem.replace("_", "-")
    assert fits(config, machines=1 if config.rounds == 0 else 2)
    # DCO, appendix G, section 6.1 and the released code.
    train = config.train
    assert (train.lora, config.engines.refresh, train.dtype) == (None, "merged", "bfloat16")
    assert (train.epochs, train.schedule, train.warmup_share, train.weight_decay) == (1, "linear", 0, 0)
    assert (train.max_pair_tokens, train.validation_share) == (1024, 0)
    assert train.batch_pairs == 4 * len(config.languages)
    rates = {"dco": 1e-5, "sft_gold": 5e-7, "dpo_gold": 5e-6, "calm": 5e-6}
    is_slower = path.stem in ("table2_xcsqa_gemma3", "table2_xcsqa_llama3.1")
    assert train.learning_rate == (1e-6 if is_slower else rates[config.method])
    assert config.method != "dco" or (train.beta, train.reference) == (1, "previous")
    # Section 5 and appendix H.
    assert config.candidates is not None
    trained_on = config.questions.split.train if config.questions.split else None
    assert (config.candidates.form, config.candidates.pairs, trained_on) == {
        "MMMLU": ("letters", 1, None if path.stem.startswith("table3") else 5000),
        "xcsr": ("letters", 7, 800),
        "Cross-Lingual-Consistency": ("choices", 1, 5000),
    }[str(config.questions.align).split("/")[2]]


def test_every_experiment_of_dco_is_there() -> None:
    """Found in the folder: what is no recipe is extended by one."""
    assert Counter(path.stem.split("_")[0] for path in DCO) == {
        "table1": 25, "table2": 15, "table3": 1, "fig2": 3, "fig3": 3, "section6.5": 1,
    }  # fmt: skip
    configs = {path.stem: load_config(path) for path in DCO}
    models = {key.split("_")[1]: config.model for key, config in configs.items() if key.startswith("table1")}
    assert models == {
        "qwen2.5": "Qwen/Qwen2.5-14B", "gemma3": "/shared/models/gemma-3-12b-pt", "qwen3": "Qwen/Qwen3-14B",
        "aya": "CohereLabs/aya-expanse-8b", "llama3.1": "meta-llama/Llama-3.1-8B",
    }  # fmt: skip
    methods = {"sft_gold": "sft_gold", "dpo_gold": "dpo_gold", "calm": "calm", "dco": "dco", "dpo_gold_dco": "dco"}
    for model, name in models.items():
        for row, method in methods.items():
            config = configs[f"table1_{model}_{row}"]
            assert (config.model, config.method, len(config.languages)) == (name, method, 12)
        assert {configs[f"table2_{data}_{model}"].model for data in ("mmmlu", "xcsqa", "bmlama")} == {name}
    extended = {name for path in DCO for name in yaml.safe_load(path.read_text())["extends"]}
    assert {f"{piece}.yaml" for piece in DCO_PIECES} <= extended


# A file of each data set as it is published: one row, in the place and by the name that `{name}` stands in.
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
def test_the_recipes_of_dco_find_files_as_they_are_published(
    tmp_path: Path, data: str, file: tuple[str, str], names: str
) -> None:
    path, text = file
    for name in names.split():
        (tmp_path / path.format(name=name)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.format(name=name)).write_text(text)
    found = read_questions(place_in(tmp_path, data), [name[:2].lower() for name in names.split()], needs_gold=True)
    assert {row["language"] for row in found} == {name[:2].lower() for name in names.split()}


def test_x_csqa_has_answers_in_its_validation_split(tmp_path: Path) -> None:
    for name in ("en", "jap"):
        for split, answer in (("validation", "B"), ("test", "")):
            choices = {"label": ["A", "B"], "text": ["cat", "dog"]}
            row = {"id": split, "lang": name, "question": {"stem": "Q?", "choices": choices}, "answerKey": answer}
            file = tmp_path / f"xcsr/X-CSQA-{name}/{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row]), file)
    found = read_questions(place_in(tmp_path, "xcsqa"), ["en", "ja"], needs_gold=True)
    assert [(row["question_id"], row["language"]) for row in found] == [("validation", "en"), ("validation", "ja")]


def place_in(shared: Path, data: str) -> str:
    """The place of a recipe's questions, with another folder for the storage that all nodes see."""
    place = load_config(RECIPES / "dco" / f"table2_{data}_aya.yaml").questions.align
    assert place is not None
    return place.replace("/shared", str(shared))


def test_dco_after_dpo_goes_on_from_the_run_of_its_model() -> None:
    after = [path for path in DCO if path.stem.endswith("dpo_gold_dco")]
    assert len(after) == 5
    for path in after:
        config = load_config(path)
        first = load_config(path.with_name(path.name.replace("_dpo_gold_dco", "_dpo_gold")))
        assert config.init_from == first.name
        for key in ("storage", "model", "languages", "questions", "seed", "candidates"):
            assert getattr(config, key) == getattr(first, key)


@pytest.mark.parametrize(
    ("recipe", "others"),
    [
        ("table2_mmmlu_qwen2.5", "ar de es fr hi id it ja ko pt zh"),  # DCO, Table 5
        ("table2_xcsqa_gemma3", "zh de es fr it ja nl pl pt ru ar vi hi sw ur"),  # Table 7
        ("table2_bmlama_aya", "fr nl es ru ja zh ko vi el hu he tr ca ar uk fa"),  # Table 9
        ("table3_qwen2.5", "ar de es fr hi id it ja ko pt sw yo zh bn"),  # Table 11
    ],
)
def test_english_is_paired_with_every_other_language(recipe: str, others: str) -> None:
    path = RECIPES / "dco" / f"{recipe}.yaml"
    assert load_config(path).languages == ["en", "fr"]
    for code in others.split():
        config = load_config(path, [f"languages=[en,{code}]", f"name=other-en-{code}"])
        assert config.languages == ["en", code]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("default", (1, 1)), ("en_stable", (0.1, 10)), ("{other}_stable", (10, 0.1))],
)
@pytest.mark.parametrize(("figure", "other"), [("fig2", "sw"), ("fig3", "yo")])
def test_the_stable_language_has_the_small_gamma(
    figure: str, other: str, recipe: str, expected: tuple[float, float]
) -> None:
    """By Eq. 11 and the released code, against section 6.4."""
    config = load_config(RECIPES / "dco" / f"{figure}_en_{other}_{recipe.format(other=other)}.yaml")
    assert config.languages == ["en", other]
    gamma = gammas(config.own, config.languages, config.train.beta)
    assert (gamma[0, 1], gamma[1, 0]) == expected


def test_one_subject_is_trained_on_and_others_are_asked() -> None:
    questions = load_config(RECIPES / "dco" / "table3_qwen2.5.yaml").questions
    assert questions.evaluate == questions.align
    assert questions.align_subjects == ["high_school_microeconomics"]
    assert len(questions.evaluate_subjects or []) == 5
    assert not set(questions.align_subjects) & set(questions.evaluate_subjects or [])


def test_the_optimum_needs_no_training() -> None:
    config = load_config(RECIPES / "dco" / "section6.5_optimum.yaml")
    assert (config.rounds, len(config.languages)) == (0, 12)
    assert any(isinstance(step, Optimum) for step in config.evaluation)


def test_gold_answers_train_only_by_a_method_that_is_named_after_them() -> None:
    for path in CALM + DCO:
        config = load_config(path)
        assert (config.model_dump()["preferences"]["winner"] == "gold") == path.stem.endswith("gold")
    with pytest.raises(InputError, match="gold answers train only with method: dpo_gold or sft_gold"):
        load_config(None, ["preferences.winner=gold"])
    with pytest.raises(InputError, match="gold answers train only with method"):
        load_config(None, ["method=dpo_gold", "preferences.winner=vote"])
    assert isinstance(load_config(None, ["method=sft_gold"]).objective, SFT)


def write(folder: Path, **recipes: str) -> Path:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(recipes))}.yaml"


def test_a_recipe_says_what_differs_from_those_it_extends(tmp_path: Path) -> None:
    path = write(
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


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, r"a\.yaml: extends itself, by way of .*b\.yaml"),
        ({"a": "extends: none.yaml"}, r"none\.yaml: there is no such recipe"),
        ({"a": "extends: 3"}, "extends: name a recipe or a list of recipes"),
        ({"a": "extends: b.yaml", "b": "- 1"}, r"b\.yaml: a recipe is a mapping"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, recipes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, **recipes))


def test_presets_and_their_overrides() -> None:
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
