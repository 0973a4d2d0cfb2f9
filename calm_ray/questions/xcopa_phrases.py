"""XCOPA's two questions in its languages and in English; the line that follows a premise."""

from __future__ import annotations

XCOPA_PHRASES: dict[str, dict[str, str]] = {
    language: {"cause": cause, "effect": effect}
    for language, cause, effect in (
        ("en", "What was the cause of this?", "What happened as a result?"),
        ("et", "Mis oli selle põhjus?", "Mis juhtus selle tagajärjel?"),
        ("ht", "Ki sa ki te lakòz sa?", "Ki sa ki te rive kòm rezilta?"),
        ("id", "Apa penyebabnya?", "Apa akibatnya?"),
        ("it", "Qual è stata la causa?", "Che cosa è successo di conseguenza?"),
        ("qu", "Imaraykutaq chay karqan?", "Chaymanta imataq pasarqan?"),
        ("sw", "Sababu yake ilikuwa nini?", "Matokeo yake yalikuwa nini?"),
        ("ta", "இதற்கான காரணம் என்ன?", "இதன் விளைவாக என்ன நடந்தது?"),
        ("th", "สาเหตุคืออะไร", "ผลที่ตามมาคืออะไร"),
        ("tr", "Bunun nedeni neydi?", "Bunun sonucunda ne oldu?"),
        ("vi", "Nguyên nhân là gì?", "Kết quả là gì?"),
        ("zh", "原因是什么？", "结果是什么？"),
    )
}
