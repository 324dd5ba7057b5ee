"""Features of documents for a classifier of quality: the list of llm-web-kit, and the statistics that WanJuan-CC publishes.

All come from the tokenisation that the rules use (kernels/signals.py) and from one pass over the characters. Shares are of the
document's characters unless the name says otherwise. A share of nothing is 0, so that an empty document has no feature that is not a
number. Top and duplicate n-grams are counted after stop words are taken out.
"""

import re
import unicodedata
from copy import copy
from dataclasses import replace
from functools import cache

import numpy as np

from modelwright.curate.kernels.bm25 import STOP
from modelwright.curate.kernels.signals import Page, ngram_shares, share, without_ngrams
from modelwright.curate.kernels.words import words

_URL = re.compile(r"(?:https?://|www\.)\S+")
_RESIDUE = re.compile(r"&nbsp(?!;)|(?<!&)nbsp;")  # what a decoder of entities leaves behind
_LAST = 0x323B0  # no letter, digit or mark of punctuation stands behind this code point
_EMOJI = ((0x2600, 0x27BF), (0x1F000, 0x1FAFF))
SIGNALS = (
    "characters", "words", "mean_word_length", "longest_word", "hashes_per_word", "ellipses_per_word", "words_with_a_letter",
    "stop_word_share", "replacement_share", "lines", "bullet_lines", "ellipsis_lines", "lines_ending_well", "short_lines",
    "duplicate_lines", "sentences", "mean_sentence_length", "entropy", "longest_run_of_spaces",
)  # fmt: skip


@cache
def _classes() -> np.ndarray:
    """Of each code point: 1 letter, 2 digit, 3 space, 4 punctuation, else 0."""
    kind = {"L": 1, "N": 2, "Z": 3, "P": 4}
    found = np.array([kind.get(unicodedata.category(chr(c))[0], 0) for c in range(_LAST + 1)], np.uint8)
    found[[9, 10, 11, 12, 13]] = 3
    return found


def features(texts: list[str]) -> dict[str, np.ndarray]:
    """All features of a batch, each (docs,); a document has the same features in every batch."""
    page = Page(texts)
    known = without_ngrams(page)
    return {name: known[name] for name in SIGNALS} | _characters(texts) | _words(page, known) | _ngrams(page)


def _characters(texts: list[str]) -> dict[str, np.ndarray]:
    size = np.array([len(t) for t in texts], np.int64)
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), "<u4").astype(np.int64)
    doc = np.repeat(np.arange(len(texts)), size)
    kind = _classes()[np.minimum(codes, _LAST)]

    def part(chosen: np.ndarray) -> np.ndarray:
        return share(np.bincount(doc[chosen], minlength=len(texts)).astype(np.float64), size)

    mean = share(np.bincount(doc, codes, len(texts)), size)
    spread = share(np.bincount(doc, (codes - mean[doc]) ** 2, len(texts)), size)
    emoji = np.zeros(len(codes), bool)
    for first, last in _EMOJI:
        emoji |= (codes >= first) & (codes <= last)
    return {
        "letters": part(kind == 1),
        "digits": part(kind == 2),
        "spaces": part(kind == 3),
        "punctuation": part(kind == 4),
        "emoji": part(emoji),
        "line_breaks": part(codes == 10),
        "urls": share(np.array([sum(len(m) for m in _URL.findall(t)) for t in texts], np.float64), size),
        "entity_residue": np.array([len(_RESIDUE.findall(t)) for t in texts], np.float64),
        "code_point_deviation": np.sqrt(spread),
    }


def _words(p: Page, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    order = np.lexsort((p.w.hash, p.w.doc))
    h, doc = p.w.hash[order], p.w.doc[order]
    new = np.concatenate([[True], (h[1:] != h[:-1]) | (doc[1:] != doc[:-1])])[: len(h)]
    return {
        "unique_words": share(p.per(doc[new]), known["words"]),
        "words_per_line": share(known["words"], known["lines"]),
        "letter_words": share(known["characters_in_letter_words"], p.characters),
    }


def _ngrams(p: Page) -> dict[str, np.ndarray]:
    keep = ~np.isin(p.w.hash, words([STOP]).hash)
    bare = copy(p)
    bare.w = replace(p.w, start=p.w.start[keep], end=p.w.end[keep], doc=p.w.doc[keep], hash=p.w.hash[keep])
    bare.word_size = p.word_size[keep]
    found = ngram_shares(bare)
    return {name: found[f"characters_in_{name}"] for name in ("top_2_gram", "top_4_gram", "duplicate_10_grams")}
