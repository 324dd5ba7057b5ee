"""What a generated instruction or response must not be: WizardLM's rules of elimination, and a few of ours.

Each rule gives the reason in words; an empty text means that the text stays. The rules are as the literature tells them (Evol-Instruct,
2304.12244); the word lists are ours.
"""

import re

from modelwright.curate.generators.overlap import words

SORRY = 80  # words: a longer response that says sorry may still answer
_STOP = frozenset(
    "a an and are as at be but by do for from had has have he her him his how i if in into is it its me my no not of off on or our out "
    "so than that the their them then there these they this to too up was we were what when where which who why will with would you "
    "your".split()
)
_LEAKS = re.compile(
    r"#+ ?(?:the |given |rewritten |created |new )?(?:prompt|instruction)s? ?#*:?"
    r"|(?:given|rewritten|created|evolved) (?:prompt|instruction)s?\b",
    re.I,
)


def instruction_fault(text: str, before: str = "") -> str:
    """Why an instruction is not kept; `before` is the one that it was made from."""
    if not words(text):
        return "empty instruction"
    if before and words(text) == words(before):
        return "instruction did not change"
    return "words of the template leaked" if _LEAKS.search(text) and not _LEAKS.search(before) else ""


def response_fault(text: str) -> str:
    """Why a response is not kept."""
    said = words(text)
    if not said or not set(said) - _STOP:
        return "response of punctuation and stop words"
    return "response says sorry" if "sorry" in said and len(said) < SORRY else ""
