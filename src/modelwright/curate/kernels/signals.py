"""Signals of documents for rules: numbers counted for a whole batch from one tokenisation. A share of nothing is 0.

A word is a run of letters, digits, marks and underscores (kernels/words.py); a line is what stands between line breaks, without
spaces around it, and lines without anything else do not count. Lengths are in characters, shares between 0 and 1.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from modelwright.curate.kernels.words import hash_spans, words

STOP = ("the", "be", "to", "of", "and", "that", "have", "with")
POLICY = (b"terms of use", b"privacy policy", b"cookie policy", b"uses cookies", b"use of cookies", b"use cookies")
_M = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Lines:
    """Lines that are not empty, in order, cut to what is not space."""

    start: np.ndarray  # (l,) bytes
    end: np.ndarray
    doc: np.ndarray
    size: np.ndarray  # (l,) characters
    words: np.ndarray  # (l,) words in it
    ends_well: np.ndarray  # (l,) bool: . ? ! " ' but no ellipsis
    opens: np.ndarray  # (l,) bool: the line before it is empty, or there is none


class Page:
    """A batch of documents with what several signals share."""

    def __init__(self, texts: list[str]):
        self.w = words(texts)
        self.docs = len(texts)
        self.characters = np.array([len(t) for t in texts], np.float64)
        lead = (self.w.raw & 0xC0) != 0x80  # first byte of a character
        self.count = np.concatenate([[0], np.cumsum(lead, dtype=np.int32)])
        self.word_size = self.count[self.w.end] - self.count[self.w.start]
        self.lines = self._lines()

    def per(self, doc: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Sums of weights (or how many) for each document."""
        return np.bincount(doc, weights, self.docs).astype(np.float64)

    def _lines(self) -> Lines:
        raw, place = self.w.raw, self.w.place
        breaks = np.flatnonzero(raw[: place[-1]] == 10)
        solid = np.flatnonzero(raw > 32)
        first, last = np.searchsorted(solid, breaks[:-1]), np.searchsorted(solid, breaks[1:]) - 1
        full = last >= first
        start, end = solid[first[full]], solid[last[full]] + 1
        doc = np.searchsorted(place, start, side="right") - 1
        count = np.searchsorted(self.w.start, end) - np.searchsorted(self.w.start, start)
        final, dots = raw[end - 1], (raw[end - 1] == 46) & (raw[np.maximum(end - 2, 0)] == 46) & (end - start > 1)
        well = np.isin(final, list(b".?!\"'")) & ~dots
        before = np.concatenate([[True], ~full[:-1]])[full]
        opens = before | np.concatenate([[True], doc[1:] != doc[:-1]])
        return Lines(start, end, doc, self.count[end] - self.count[start], count, well, opens)


def share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(len(b)), where=b > 0)


def most(doc: np.ndarray, value: np.ndarray, docs: int) -> np.ndarray:
    """Largest value of each document, 0 without any; doc does not fall."""
    out = np.zeros(docs)
    first = np.flatnonzero(np.diff(doc, prepend=-1))
    if len(first):
        out[doc[first]] = np.maximum.reduceat(value, first)
    return out


def repeats(doc: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Which items (i,) equal an earlier one of the same document."""
    key = key + doc.astype(np.uint64) * _M
    order = np.argsort(key, kind="stable")
    again = np.zeros(len(key), bool)
    again[order[1:]] = key[order][1:] == key[order][:-1]
    return again


@cache
def stop_hashes() -> np.ndarray:
    return words([" ".join(STOP)]).hash


def _words(p: Page) -> dict[str, np.ndarray]:
    w, raw = p.w, p.w.raw

    def of(places: np.ndarray) -> np.ndarray:
        return p.per(np.asarray(np.searchsorted(w.place, places, side="right")) - 1)

    n = p.per(w.doc)
    letter = ((w.data - np.uint8(97)) < 26) | (w.data >= 128)
    run = np.concatenate([[0], np.cumsum(letter, dtype=np.int32)])
    letters = run[w.end] - run[w.start]
    stops = np.stack([np.bincount(w.doc[w.hash == h], minlength=p.docs) for h in stop_hashes()])
    longest = most(w.doc, p.word_size, p.docs)
    dots = np.flatnonzero((raw[:-2] == 46) & (raw[1:-1] == 46) & (raw[2:] == 46))
    dots = dots[np.diff(dots, prepend=-9) > 1]  # ..... is one
    one = np.flatnonzero((raw[:-2] == 0xE2) & (raw[1:-1] == 0x80) & (raw[2:] == 0xA6))
    whole = letters == w.end - w.start
    spoilt = np.flatnonzero((raw[:-2] == 0xEF) & (raw[1:-1] == 0xBF) & (raw[2:] == 0xBD))
    white = np.flatnonzero((raw[:-2] == 0xE2) & (raw[1:-1] == 0x96) & (raw[2:] == 0xA1))
    return {
        "words": n,
        "mean_word_length": share(p.per(w.doc, p.word_size), n),
        "longest_word": longest,
        "hashes_per_word": share(of(np.flatnonzero(raw == 35)), n),
        "ellipses_per_word": share(of(dots) + of(one), n),
        "words_with_a_letter": share(p.per(w.doc[letters > 0]), n),
        "stop_words": (stops > 0).sum(0).astype(np.float64),
        "stop_word_share": share(stops.sum(0).astype(np.float64), n),
        "characters_in_letter_words": p.per(w.doc[whole], p.word_size[whole]),
        "replacement_share": share(of(spoilt) + of(white), p.characters),
    }


def _line_signals(p: Page) -> dict[str, np.ndarray]:
    ln, raw = p.lines, p.w.raw
    n = p.per(ln.doc)
    bullet = np.isin(raw[ln.start], list(b"*-")) | _starts(raw, ln.start, ("•", "●", "◦", "‣"))
    three = (raw[ln.end - 1] == 46) & (raw[ln.end - 2] == 46) & (raw[np.maximum(ln.end - 3, 0)] == 46) & (ln.end - ln.start > 2)
    sign = (raw[ln.end - 1] == 0xA6) & (raw[ln.end - 2] == 0x80)
    breaks = np.searchsorted(p.w.place, np.flatnonzero(raw[1 : p.w.place[-1] - 1] == 10) + 1, side="right") - 1
    inner = np.bincount(breaks, minlength=p.docs).astype(np.float64)
    inner[:-1] -= 1  # the break between two documents
    key = hash_spans(raw, ln.start, ln.end)
    again = repeats(ln.doc, key)
    para, size, of = _paragraphs(ln, key)
    twice = repeats(of, para)
    return {
        "lines": n,
        "bullet_lines": share(p.per(ln.doc[bullet]), n),
        "ellipsis_lines": share(p.per(ln.doc[three | sign]), n),
        "lines_ending_well": share(p.per(ln.doc[ln.ends_well]), n),
        "short_lines": share(p.per(ln.doc[ln.size <= 30]), n),
        "line_breaks_per_word": share(inner, p.per(p.w.doc)),
        "duplicate_lines": share(p.per(ln.doc[again]), n),
        "characters_in_duplicate_lines": share(p.per(ln.doc[again], ln.size[again]), p.characters),
        "duplicate_paragraphs": share(p.per(of[twice]), p.per(of)),
        "characters_in_duplicate_paragraphs": share(p.per(of[twice], size[twice]), p.characters),
    }


def _starts(raw: np.ndarray, at: np.ndarray, signs: tuple[str, ...]) -> np.ndarray:
    three = raw[at].astype(np.int64) << 16 | raw[at + 1].astype(np.int64) << 8 | raw[at + 2]
    return np.isin(three, [int.from_bytes(s.encode(), "big") for s in signs])


def _paragraphs(ln: Lines, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hash, characters and document of each paragraph: lines up to an empty one."""
    first = np.flatnonzero(ln.opens)
    if not len(first):
        return np.empty(0, np.uint64), np.empty(0), np.empty(0, np.int64)
    place = np.arange(len(key)) - np.repeat(first, np.diff(np.append(first, len(key))))
    power = np.multiply.accumulate(np.full(int(place.max()) + 1, _M | np.uint64(1)))
    return np.add.reduceat(key * power[place], first), np.add.reduceat(ln.size, first), ln.doc[first]


def ngram_shares(p: Page) -> dict[str, np.ndarray]:
    """Shares of characters in the most frequent 2-, 3- and 4-gram, and in 5- to 10-grams that came before.

    An n-gram that occurs twice is made of n-1-grams that do, so that each length looks only at what the one before left.
    """
    w, out = p.w, {}
    total = len(w.hash)
    key = w.hash + w.doc.astype(np.uint64) * _M
    at, powers = np.arange(total), np.multiply.accumulate(np.full(10, _M))
    reach = np.concatenate([[0], np.cumsum(p.word_size)])
    alive = np.ones(total + 1, bool)
    for n in range(2, 11):
        at = at[at + n <= total]
        at = at[alive[at] & alive[at + 1] & (w.doc[at] == w.doc[at + n - 1])]
        key[at] += w.hash[at + n - 1] * powers[n - 2]
        k = key[at]
        order = np.argsort(k)
        k = k[order]
        begins = np.flatnonzero(np.concatenate([[True], k[1:] != k[:-1]])[: len(k)])
        count = np.diff(np.append(begins, len(k)))
        new = np.zeros(len(k), bool)
        if len(k):
            new[np.minimum.reduceat(order, begins)] = True  # the first of each
        count = np.repeat(count, count)
        often = order[count > 1]
        if n <= 4:
            size = reach[at[often] + n] - reach[at[often]] + n - 1
            out[f"characters_in_top_{n}_gram"] = _top(p, w.doc[at[often]], count[count > 1], size)
        else:
            cover = np.zeros(total + 1, np.int8)  # at most n, which is 10
            again = at[~new]
            cover[again] += 1
            cover[again + n] -= 1
            inside = np.cumsum(cover[:-1], dtype=np.int8) > 0
            out[f"characters_in_duplicate_{n}_grams"] = share(p.per(w.doc[inside], p.word_size[inside]), p.characters)
        alive[:] = False
        at = np.sort(at[often])
        alive[at] = True
    return out


def _top(p: Page, doc: np.ndarray, count: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Characters of the most frequent n-gram, of several the longest, over all characters."""
    best = np.zeros(p.docs, np.int64)
    np.maximum.at(best, doc, count)
    found = np.zeros(p.docs)
    top = count == best[doc]
    np.maximum.at(found, doc[top], (count * size)[top])
    return share(found, p.characters)


def _sentences(p: Page, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Sentences end at . ? ! before a space or a line break; c4's are counted in the lines that it keeps."""
    raw, ln = p.w.raw, p.lines
    stop = np.flatnonzero(((raw[:-1] == 46) | (raw[:-1] == 63) | (raw[:-1] == 33)) & (raw[1:] <= 32))
    line = np.searchsorted(ln.start, stop, side="right") - 1
    mine = (line >= 0) & (stop < ln.end[line]) if len(ln.start) else np.zeros(len(stop), bool)
    n = p.per(ln.doc[line[mine]])
    return {
        "sentences": n,
        "mean_sentence_length": share(p.per(p.w.doc), n),
        "c4_sentences": p.per(ln.doc[line[mine & kept[line]]]) if len(ln.start) else n,
    }


def _found(data: bytes, phrase: bytes) -> list[int]:
    places, at = [], data.find(phrase)
    while at >= 0:
        places.append(at)
        at = data.find(phrase, at + 1)
    return places


def good_lines(p: Page) -> np.ndarray:
    """C4: lines that end well, have three words or more, no word above 1,000 characters, no javascript and no policy phrase."""
    ln, data = p.lines, p.w.data.tobytes()
    bad = np.zeros(len(ln.start), bool)
    for phrase in (b"javascript", *POLICY):
        places = np.array(_found(data, phrase), np.int64)
        line = np.searchsorted(ln.start, places, side="right") - 1
        bad[line[(line >= 0)]] = True
    long = p.w.start[p.word_size > 1000]
    bad[np.searchsorted(ln.start, long, side="right") - 1] = True
    return ln.ends_well & (ln.words >= 3) & ~bad


def _shape(p: Page) -> dict[str, np.ndarray]:
    """Entropy of the bytes, the longest run of spaces, and what stands in templates."""
    raw, place, data = p.w.raw, p.w.place, p.w.data.tobytes()
    entropy = np.zeros(p.docs)
    for i, (a, b) in enumerate(zip(place[:-1], place[1:] - 1, strict=True)):
        c = np.bincount(raw[a:b], minlength=256)
        c = c[c > 0] / max(b - a, 1)
        entropy[i] = -(c * np.log2(c)).sum() if len(c) else 0.0
    is_space = np.concatenate([[False], raw == 32, [False]])
    edge = np.flatnonzero(is_space[1:] != is_space[:-1])
    spaces = most(np.searchsorted(place, edge[::2], side="right") - 1, edge[1::2] - edge[::2], p.docs)
    of = lambda found: p.per(np.searchsorted(place, np.array(found, np.int64), side="right") - 1)  # noqa: E731
    return {
        "characters": p.characters,
        "entropy": entropy,
        "longest_run_of_spaces": spaces,
        "lorem_ipsum": of(_found(data, b"lorem ipsum")),
        "curly_brackets": of(np.flatnonzero(raw == 123)),
    }


def signals(p: Page) -> dict[str, np.ndarray]:
    """All signals, each (docs,)."""
    return without_ngrams(p) | ngram_shares(p)


def without_ngrams(p: Page) -> dict[str, np.ndarray]:
    """All signals but those of n-grams, which take most of the time."""
    return _shape(p) | _words(p) | _line_signals(p) | _sentences(p, good_lines(p))
