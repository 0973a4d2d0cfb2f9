"""The published CALM, from samples to pairs and metrics. Its data has no license and is not in the repository.

Expected numbers are from data_and_metrics (sections A2, A3) and golden_metrics.json next to the data, both computed by
running the published code (wangym2/CALM, 1b24db8).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from calm_ray.methods.calm.from_columns import make_pairs
from calm_ray.methods.calm.import_completions import open_completions
from calm_ray.methods.calm.settings import Preferences
from calm_ray.methods.calm.vote_audit import print_vote_audit
from calm_ray.methods.calm.vote_report import sample_report
from calm_ray.prompts.answers import extract_answer
from calm_ray.prompts.released import explanations, released_answers, training_prompts
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage

RELEASED = Preferences(preset="released")
MARKERS = {"en": "Answer:", "cn": "答案:", "fr": "Réponse:", "de": "Antwort:", "it": "Risposta:", "ja": "答え:"}


@pytest.fixture(scope="module")
def golden(data: Path) -> dict[str, Any]:
    file = data.parent / "reference" / "golden_metrics.json"
    if not file.is_file():
        pytest.skip(f"golden values: {file} is not there")
    return {group["name"]: group for group in json.loads(file.read_text("utf-8"))["groups"]}


@pytest.fixture(scope="module")
def pairs_of(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Maps preferences to the pairs of the published samples and their counts."""
    folder = Stage(Storage(str(tmp_path_factory.mktemp("samples"))))
    samples = str(data / "calm_xcsqa" / "samples")
    imported = open_completions([samples], folder, questions=None, on_bad_row="refuse", own_codes=True)
    assert not imported.skipped
    recorded = imported.chunks.read("00000")

    @cache
    def make(preferences: str) -> tuple[list[dict[str, str]], Counter[str]]:
        pairs, counts = make_pairs(recorded, Preferences.model_validate_json(preferences), 0)
        return pairs.to_pylist(), counts

    return lambda preferences: make(preferences.model_dump_json())


@pytest.fixture(scope="module")
def published(data: Path) -> dict[str, list[dict[str, str]]]:
    folder = data / "calm_xcsqa" / "pairs"
    return {code: json.loads((folder / f"DPO_{code}.json").read_text("utf-8")) for code in MARKERS}


def chosen_letter(code: str, chosen: str) -> str:
    found = re.search(rf"{MARKERS[code]}\s*([A-E])\.", chosen)
    assert found, chosen
    return found[1]


def published_keys(published: dict[str, list[dict[str, str]]], code: str) -> Counter[tuple[str, str, str]]:
    return Counter((row["input"], row["rejected"], chosen_letter(code, row["chosen"])) for row in published[code])


def made_keys(pairs: list[dict[str, str]], code: str) -> Counter[tuple[str, str, str]]:
    return Counter((row["prompt"], row["rejected"], row["chosen_answer"]) for row in pairs if row["language"] == code)


def test_released_preset_makes_the_published_pairs(pairs_of: Any, published: dict[str, Any]) -> None:
    pairs, _ = pairs_of(RELEASED)
    counts = {code: len(rows) for code, rows in published.items()}
    assert counts == {"en": 140, "cn": 913, "fr": 611, "de": 739, "it": 693, "ja": 920}
    assert len(pairs) == 4016
    for code in MARKERS:
        assert made_keys(pairs, code) == published_keys(published, code)


def test_chosen_sides_have_the_published_form(pairs_of: Any, published: dict[str, Any]) -> None:
    """All but those that end in leftover markers of option E, and one edited by hand."""
    pairs, _ = pairs_of(RELEASED)
    made = {(row["prompt"], row["rejected"]): row for row in pairs}
    same: Counter[str] = Counter()
    own: Counter[tuple[str, bool]] = Counter()
    for code, rows in published.items():
        for row in rows:
            mine = made[row["input"], row["rejected"]]
            head, tail = mine["chosen"].split(" ", 1)[0], mine["chosen"].rpartition("\n")[2]
            same[code] += row["chosen"].startswith(f"{head} ") and row["chosen"].endswith(f"\n{tail}")
            if mine["chosen_language"] == code:  # not translated
                own[code, "".join(mine["chosen"].split()) == "".join(row["chosen"].split())] += 1
    assert {code: len(published[code]) - same[code] for code in MARKERS} == {
        "en": 0, "cn": 1, "fr": 0, "de": 131, "it": 97, "ja": 198
    }  # fmt: skip
    assert own == {
        ("en", True): 140,
        ("cn", True): 1,
        ("de", True): 71,
        ("de", False): 4,
        ("it", True): 19,
        ("it", False): 2,
    }


def test_released_preset_with_strict_extraction(pairs_of: Any, published: dict[str, Any]) -> None:
    pairs, _ = pairs_of(Preferences(preset="released", extraction="strict"))
    hits = sum((made_keys(pairs, code) & published_keys(published, code)).total() for code in MARKERS)
    assert hits / 4016 == pytest.approx(0.9980, abs=5e-5)
    assert hits / len(pairs) >= 0.9995


@pytest.mark.parametrize(
    ("change", "recall", "precision"),
    [
        ({"judged_alone": []}, 0.9853, 0.8862),
        ({"merge_order": ["en", "zh", "fr", "de", "it", "ja"]}, 0.9694, 0.9622),
        ({"ties": "smallest"}, 0.9811, 0.9806),
        ({"ties": "drop"}, 0.9504, 1.0),
    ],
)
def test_each_rule_of_the_released_preset_matters(
    pairs_of: Any, published: dict[str, Any], change: dict[str, Any], recall: float, precision: float
) -> None:
    pairs, _ = pairs_of(Preferences(preset="released", **change))
    hits = sum((made_keys(pairs, code) & published_keys(published, code)).total() for code in MARKERS)
    assert [hits / 4016, hits / len(pairs)] == pytest.approx([recall, precision], abs=5e-5)


def test_base_row_of_table_1(pairs_of: Any, golden: dict[str, Any]) -> None:
    _, counts = pairs_of(RELEASED)
    report = sample_report(counts)
    accuracy = {code: 100 * fraction for code, fraction in report["accuracy_by_language"].items()}
    row = {"en": 73.08, "cn": 52.06, "fr": 60.85, "it": 59.84, "de": 57.51, "ja": 49.17}
    assert accuracy == pytest.approx(row, abs=0.01)
    assert (100 * report["consistency"], 100 * report["ac3"]) == pytest.approx((57.73, 58.23), abs=0.01)
    expected = golden["calm_table1_base_rows"]["cases"][0]
    assert expected["model"] == "Llama3-8B-Instruct"
    assert report["accuracy_by_language"] == pytest.approx(expected["accuracy_first_parsed_answer"], abs=1e-9)
    assert report["consistency"] == pytest.approx(
        expected["pairwise_consistency_questions_answered_in_all_six"], abs=1e-9
    )
    assert report["ac3"] == pytest.approx(expected["ac3"], abs=1e-9)
    assert report["vote_accuracy"] == pytest.approx(expected["vote_accuracy_18"], abs=1e-9)


def test_pairs_by_correctness_and_language(pairs_of: Any) -> None:
    _, counts = pairs_of(RELEASED)
    assert (counts["chosen_right"], counts["rejected_right"]) == (2269, 770)
    report = sample_report(counts)
    assert report["both_wrong"] == pytest.approx(977 / 4016)
    others = {code: share for code, share in report["chosen_from"].items() if code != "en"}
    english = {code: counts[f"chosen_from/{code}"] for code in others}
    assert english == {"de": 581, "it": 163, "cn": 39, "fr": 0, "ja": 0}
    assert report["pairs_by_language"] == {"en": 140, "cn": 913, "fr": 611, "de": 739, "it": 693, "ja": 920}


def test_golden_extraction(golden: dict[str, Any]) -> None:
    cases = golden["calm_answer_extraction"]["cases"]
    assert len(cases) > 10
    for case in cases:
        (released,) = released_answers(pa.array([case["response"]]), case["lang"]).to_pylist()
        assert released == case["released"], case
        assert extract_answer(case["response"], case["lang"], "ABCDE") == case["intended"], case


def test_extraction_on_small_examples() -> None:
    texts = ["x Answer: y Answer: (B)", "Answer:\n\n E ", "Answer: 7", "no marker: Bright", "", "Answer: \u3000"]
    assert released_answers(pa.array(texts), "en").to_pylist() == ["B", "E", "7", None, None, None]
    assert released_answers(pa.array(["Respuesta：C", "Cierto"]), "es").to_pylist() == ["C", "C"]


def test_prompts_and_explanations_have_the_released_form() -> None:
    assert training_prompts(pa.array(["Q?\nA. x"]), "zh").to_pylist() == ["问题:Q?\nA. x\n"]
    assert training_prompts(pa.array(["Domanda: Q?\nE. x\nAnswer:\nRisposta:"]), "it").to_pylist() == [
        "Domanda: Q?\nE. x"
    ]
    assert training_prompts(pa.array(["Q?"]), "es").to_pylist() == ["Q?"]
    texts = ["Explanation: a: b\nAnswer: B", " Explanation:\nc\n\nAnswer: A\nAnswer: B", "d"]
    assert explanations(pa.array(texts), "en").to_pylist() == ["a: b", "c\n\nAnswer: A", "d"]


def test_the_audit_notices_that_english_beats_the_vote(pairs_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, counts = pairs_of(RELEASED)
    report = sample_report(counts)
    audit, languages = report["audit"], list(report["pairs_by_language"])
    assert audit["target"]["accuracy"] == report["vote_accuracy"]
    raw, calibrated = audit["report"]["raw"], audit["report"]["calibrated"]
    assert raw["en"]["accuracy"] == pytest.approx(0.7375, abs=5e-5)
    assert calibrated["vote"]["accuracy"] > raw["vote"]["accuracy"]  # letters that languages favor count less
    assert raw["vote without en"]["accuracy"] < raw["vote"]["accuracy"] - 0.04
    print_vote_audit(audit, languages)
    printed = capsys.readouterr().out
    assert "warning: the target is right in 67.0 percent of the questions, but en" in printed
    assert "preferences.min_agreement=" in printed
    print(printed)
