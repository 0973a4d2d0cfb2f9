import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_ray.core.errors import InputError
from calm_ray.core.languages import LANGUAGES
from calm_ray.prompts.answers import extract_answer
from calm_ray.prompts.questions import completion_text

# The answer B in natural sentences.
SENTENCES = {
    "en": ["The correct answer is (B).", "The answer is: B", "so the answer should be option B."],
    "zh": ["正确答案是B。", "答案为（B）", "答案:B项", "答案：选B"],
    "fr": ["La bonne réponse est la B, car", "La réponse est donc B.", "La réponse correcte est l’option B"],
    "de": ["Die richtige Antwort lautet: **B**", "Die Antwort ist Option B."],
    "it": ["La risposta corretta è la B.", "La risposta è “B”", "La risposta è quindi l'opzione B."],
    "ja": ["正しい答えはBです。", "答え：Bです。", "答えは「B」です"],
    "es": ["La respuesta correcta es la opción B.", "La respuesta es: B"],
    "ar": ["الإجابة الصحيحة هي (B).", "الإجابة الصحيحة: B", "الإجابة: \u200fB\u200f،"],
    "ru": ["Правильный ответ — B.", "Ответ: вариант B;", "Ответ это B"],
    "ko": ["정답은 B입니다.", "정답은 (B)입니다", "정답: B번"],
    "pt": ["A resposta correta é a letra B.", "A resposta certa é a B."],
    "nl": ["Het juiste antwoord is B.", "Antwoord: optie B"],
    "bn": ["সঠিক উত্তর হল B।", "উত্তরটি হলো B"],
    "hi": ["सही उत्तर B है।", "उत्तर विकल्प (B) है", "सही उत्तर B।"],
    "id": ["Jawaban yang benar adalah B.", "Jawabannya adalah B"],
    "sw": ["Jibu sahihi ni B.", "Jibu ni herufi B"],
    "yo": ["Ìdáhùn náà ni B.", "Ìdáhùn tó tọ̀nà ni B."],
    "vi": ["Đáp án đúng là B.", "Đáp án là phương án B"],
    "pl": ["Poprawna odpowiedź to B.", "Odpowiedź brzmi: B"],
    "ur": ["درست جواب B ہے۔", "جواب: B۔", "جواب آپشن B ہے"],
    "el": ["Η σωστή απάντηση είναι το B.", "Η απάντηση είναι B"],
    "hu": ["A helyes válasz a B.", "Válasz: (B) lehetőség", "A válasz az: B"],
    "he": ["התשובה הנכונה היא B.", "תשובה: אפשרות B"],
    "tr": ["Doğru cevap B'dir.", "Cevap B şıkkıdır.", "Cevap: B’dir"],
    "ca": ["La resposta correcta és la B.", "La resposta és l'opció B."],
    "uk": ["Правильна відповідь — B.", "Відповідь: варіант B", "Відповідь — це B"],
    "fa": ["پاسخ درست گزینهٔ B است.", "پاسخ صحیح: گزینه B", "پاسخ B می‌باشد."],
    "et": ["Õige vastus on B.", "Vastus on variant B."],
    "ht": ["Bon repons lan se B.", "Repons kòrèk la se B."],
    "qu": ["Allin kutichiyqa Bmi.", "Kutichiyqa B"],
    "ta": ["சரியான விடை B ஆகும்.", "விடை B.", "விடை (B) தான்"],
    "th": ["คำตอบที่ถูกต้องคือ B", "คำตอบคือข้อ B"],
}  # fmt: skip
# None of these names exactly one letter from A to J.
NO_ANSWERS = {
    "en": [
        "Answer: I cannot tell", "Answer: All of them", "Answer: None of the above", "Answer: A good one",
        "Answer: I'd rather not say", "The answer is I don't know", "The answer is not B", "Answer: E.g. this",
        "Answer: B-cells", "Answer: <A, B, C, D, E, F, G, H, I, J>",
    ],
    "zh": ["答案：BC", "答案：<A、B、C、D、E、F、G、H、I、J>", "答案：以上都不是"],
    "fr": ["Réponse : Aucune", "Réponse : A priori aucune", "Réponse : C'est ambigu", "Réponse : D’abord, non"],
    "de": ["Antwort: Beide", "Antwort: D-Vitamin", "Eine bessere Antwort wäre C."],
    "it": ["Risposta: E evidente che no", "Risposta: E' vero", "Risposta: C'è un errore"],
    "ja": ["説明:x\n回答:<A>", "正しい答えはありません"],
    "es": ["Respuesta: A veces", "Respuesta: E incluso más"],
    "ar": ["الإجابة: لا شيء"],
    "ru": ["Ответ: В", "Правильный ответ не B"],
    "ko": ["정답: AB", "정답은 없습니다"],
    "pt": ["Resposta: A resposta não existe", "Resposta: E agora"],
    "nl": ["Antwoord: Beide"],
    "bn": ["উত্তর: কোনটিই নয়"],
    "hi": ["उत्तर A गलत है", "उत्तर: कोई नहीं"],
    "id": ["Jawaban: Bukan satu pun"],
    "sw": ["Jibu: Hakuna"],
    "yo": ["Ìdáhùn: A kò mọ̀"],
    "vi": ["Đáp án: Chưa rõ"],
    "pl": ["Odpowiedź: A może nie", "Odpowiedź: I tak nie wiem"],
    "ur": ["جواب A غلط ہے"],
    "el": ["Απάντηση: Β"],
    "hu": ["Válasz: A fentiek közül egyik sem"],
    "he": ["תשובה: אף אחת"],
    "tr": ["Cevap A yanlıştır"],
    "ca": ["Resposta: A vegades", "Resposta: D'acord"],
    "uk": ["Відповідь: Жодна"],
    "fa": ["پاسخ A غلط است"],
    "et": ["Vastus: Ei tea"],
    "ht": ["Repons: A la pa genyen"],
    "qu": ["Kutichiy: Manam"],
    "ta": ["விடை A தவறு"],
    "th": ["คำตอบ: ไม่มี"],
}  # fmt: skip

TEXTS = ["river", "eagle’s nest", "電網", "A-bomb", "I"]
"""The choices in the tests below; the second one is B."""


@pytest.mark.parametrize("language", LANGUAGES)
def test_requested_format_is_parsed_in_every_language(language: str) -> None:
    assert extract_answer(completion_text(language, "...", "C"), language, "ABCD") == "C"


@pytest.mark.parametrize(
    ("language", "text", "answer"),
    [
        ("en", "Explanation: x\nAnswer: B", "B"),
        ("en", "Answer: D. schools", "D"),
        ("en", "answer: (c)", "C"),
        ("en", "**Answer**: **C**", "C"),
        ("en", "**Answer: C**", "C"),
        ("en", "Answer: b)", "B"),
        ("en", "Answer: b", "B"),
        ("en", "Answer:\n\n`A`", "A"),
        ("en", "Answer: A\n...\nAnswer: B", "B"),
        ("en", "Answer: A\nAnswer: neither", "A"),
        ("en", "Answer: E", None),
        ("en", "Answer: a good one", None),
        ("en", "Answer: Both", None),
        ("en", "B", None),
        ("en", "Explanation", None),
        ("en", "", None),
        ("en", "I cannot answer this question.", None),
        ("zh", "解释：……\n答案：B", "B"),
        ("zh", "答案:Ｂ", "B"),
        ("zh", "答案：（C）", "C"),
        ("fr", "Réponse : D. sel", "D"),
        ("fr", "réponse: «A»", "A"),
        ("de", "Antwort: Beide sind richtig", None),
        ("de", "Antwort: B. Beide", "B"),
        ("ja", "説明：…\n答え：「A」", "A"),
        ("ar", "الشرح: ...\nالإجابة: (A)", "A"),
        ("ru", "Ответ: С", None),  # a Cyrillic letter is not a choice
        ("ko", "정답: D", "D"),
    ],
)
def test_answers_are_extracted(language: str, text: str, answer: str | None) -> None:
    assert extract_answer(text, language, "ABCD") == answer


@given(st.text(), st.sampled_from(list(LANGUAGES)), st.integers(2, 10))
def test_any_text_gives_a_choice_letter_or_none(text: str, language: str, choices: int) -> None:
    letters = "ABCDEFGHIJ"[:choices]
    for answer_text in (text, f"{LANGUAGES[language].answer} {text}"):
        assert extract_answer(answer_text, language, letters) in [*letters, None]


@pytest.mark.parametrize("language", LANGUAGES)
def test_markers_are_parsed_in_any_formatting(language: str) -> None:
    row = LANGUAGES[language]
    word = row.answer_word
    for marker in (f"{word}:", f"{word}：", f"{word} :", f"**{word}：**", f"{word.upper()}:", f"## {word.lower()} ："):
        for letter in (
            "B",
            "Ｂ",
            "(B)",
            "（Ｂ）",
            "【B】",
            "［B］",
            "「B」",
            "《B》",
            "«B»",
            "<B>",
            "**B**",
            "`b`",
            "_(b)_",
            "b)",
        ):
            assert extract_answer(f"{row.explanation} x. A.\n{marker} {letter}", language, "ABCD") == "B"
        for end in (".", ",", ";", "!", "،", "؛", "۔", "।", "。", "、", "，", ". x", "\nx", "\r\nx"):
            assert extract_answer(f"{marker}B{end}", language, "ABCD") == "B"
            assert extract_answer(f"{marker}\n\nb{end}", language, "ABCD") == "B"


@pytest.mark.parametrize(("language", "text"), [(code, text) for code, texts in SENTENCES.items() for text in texts])
def test_answers_in_sentences_are_parsed(language: str, text: str) -> None:
    assert extract_answer(text, language, "ABCDE") == "B"
    assert extract_answer(f"A. {text}\n\nA.", language, "ABCDE") == "B"


@pytest.mark.parametrize(("language", "text"), [(code, text) for code, texts in NO_ANSWERS.items() for text in texts])
def test_words_refusals_and_several_letters_are_unparseable(language: str, text: str) -> None:
    assert extract_answer(text, language, "ABCDEFGHIJ") is None
    assert extract_answer(text, language, "ABCDE", TEXTS) is None


def test_examples_cover_every_language() -> None:
    assert list(SENTENCES) == list(NO_ANSWERS) == list(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_choice_text_counts_as_its_letter(language: str) -> None:
    marker = LANGUAGES[language].answer
    for text, answer in [
        ("eagle’s nest", "B"), ("Eagle’s Nest.", "B"), ("**ＥＡＧＬＥ’s nest**。", "B"), ("B eagle’s nest", "B"),
        ("\n\n「電網」。\n...", "C"), ("C電網", "C"), ("A river", "A"), ("A-bomb", "D"), ("I", "E"), ("eagle", None),
        ("river, eagle’s nest", None), ("", None),
    ]:  # fmt: skip
        assert extract_answer(f"{marker} {text}", language, "ABCDE", TEXTS) == answer, text


@pytest.mark.parametrize(
    ("text", "choices", "answer"),
    [
        ("Answer: town", ["town", "Town"], None),  # matches both
        ("Answer: A town", ["village", "a town"], "B"),
        ("Answer: A town", ["village", "city"], None),
        ("Answer: A because it is", ["village", "city"], None),
        ("The answer is A because it is", ["village", "city"], "A"),  # not the article, inside a sentence
        ("Answer: E. coli", ["E. coli", "b", "c", "d", "S. aureus"], "A"),
        ("Answer: E. coli", ["x", "b", "c", "d", "coli"], "E"),
        ("Answer: B", ["B", "A"], "B"),  # the letter wins over the text
        ("Answer: -5", ["5", "-5"], "B"),
        ("Answer: B. city", ["city", "village"], "B"),
        ("town", ["town", "city"], None),
    ],
)
def test_choice_texts_are_matched(text: str, choices: list[str], answer: str | None) -> None:
    assert extract_answer(text, "en", "ABCDE", choices) == answer


def test_last_marker_with_an_answer_wins() -> None:
    assert extract_answer("答案：A\n正确答案：没有", "cn", "ABCD") == "A"
    assert extract_answer("Answer: A. x\nCorrect answer among the options:\nB. y", "en", "ABCD") == "A"
    assert extract_answer("答案是A。\n... 答案是B。", "zh", "ABCD") == "B"
    decomposed = "Re\u0301ponse : B"
    assert extract_answer(decomposed, "fr", "ABCD") == "B"
    assert extract_answer(f"Réponse : A\n{decomposed}", "fr", "ABCD") == "B"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Answer: A. memorial site (this is not correct)\n\nCorrect answer: B. gravesite"),
        ("en", "The answer is B, some say.\n**Answer:** A\nThe best answer is C."),
        ("fr", "Réponse : A. La bonne réponse est : C. Marché"),
        ("de", "Antwort: A. die Stadt\n\nDie korrekte Antwort ist C. Zeitschrift"),
        ("en", "Answer: A, B"),
        ("it", "Risposta: A e B"),
        ("zh", "答案：A或B"),
    ],
)
def test_marker_beats_prose_and_first_listed_letter_wins(language: str, text: str) -> None:
    assert extract_answer(text, language, "ABCD") == "A"


def test_language_aliases_work_and_unknown_codes_are_refused() -> None:
    assert extract_answer("答案:A", "cn", "AB") == extract_answer("答案:A", "ZH_CN", "AB") == "A"
    with pytest.raises(InputError, match="'tlh'"):
        extract_answer("", "tlh", "AB")


@pytest.mark.parametrize("language", LANGUAGES)
@given(
    st.lists(st.one_of(st.text(max_size=8), st.sampled_from(["A", "b)", "I", "E.", " ", "\n", ":", "：", "(", "**"]))),
    st.integers(2, 10),
    st.lists(st.text(max_size=6), max_size=12),
)
@settings(max_examples=25, deadline=None)
def test_fuzzed_answers_give_a_choice_letter_or_none(
    language: str, parts: list[str], count: int, choices: list[str]
) -> None:
    letters, row = "ABCDEFGHIJ"[:count], LANGUAGES[language]
    copula = row.copula.split("|")[0]
    for text in (row.answer.join(parts), f"{row.answer_word} {copula} ".join(["", *parts]), "".join(parts)):
        for options in ((), choices):
            assert extract_answer(text, language, letters, options) in [*letters, None]


def test_golden_values_are_reproduced(data: Path) -> None:
    golden = data.parent / "reference" / "golden_metrics.json"
    if not golden.is_file():
        pytest.skip(f"golden values: {golden} not found")
    (group,) = [g for g in json.loads(golden.read_text("utf-8"))["groups"] if g["name"] == "calm_answer_extraction"]
    assert group["cases"]
    for case in group["cases"]:
        assert extract_answer(case["response"], case["lang"], "ABCDE") == case["intended"], case


def test_few_published_completions_are_unparseable(data: Path) -> None:
    """CALM's 2,697 samples per language: refusals, lists of letters, and words instead of a letter."""
    unparseable: Counter[str] = Counter()
    for code in ("en", "cn", "fr", "de", "it", "ja"):
        file = data / "calm_xcsqa" / "samples" / f"x_csqa_{code}_train_sampled.json"
        if not file.is_file():
            pytest.skip(f"published completions: {file} not found")
        for row in json.loads(file.read_text("utf-8")):
            choices = [line[2:] for line in row["input"].splitlines() if line[:2] in ("A.", "B.", "C.", "D.", "E.")]
            unparseable[code] += sum(extract_answer(text, code, "ABCDE", choices) is None for text in row["pred"])
    assert unparseable == {"en": 12, "cn": 2, "fr": 5, "de": 15, "it": 16, "ja": 28}
