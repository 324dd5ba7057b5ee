"""What a person is told when something they gave cannot work."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input: what is wrong, why, and how to mend it.

    The command line prints it as one sentence and exits with code 2; in Python it is an ordinary exception.
    """

    def __init__(self, what: str, why: str = "", how: str = ""):
        self.what, self.why, self.how = what, why, how
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f", because {self.why}"
        if self.how:
            text += f"; {self.how}"
        return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return "known: " + ", ".join(known) if 0 < len(known) <= 20 else ""


def shown(value: object) -> str:
    """A value as part of one sentence: at most 80 characters, without line breaks or invisible marks."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number with thousands of digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def short(error: BaseException) -> str:
    """An exception's message as part of one sentence."""
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
