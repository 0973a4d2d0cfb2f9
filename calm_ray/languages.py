"""The languages calm_ray speaks: a table of data. To add one, add a row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """How questions are asked and answers are marked in one language.

    `explanation` and `answer` are written exactly as the model is asked to write them; the marker's
    word is what the reader of answers looks for (any colon, any case, markdown around it).
    """

    code: str
    name: str
    """In English, for instructions to a translating model."""
    explanation: str
    answer: str
    space: str
    """What stands between a marker and what follows it."""
    instruction: str
    """Takes {letters}; followed by the two markers, which show the form."""

    @property
    def answer_word(self) -> str:
        return self.answer.rstrip(" :：")


_ROWS = [
    (
        "en", "English", "Explanation:", "Answer:", " ",
        "Answer the multiple-choice question. First explain your choice in one or two sentences, "
        "then give the letter of the one correct option ({letters}). Write in this form:",
    ),
    (
        "zh", "Chinese", "解释：", "答案：", "",
        "请回答下面的选择题。先用一两句话解释你的选择，再给出唯一正确选项的字母（{letters}）。请按以下格式书写：",
    ),
    (
        "fr", "French", "Explication :", "Réponse :", " ",
        "Répondez à la question à choix multiples. Expliquez d'abord votre choix en une ou deux phrases, "
        "puis donnez la lettre de la seule bonne option ({letters}). Écrivez sous cette forme :",
    ),
    (
        "de", "German", "Erklärung:", "Antwort:", " ",
        "Beantworte die Multiple-Choice-Frage. Erkläre zuerst deine Wahl in ein oder zwei Sätzen "
        "und nenne dann den Buchstaben der einzigen richtigen Option ({letters}). Schreibe in dieser Form:",
    ),
    (
        "it", "Italian", "Spiegazione:", "Risposta:", " ",
        "Rispondi alla domanda a scelta multipla. Prima spiega la tua scelta in una o due frasi, "
        "poi indica la lettera dell'unica opzione corretta ({letters}). Scrivi in questa forma:",
    ),
    (
        "ja", "Japanese", "説明：", "答え：", "",
        "次の選択問題に答えてください。まず選んだ理由を一、二文で説明し、次に唯一の正しい選択肢の文字（{letters}）を"
        "書いてください。次の形式で書いてください：",
    ),
    (
        "es", "Spanish", "Explicación:", "Respuesta:", " ",
        "Responde a la pregunta de opción múltiple. Primero explica tu elección en una o dos frases "
        "y luego da la letra de la única opción correcta ({letters}). Escribe de esta forma:",
    ),
    (
        "ar", "Arabic", "الشرح:", "الإجابة:", " ",
        "أجب عن سؤال الاختيار من متعدد. اشرح اختيارك أولًا في جملة أو جملتين، "
        "ثم اكتب حرف الخيار الصحيح الوحيد ({letters}). اكتب بهذا الشكل:",
    ),
    (
        "ru", "Russian", "Объяснение:", "Ответ:", " ",
        "Ответьте на вопрос с вариантами ответа. Сначала объясните свой выбор в одном-двух предложениях, "
        "затем укажите букву единственного верного варианта ({letters}). Пишите в такой форме:",
    ),
    (
        "ko", "Korean", "설명:", "정답:", " ",
        "다음 객관식 문제에 답하세요. 먼저 선택한 이유를 한두 문장으로 설명하고, "
        "그다음 유일한 정답의 글자({letters})를 쓰세요. 다음 형식으로 쓰세요:",
    ),
    (
        "pt", "Portuguese", "Explicação:", "Resposta:", " ",
        "Responda à pergunta de múltipla escolha. Primeiro explique a sua escolha em uma ou duas frases "
        "e depois dê a letra da única opção correta ({letters}). Escreva desta forma:",
    ),
    (
        "nl", "Dutch", "Uitleg:", "Antwoord:", " ",
        "Beantwoord de meerkeuzevraag. Leg eerst je keuze uit in een of twee zinnen "
        "en geef dan de letter van de enige juiste optie ({letters}). Schrijf in deze vorm:",
    ),
]

LANGUAGES: dict[str, Language] = {row[0]: Language(*row) for row in _ROWS}
