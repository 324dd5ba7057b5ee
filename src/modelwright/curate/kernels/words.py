"""The words of a batch of documents and their 64-bit hashes, found in the bytes without a Python loop over words.

A word is a run of letters, digits, marks and underscores, lower-cased. Characters of scripts without spaces (Han, kana, Thai, Lao,
Khmer, Burmese) are words by themselves, so that word n-grams are character n-grams there.

How: comparisons of bytes, and a table for the characters beyond ASCII, say what belongs to a word; the edges of the runs are the
words. A word's bytes are read eight at a time at its start and mixed; the mixing is one to one for words of up to eight bytes.
Every document has the same words and hashes whatever stands beside it in the batch. A capital whose small letter is longer or
shorter in UTF-8 stays as it is (25 letters, such as the Kelvin sign).
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np

_PAD = bytes(8)
_LONG = 256  # bytes; the few longer words are hashed one by one
_M1, _M2, _M3 = (np.uint64(m) for m in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
_MASK = np.array([(1 << 8 * k) - 1 for k in range(9)], np.uint64)
_LAST = 0x323B0  # no letter stands behind this code point
_SPACELESS = (  # first and last code point
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Words of `docs` documents in order: their bytes in `data` from start to end, the document and the hash of each."""

    data: np.ndarray  # (bytes,) uint8, lower-cased UTF-8
    start: np.ndarray  # (w,) int64
    end: np.ndarray  # (w,) int64
    doc: np.ndarray  # (w,) int32
    hash: np.ndarray  # (w,) uint64
    docs: int
    raw: np.ndarray  # (bytes,) uint8, as they were
    place: np.ndarray  # (docs + 1,) where each document starts in both; a newline stands before the next


def words(texts: list[str]) -> Words:
    """The words of all texts. A lone surrogate counts as a question mark."""
    parts = [t.encode("utf-8", "replace") for t in texts]
    place = np.cumsum([1] + [len(p) + 1 for p in parts])  # where each document starts
    raw = np.frombuffer(b"\n" + b"\n".join(parts) + b"\n" + _PAD, np.uint8)
    inside, data = _ascii(raw)
    cuts = np.empty(0, np.int64)
    if (high := np.flatnonzero(data >= 0xC0)).size:
        cuts = _beyond_ascii(data, inside, high)
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    edges += 1
    start, end = edges[::2], edges[1::2]
    if cuts.size:
        start, end = np.sort(np.concatenate([start, cuts])), np.sort(np.concatenate([end, cuts]))
    doc = np.repeat(np.arange(len(texts), dtype=np.int32), np.diff(np.searchsorted(start, place)))
    return Words(data, start, end, doc, hash_spans(data, start, end), len(texts), raw, place)


def _ascii(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What belongs to a word, every byte beyond ASCII included; and the bytes with A to Z lower-cased."""
    upper = (data - np.uint8(65)) < 26
    data = data | (upper.view(np.uint8) << np.uint8(5))
    inside = (data - np.uint8(97)) < 26
    inside |= (data - np.uint8(48)) < 10
    inside |= data == 95
    inside |= data >= 128
    return inside, data


def _beyond_ascii(data: np.ndarray, inside: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Mend `inside` and `data` in place for the characters that start at `at`; where a word ends inside a run, (c,)."""
    kind, lower = kinds()
    size = 2 + (data[at] >= 0xE0).astype(np.int64) + (data[at] >= 0xF0)
    codes = data[at].astype(np.int64) & (0x7F >> size)
    for k in range(1, 4):
        more = size > k
        codes[more] = codes[more] << 6 | data[at[more] + k] & 0x3F
    codes = np.minimum(codes, _LAST)
    what, small = kind[codes], lower[codes]
    for k in range(4):
        inside[at[(what == 0) & (size > k)] + k] = False
    for k in range(4):  # the bytes of the lower-case letter, last byte first
        move = (small != codes) & (size > k)
        byte = small[move] >> 6 * k & 0x3F | 0x80
        lead = size[move] == k + 1
        byte[lead] = small[move][lead] >> 6 * k | (0xF00 >> size[move][lead]) & 0xFF
        data[at[move] + size[move] - 1 - k] = byte
    alone = what == 2
    cuts = np.unique(np.concatenate([at[alone], at[alone] + size[alone]]))
    return cuts[inside[cuts] & inside[cuts - 1]]


@cache
def kinds() -> tuple[np.ndarray, np.ndarray]:
    """Of each code point: 0 outside words, 1 in words, 2 a word by itself; and its lower case, where that is as long in UTF-8."""
    kind, lower = np.zeros(_LAST + 1, np.uint8), np.arange(_LAST + 1)
    for c in map(chr, range(128, _LAST)):
        kind[ord(c)] = c.isalnum() or (c >= "\u0300" and unicodedata.category(c)[0] == "M")
        small = c.lower()
        if small != c and len(small) == 1 and len(small.encode()) == len(c.encode()):
            lower[ord(c)] = ord(small)
    for first, last in _SPACELESS:
        kind[first : last + 1] *= 2
    return kind, lower


def _mix(h: np.ndarray) -> None:
    """In place and one to one."""
    h *= _M1
    h ^= h >> np.uint64(32)
    h *= _M2
    h ^= h >> np.uint64(29)


def hash_spans(data: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """One hash per span of bytes; equal bytes, equal hash. The last eight bytes of `data` are no part of a span."""
    eight = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))  # the eight bytes from each place on
    length = end - start
    h = eight[start]
    h &= _MASK[np.minimum(length, 8)]
    _mix(h)
    more, done = np.flatnonzero(length > 8), 8
    while len(more) and done < _LONG:
        rest = eight[start[more] + done] & _MASK[np.minimum(length[more] - done, 8)]
        rest += h[more] * _M3
        _mix(rest)
        h[more] = rest
        done += 8
        more = more[length[more] > done]
    for i in more:
        h[i] = int.from_bytes(hashlib.blake2b(data[start[i] : end[i]].tobytes(), digest_size=8).digest(), "little")
    return h


def ngrams(w: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (g,) uint64 of all runs of n words within a document, and the document of each."""
    if len(w.hash) < n:
        return np.empty(0, np.uint64), np.empty(0, np.int32)
    size = len(w.hash) - n + 1
    h = w.hash[n - 1 :].copy()
    for k in range(n - 2, -1, -1):  # Horner; word k counts by a power of an odd number
        h *= _M3
        h += w.hash[k : k + size]
    inside = w.doc[:size] == w.doc[n - 1 :]
    return h[inside], w.doc[:size][inside]
