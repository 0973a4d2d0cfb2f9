import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_ray.core.languages import LANGUAGES, language_code
from calm_ray.prompts.questions import prompt_text

# Language codes as spelled in the three papers' data sets.
DATA_SETS = {
    "CALM's X-CSQA": "en cn fr de it ja ar",
    "X-CSQA": "en zh de es fr it jap nl pl pt ru ar vi hi sw ur",
    "MMMLU": "AR_XY BN_BD DE_DE ES_LA FR_FR HI_IN ID_ID IT_IT JA_JP KO_KR PT_BR SW_KE YO_NG ZH_CN",
    "BMLAMA-17": "en fr nl es ru ja zh ko vi el hu he tr ca ar uk fa",
    "XCOPA": "et ht id it qu sw ta th tr vi zh",
    "Xing": "en zh fr es ru ja it de pt ko el hu nl",
}


@pytest.mark.parametrize("codes", DATA_SETS.values(), ids=DATA_SETS)
def test_data_set_codes_map_to_distinct_languages(codes: str) -> None:
    found = [language_code(code) for code in codes.split()]
    assert None not in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("cn", "zh"), ("chi", "zh"), ("zho", "zh"), ("zh-Hans", "zh"), ("zh_CN", "zh"), ("zho_Hans", "zh"),
        ("jap", "ja"), ("jpn", "ja"), ("eng", "en"), ("EN", "en"), (" fr ", "fr"), ("FR-FR", "fr"), ("PT-BR", "pt"),
        ("AR-XY", "ar"), ("ara", "ar"), ("arb", "ar"), ("fas", "fa"), ("pes", "fa"), ("swa", "sw"), ("que", "qu"),
        ("", None), ("xx", None), ("english", None), ("-", None),
    ],
)  # fmt: skip
def test_language_codes_are_normalized(name: str, code: str | None) -> None:
    assert language_code(name) == code


@given(st.text())
def test_any_text_gives_a_known_language_code_or_none(name: str) -> None:
    assert language_code(name) in [*LANGUAGES, None]


@pytest.mark.parametrize("code", LANGUAGES)
def test_language_row_is_complete(code: str) -> None:
    row = LANGUAGES[code]
    assert language_code(code) == language_code(row.flores) == code
    assert re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", row.flores)
    assert row.explanation[-1] == row.answer[-1]
    assert row.answer[-1] in ":："
    assert row.instruction[-1] in ":："
    assert row.copula or row.verb
    text = "".join([row.explanation, row.answer, row.instruction, row.right, row.copula, row.option, row.verb])
    assert unicodedata.normalize("NFC", text) == text
    question = {"question_id": "q", "language": code, "text": "?", "choices": ["x", "y"], "gold": None, "subject": None}
    assert "A, B" in prompt_text(question, "explain").splitlines()[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("code", LANGUAGES)
def test_alternatives_do_not_shadow_longer_ones(code: str) -> None:
    for field in (LANGUAGES[code].copula, LANGUAGES[code].option):
        phrases = field.split("|")
        assert not [(one, two) for i, one in enumerate(phrases) for two in phrases[i + 1 :] if two.startswith(one)]


def test_language_rows_are_distinct() -> None:
    for field in ("name", "flores", "instruction"):
        assert len({getattr(row, field) for row in LANGUAGES.values()}) == len(LANGUAGES)
