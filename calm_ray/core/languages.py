"""The table of supported languages. To add a language, add a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from calm_ray.core.errors import InputError


@dataclass(frozen=True)
class Language:
    """How to ask questions, mark answers and extract answers in one language.

    `explanation` and `answer` are the exact markers that the model is asked to write. Extraction looks for the answer
    marker's word, with any colon, case or surrounding markdown. The fields after `instruction` describe how prose
    states an answer, as regular expressions. Alternatives are tried in order, so put a longer one before its prefix.
    """

    code: str
    name: str
    """English name, for prompting a model to translate."""
    flores: str
    """Code in FLORES-200, as used by NLLB."""
    explanation: str
    answer: str
    space: str
    """Separator between a marker and the text after it."""
    instruction: str
    """Template with {letters}; the two markers follow it to show the format."""
    right: str = ""
    """Optional word for "correct" after the word for "answer": `correcte` in "La réponse correcte est B"."""
    copula: str = ""
    """Verb before the letter, without conditionals: `est`. Empty if the verb always follows the letter."""
    option: str = ""
    """Optional noun before the letter: `l'option` in "La réponse est l'option B"."""
    verb: str = ""
    """Optional verb after the letter, with or without a space: `です` in "答えはBです"."""
    words: str = ""
    """Single-letter words, in the case they have inside a sentence: "I" is always uppercase, "a" is not."""

    @property
    def answer_word(self) -> str:
        return self.answer.rstrip(" :：")


_ROWS = [
    Language(
        "en",
        "English",
        "eng_Latn",
        "Explanation:",
        "Answer:",
        " ",
        "Answer the multiple-choice question. First explain your choice in one or two sentences, "
        "then give the letter of the one correct option ({letters}). Write in this form:",
        copula="is|should be|must be",
        option="option|choice|letter",
        words="aI",
    ),
    Language(
        "zh",
        "Chinese",
        "zho_Hans",
        "解释：",
        "答案：",
        "",
        "请回答下面的选择题。先用一两句话解释你的选择，再给出唯一正确选项的字母（{letters}）。请按以下格式书写：",
        copula="应该是|应是|应为|就是|是|为|选",
        option="选项|选",
        verb="项",
    ),
    Language(
        "fr",
        "French",
        "fra_Latn",
        "Explication :",
        "Réponse :",
        " ",
        "Répondez à la question à choix multiples. Expliquez d'abord votre choix en une ou deux phrases, "
        "puis donnez la lettre de la seule bonne option ({letters}). Écrivez sous cette forme :",
        right="correcte|juste|exacte|finale",
        copula="est donc|est",
        option="l['’]option|la lettre|la|option|lettre",
        words="ay",
    ),
    Language(
        "de",
        "German",
        "deu_Latn",
        "Erklärung:",
        "Antwort:",
        " ",
        "Beantworte die Multiple-Choice-Frage. Erkläre zuerst deine Wahl in ein oder zwei Sätzen "
        "und nenne dann den Buchstaben der einzigen richtigen Option ({letters}). Schreibe in dieser Form:",
        copula="ist|lautet",
        option="Option|Buchstabe",
    ),
    Language(
        "it",
        "Italian",
        "ita_Latn",
        "Spiegazione:",
        "Risposta:",
        " ",
        "Rispondi alla domanda a scelta multipla. Prima spiega la tua scelta in una o due frasi, "
        "poi indica la lettera dell'unica opzione corretta ({letters}). Scrivi in questa forma:",
        right="corretta|giusta|esatta|finale",
        copula="è quindi|è",
        option="l['’]opzione|la lettera|la|opzione|lettera",
        words="aeio",
    ),
    Language(
        "ja",
        "Japanese",
        "jpn_Jpan",
        "説明：",
        "答え：",
        "",
        "次の選択問題に答えてください。まず選んだ理由を一、二文で説明し、次に唯一の正しい選択肢の文字（{letters}）を"
        "書いてください。次の形式で書いてください：",
        copula="は",
        option="選択肢",
        verb="です|だ|である|となります|になります",
    ),
    Language(
        "es",
        "Spanish",
        "spa_Latn",
        "Explicación:",
        "Respuesta:",
        " ",
        "Responde a la pregunta de opción múltiple. Primero explica tu elección en una o dos frases "
        "y luego da la letra de la única opción correcta ({letters}). Escribe de esta forma:",
        right="correcta|adecuada|final",
        copula="es",
        option="la opción|la letra|la|opción|letra",
        words="aeouy",
    ),
    Language(
        "ar",
        "Arabic",
        "arb_Arab",
        "الشرح:",
        "الإجابة:",
        " ",
        "أجب عن سؤال الاختيار من متعدد. اشرح اختيارك أولًا في جملة أو جملتين، "
        "ثم اكتب حرف الخيار الصحيح الوحيد ({letters}). اكتب بهذا الشكل:",
        right="الصحيحة|الصحيح|النهائية",
        copula="هي|هو",
        option="الخيار|الحرف|خيار|حرف",
    ),
    Language(
        "ru",
        "Russian",
        "rus_Cyrl",
        "Объяснение:",
        "Ответ:",
        " ",
        "Ответьте на вопрос с вариантами ответа. Сначала объясните свой выбор в одном-двух предложениях, "
        "затем укажите букву единственного верного варианта ({letters}). Пишите в такой форме:",
        copula="[—–-] это|это|будет|является|[—–-]",
        option="вариант|буква",
    ),
    Language(
        "ko",
        "Korean",
        "kor_Hang",
        "설명:",
        "정답:",
        " ",
        "다음 객관식 문제에 답하세요. 먼저 선택한 이유를 한두 문장으로 설명하고, "
        "그다음 유일한 정답의 글자({letters})를 쓰세요. 다음 형식으로 쓰세요:",
        copula="은|는",
        option="보기|선택지",
        verb="번?(?:입니다|이다|예요|이에요|이 맞습니다|가 맞습니다)|번",
    ),
    Language(
        "pt",
        "Portuguese",
        "por_Latn",
        "Explicação:",
        "Resposta:",
        " ",
        "Responda à pergunta de múltipla escolha. Primeiro explique a sua escolha em uma ou duas frases "
        "e depois dê a letra da única opção correta ({letters}). Escreva desta forma:",
        right="correta|certa|final",
        copula="é a|é",
        option="a opção|a letra|a alternativa|opção|letra|alternativa",
        words="aeo",
    ),
    Language(
        "nl",
        "Dutch",
        "nld_Latn",
        "Uitleg:",
        "Antwoord:",
        " ",
        "Beantwoord de meerkeuzevraag. Leg eerst je keuze uit in een of twee zinnen "
        "en geef dan de letter van de enige juiste optie ({letters}). Schrijf in deze vorm:",
        copula="is|luidt",
        option="optie|letter",
        words="u",
    ),
    Language(
        "bn",
        "Bengali",
        "ben_Beng",
        "ব্যাখ্যা:",
        "উত্তর:",
        " ",
        "বহুনির্বাচনী প্রশ্নটির উত্তর দিন। প্রথমে এক বা দুই বাক্যে আপনার পছন্দ ব্যাখ্যা করুন, "
        "তারপর একমাত্র সঠিক বিকল্পের অক্ষরটি ({letters}) লিখুন। এই আকারে লিখুন:",
        right="টি",
        copula="হলো|হল|হচ্ছে|হবে",
        option="বিকল্প|অপশন",
    ),
    Language(
        "hi",
        "Hindi",
        "hin_Deva",
        "व्याख्या:",
        "उत्तर:",
        " ",
        "बहुविकल्पीय प्रश्न का उत्तर दीजिए। पहले एक या दो वाक्यों में अपने चुनाव का कारण समझाइए, "
        "फिर एकमात्र सही विकल्प का अक्षर ({letters}) लिखिए। इस रूप में लिखिए:",
        option="विकल्प|अक्षर",
        verb="है|होगा",
    ),
    Language(
        "id",
        "Indonesian",
        "ind_Latn",
        "Penjelasan:",
        "Jawaban:",
        " ",
        "Jawablah soal pilihan ganda berikut. Pertama-tama jelaskan pilihan Anda dalam satu atau dua kalimat, "
        "lalu berikan huruf dari satu-satunya pilihan yang benar ({letters}). Tulislah dalam bentuk ini:",
        right="nya|yang benar|yang tepat|yang paling tepat|akhir",
        copula="adalah|ialah|yaitu",
        option="opsi|pilihan|huruf",
    ),
    Language(
        "sw",
        "Swahili",
        "swh_Latn",
        "Maelezo:",
        "Jibu:",
        " ",
        "Jibu swali la kuchagua. Kwanza eleza chaguo lako kwa sentensi moja au mbili, "
        "kisha toa herufi ya chaguo moja sahihi ({letters}). Andika kwa muundo huu:",
        right="sahihi|lililo sahihi|la mwisho",
        copula="ni",
        option="chaguo|herufi",
    ),
    Language(
        "yo",
        "Yoruba",
        "yor_Latn",
        "Àlàyé:",
        "Ìdáhùn:",
        " ",
        "Dáhùn ìbéèrè oní-yíyàn-púpọ̀ yìí. Kọ́kọ́ ṣàlàyé ohun tí o yàn ní gbólóhùn kan tàbí méjì, "
        "lẹ́yìn náà kọ lẹ́tà ìdáhùn kan ṣoṣo tí ó tọ̀nà ({letters}). Kọ ọ́ báyìí:",
        right="náà|tó tọ̀nà|tí ó tọ̀nà",
        copula="ni|jẹ́",
        option="lẹ́tà",
        words="ao",
    ),
    Language(
        "vi",
        "Vietnamese",
        "vie_Latn",
        "Giải thích:",
        "Đáp án:",
        " ",
        "Hãy trả lời câu hỏi trắc nghiệm. Trước tiên hãy giải thích lựa chọn của bạn trong một hoặc hai câu, "
        "sau đó cho biết chữ cái của phương án đúng duy nhất ({letters}). Hãy viết theo mẫu sau:",
        right="đúng nhất|đúng|chính xác|cuối cùng",
        copula="phải là|sẽ là|là",
        option="phương án|lựa chọn|chữ cái|câu",
    ),
    Language(
        "pl",
        "Polish",
        "pol_Latn",
        "Wyjaśnienie:",
        "Odpowiedź:",
        " ",
        "Odpowiedz na pytanie wielokrotnego wyboru. Najpierw wyjaśnij swój wybór w jednym lub dwóch zdaniach, "
        "a następnie podaj literę jedynej poprawnej odpowiedzi ({letters}). Napisz w tej formie:",
        right="poprawna|prawidłowa|końcowa",
        copula="to|brzmi|jest",
        option="opcja|litera|wariant",
        words="aiouwz",
    ),
    Language(
        "ur",
        "Urdu",
        "urd_Arab",
        "وضاحت:",
        "جواب:",
        " ",
        "کثیر الانتخابی سوال کا جواب دیں۔ پہلے ایک یا دو جملوں میں اپنے انتخاب کی وضاحت کریں، "
        "پھر واحد درست اختیار کا حرف ({letters}) لکھیں۔ اس شکل میں لکھیں:",
        option="آپشن|اختیار|حرف",
        verb="ہے|ہوگا",
    ),
    Language(
        "el",
        "Greek",
        "ell_Grek",
        "Εξήγηση:",
        "Απάντηση:",
        " ",
        "Απαντήστε στην ερώτηση πολλαπλής επιλογής. Εξηγήστε πρώτα την επιλογή σας σε μία ή δύο προτάσεις "
        "και μετά δώστε το γράμμα της μοναδικής σωστής επιλογής ({letters}). Γράψτε με αυτή τη μορφή:",
        copula="είναι",
        option="η επιλογή|το γράμμα|η|το|επιλογή|γράμμα",
    ),
    Language(
        "hu",
        "Hungarian",
        "hun_Latn",
        "Magyarázat:",
        "Válasz:",
        " ",
        "Válaszoljon a feleletválasztós kérdésre. Először indokolja meg a választását egy-két mondatban, "
        "majd adja meg az egyetlen helyes lehetőség betűjelét ({letters}). Írjon ebben a formában:",
        copula=r"az|a\(z\)|a",
        option="opció|lehetőség|betű",
        words="aes",
    ),
    Language(
        "he",
        "Hebrew",
        "heb_Hebr",
        "הסבר:",
        "תשובה:",
        " ",
        "ענו על השאלה הרב-ברירתית. תחילה הסבירו את בחירתכם במשפט אחד או שניים, "
        "ולאחר מכן כתבו את האות של האפשרות הנכונה היחידה ({letters}). כתבו בצורה הזו:",
        right="הנכונה|הסופית",
        copula="היא|הוא",
        option="האפשרות|אפשרות|האות|אות",
    ),
    Language(
        "tr",
        "Turkish",
        "tur_Latn",
        "Açıklama:",
        "Cevap:",
        " ",
        "Çoktan seçmeli soruyu yanıtlayın. Önce seçiminizi bir iki cümleyle açıklayın, "
        "sonra tek doğru seçeneğin harfini ({letters}) yazın. Şu biçimde yazın:",
        option="seçenek|şık",
        verb=r"['’]?[dt][iıuü]r\b|şıkkı(?:dır)?|seçeneği(?:dir)?|olmalıdır",
        words="o",
    ),
    Language(
        "ca",
        "Catalan",
        "cat_Latn",
        "Explicació:",
        "Resposta:",
        " ",
        "Respon la pregunta d'opció múltiple. Primer explica la teva elecció en una o dues frases "
        "i després dona la lletra de l'única opció correcta ({letters}). Escriu d'aquesta forma:",
        right="correcta|adequada|final",
        copula="és",
        option="l['’]opció|la lletra|la|opció|lletra",
        words="aeioy",
    ),
    Language(
        "uk",
        "Ukrainian",
        "ukr_Cyrl",
        "Пояснення:",
        "Відповідь:",
        " ",
        "Дайте відповідь на запитання з варіантами відповіді. Спочатку поясніть свій вибір одним-двома реченнями, "
        "а потім укажіть літеру єдиного правильного варіанта ({letters}). Пишіть у такій формі:",
        copula="[—–-] це|це|буде|є|[—–-]",
        option="варіант|літера|буква",
    ),
    Language(
        "fa",
        "Persian",
        "pes_Arab",
        "توضیح:",
        "پاسخ:",
        " ",
        "به پرسش چندگزینه‌ای پاسخ دهید. نخست انتخاب خود را در یک یا دو جمله توضیح دهید، "
        "سپس حرف تنها گزینهٔ درست ({letters}) را بنویسید. به این شکل بنویسید:",
        right="صحیح|درست|نهایی",
        option="گزینهٔ|گزینه|حرف",
        verb="است|می‌باشد|خواهد بود",
    ),
    Language(
        "et",
        "Estonian",
        "est_Latn",
        "Selgitus:",
        "Vastus:",
        " ",
        "Vasta valikvastustega küsimusele. Selgita kõigepealt oma valikut ühe või kahe lausega "
        "ja anna siis ainsa õige variandi täht ({letters}). Kirjuta sellises vormis:",
        copula="on",
        option="variant|valik|täht",
    ),
    Language(
        "ht",
        "Haitian Creole",
        "hat_Latn",
        "Eksplikasyon:",
        "Repons:",
        " ",
        "Reponn kesyon chwa miltip la. Dabò eksplike chwa ou nan youn oswa de fraz, "
        "apre sa bay lèt sèl opsyon ki kòrèk la ({letters}). Ekri l nan fòm sa a:",
        right="lan|la|kòrèk la|ki kòrèk la",
        copula="se",
        option="opsyon|lèt|chwa",
        words="aelmnwy",
    ),
    Language(
        "qu",
        "Quechua",
        "quy_Latn",
        "Sutinchay:",
        "Kutichiy:",
        " ",
        "Akllana tapuyta kutichiy. Ñawpaqta huk otaq iskay rimaypi akllasqaykita sutinchay, "
        "chaymanta chaylla allin kutichiypa qillqanta ({letters}) quy. Kayhinata qillqay:",
        copula="qa",
        option="akllana|qillqa",
        verb=r"-?mi?\b",
    ),
    Language(
        "ta",
        "Tamil",
        "tam_Taml",
        "விளக்கம்:",
        "விடை:",
        " ",
        "பல்தேர்வு வினாவிற்கு விடையளிக்கவும். முதலில் உங்கள் தேர்வை ஓரிரு வாக்கியங்களில் விளக்கவும், "
        "பிறகு சரியான ஒரே விருப்பத்தின் எழுத்தை ({letters}) எழுதவும். இந்த வடிவில் எழுதவும்:",
        option="விருப்பம்|தெரிவு",
        verb="ஆகும்|தான்",
    ),
    Language(
        "th",
        "Thai",
        "tha_Thai",
        "คำอธิบาย:",
        "คำตอบ:",
        " ",
        "จงตอบคำถามแบบเลือกตอบ ก่อนอื่นอธิบายเหตุผลที่เลือกในหนึ่งหรือสองประโยค "
        "แล้วบอกตัวอักษรของตัวเลือกที่ถูกต้องเพียงข้อเดียว ({letters}) เขียนในรูปแบบนี้:",
        right="ที่ถูกต้อง|ที่ถูก|ที่ดีที่สุด",
        copula="น่าจะเป็น|คือ|เป็น",
        option="ข้อ|ตัวเลือก",
    ),
]

LANGUAGES: dict[str, Language] = {row.code: row for row in _ROWS}

# Other codes found in data sets: CALM's `cn`, X-CSQA's `jap`, and ISO 639 macrolanguages, for which FLORES uses a
# member's code (`arb`, Standard Arabic, for `ara`).
_ALIASES = {"cn": "zh", "chi": "zh", "jap": "ja", "ara": "ar", "swa": "sw", "fas": "fa", "que": "qu"}
_CODES = _ALIASES | {row.flores[:3]: row.code for row in _ROWS} | {row.code: row.code for row in _ROWS}


def language_code(name: str) -> str | None:
    """Maps a data set's language code (`cn`, `FR-FR`, `zho_Hans`) to the table's code, or None if it is unsupported.

    Ignores case, region and script.
    """
    return _CODES.get(re.split("[-_]", name.strip().lower(), maxsplit=1)[0])


def language_row(name: str) -> Language:
    """Returns the row of a code, or of a dataset's alias for one. Raises InputError if the table has none."""
    code = language_code(name)
    if code is None:
        raise InputError(f"language {name!r} is not in the language table; known are {', '.join(LANGUAGES)}")
    return LANGUAGES[code]
