"""What a reasoning model thinks before it answers is no part of its answer."""

import re

_CLOSED = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.I | re.S)
_OPENED_BEFORE = re.compile(r"^.*?</(?:think|thinking|reasoning)>", re.I | re.S)  # a template that opened the block itself
_LEFT_OPEN = re.compile(r"<(?:think|thinking|reasoning)>.*$", re.I | re.S)


def without_thoughts(text: str) -> str:
    """The text after the thinking; empty where the thinking did not end."""
    if "<" not in text:
        return text
    text = _CLOSED.sub("", text)
    text = _OPENED_BEFORE.sub("", text)
    return _LEFT_OPEN.sub("", text).strip()
