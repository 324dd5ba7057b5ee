"""A verifier for chains that concatenate the last letters of words: a program that checks every step, on AoR's scale of ten.

Ours. It reads "last letter of 'Word' is 'x'", or a bare list of quoted letters as one for each word in turn, and weighs what
AoR asks a judge to weigh: logical consistency 3 (the answer is the letters that were stated, in their order), method 3 (the
share of the question's words that have a step, in order), completeness 2 (an answer was given), knowledge 2 (the share of
steps that state the true last letter).
"""

import re
import unicodedata

from modelwright.judge.chains.answers import extract

_WORDS = re.compile(r'"([^"]+)"')
_STEP = re.compile(r"""letter (?:of|in) (?:the (?:\w+ )?word )?['"“‘](.+?)['"”’] is ['"“‘](.)['"”’]""", re.I)
_LISTED = re.compile(r"""['"“‘](\w)['"”’]""")


def score(question: str, chain: str) -> float:
    """0 to 10 for one chain."""
    words = [w.lower() for quoted in _WORDS.findall(question) for w in quoted.split()]
    chain = unicodedata.normalize("NFC", chain).lower()
    steps = _STEP.findall(chain) or list(zip(words, _LISTED.findall(chain), strict=False))
    answer = extract(chain, "letters")
    if not words or not steps:
        return 2.0 * bool(answer)
    stated = extract("".join(letter for _, letter in steps), "letters")
    in_order = sum(word == step for word, (step, _) in zip(words, steps, strict=False)) / max(len(words), len(steps))
    true = sum(word.endswith(letter) for word, letter in steps) / len(steps)
    return 3.0 * (stated == answer) + 3.0 * in_order + 2.0 * bool(answer) + 2.0 * true
