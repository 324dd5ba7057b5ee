"""White space that survives SentencePiece, which makes one space of many and loses line ends: tokens for it, and the way back.

The tokens are those of ERNIE-Code: a line end, a tabulator, and <|space|> once, twice and four times.
"""

import re
from typing import Any, Literal

SPACE = "<|space|>"
TOKENS = ("\n", "\t", SPACE * 4, SPACE * 2, SPACE)
Spaces = Literal["indent", "all", "none"]
_INDENT = re.compile(r"(?<=\n) +")
_ALL = re.compile(r"(?:^|(?<=[\n\t])) +| {2,}| +(?:$|(?=[\n\t]))")


def add_tokens(tokenizer: Any) -> int:
    """Give the tokenizer the tokens that it lacks; how many are new. They are matched before anything is normalised."""
    from tokenizers import AddedToken

    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken(t, normalized=False, lstrip=False, rstrip=False) for t in TOKENS])
    return len(tokenizer) - before


def write(text: str, spaces: Spaces = "indent") -> str:
    """Text as it is tokenised. indent: the spaces after a line end become tokens (the paper's). all (ours): every space that SentencePiece
    would lose, at the ends of a line, beside a tabulator, or in a run."""
    if spaces == "none":
        return text
    return (_INDENT if spaces == "indent" else _ALL).sub(lambda m: SPACE * len(m[0]), text)


def read(text: str, special: tuple[str, ...] = ("<pad>", "</s>", "<unk>")) -> str:
    """What was decoded, special tokens included, as text: the one space that follows a token goes, then the tokens turn back."""
    for token in (*special, *TOKENS):
        text = text.replace(token + " ", token)
    for token in special:
        text = text.replace(token, "")
    return text.replace(SPACE, " ")


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Token ids as text with its white space."""
    special = tuple(t for t in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) if t)
    return read(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), special)
