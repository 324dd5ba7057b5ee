"""Characters put in order: line breaks, spaces, and what cannot be seen. Applying it twice changes nothing more."""

import re

_JOIN = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\ufb50-\ufdff\ufe0f\ufe70-\ufefe\U0001f000-\U0001faff"
_STEPS = [  # in this order
    (re.compile("\r\n"), "\n"),
    (re.compile("[\x0b\x0c\r\x85\u2028\u2029]"), "\n"),
    (re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]"), " "),
    # Zero width; after letters that join (Arabic, Syriac, Indic, Mongolian) and in emoji sequences they carry meaning and stay.
    (re.compile(f"(?<![{_JOIN}])[\u200b-\u200d]"), ""),
    (re.compile("[\u2060\ufeff]"), ""),
    (re.compile("[\u00ad\ufffc\u2061-\u2063]"), ""),
    (re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]"), ""),
    (re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]"), ""),
]  # fmt: skip
_PLAIN = re.compile("[\x00-\x08\x0b-\x1f\x7f]")


def normalise(text: str) -> str:
    """The text with one kind of line break and space, without controls, private use and invisible characters."""
    if not text.isascii() or _PLAIN.search(text):
        for pattern, by in _STEPS[: 2 if text.isascii() else None]:
            text = pattern.sub(by, text)
        text = _STEPS[6][0].sub("", text)
    return text.lstrip(" ")
