"""Reading replies: numbered parts, and a verdict of one word."""

import re


def numbered(text: str, name: str) -> list[str]:
    """The texts under the headings `### NAME 1`, `### NAME 2` ... of a reply; none where it has no such heading."""
    marks = list(re.finditer(rf"^[ \t]*#{{2,4}}[ \t]*\**{name}[ \t]*\d*[ \t]*:?\**[ \t]*$", text, re.M | re.I))
    ends = [*(m.start() for m in marks[1:]), len(text)]
    return [body for m, end in zip(marks, ends, strict=False) if (body := text[m.end() : end].strip())]


def one_word(text: str, words: tuple[str, ...]) -> str:
    """The one of `words` that the reply is, whatever its capitals and marks; empty for anything else."""
    bare = re.sub(r"[\W_]+", " ", text).strip().lower()
    return bare if bare in words else ""
