"""Lists of domains and of words, and personal data: what is matched, and how the usual mistakes are avoided.

Domains are matched from the whole host to the registrable domain, never the public suffix, so that `bad.com` is not found in
`notbad.com` and `co.uk` condemns nobody. Words are found in one pass by Aho-Corasick over the lower-cased text.
"""

import ipaddress
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from modelwright.core.errors import UserError

CLASSES = ("white", "black", "silver", "gray")  # in the order of precedence
LEVELS = {"L1": 100.0, "L2": 10.0, "L3": 1.0, "L4": 0.1}
# Public suffixes of two labels that many sites stand under; others are taken to be one label. The extra `web` has the whole list.
_SECOND = {"co", "com", "org", "net", "gov", "edu", "ac", "or", "ne", "go", "gob", "ltd", "plc", "mil", "nom", "sch"}


def suffix_length(labels: list[str]) -> int:
    """How many labels at the end of a host are its public suffix."""
    return 2 if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _SECOND else 1


def _suffixes() -> Any:
    """The whole list of public suffixes from its shipped snapshot, or the rule above where tldextract is absent."""
    try:
        import tldextract
    except ImportError:
        return suffix_length
    extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    return lambda labels: max(len(extract(".".join(labels)).suffix.split(".")), 1)


class Domains:
    """Hosts by class. `of(url)` is the class of the most specific entry; at one host white goes before black, silver, gray."""

    def __init__(self, entries: Iterable[tuple[str, str]]):
        self.known: dict[str, str] = {}
        for host, kind in entries:
            if kind not in CLASSES:
                raise UserError(f"the class '{kind}' of {host} is not known", f"known are {', '.join(CLASSES)}")
            host = host.strip().lower().rstrip(".")
            old = self.known.get(host)
            if old is None or CLASSES.index(kind) < CLASSES.index(old):
                self.known[host] = kind
        self.suffix = _suffixes()

    def of(self, url: str) -> tuple[str, str]:
        """Class and entry that decide, or two empty strings."""
        try:
            host = (urlsplit(url if "//" in url else "//" + url).hostname or "").rstrip(".").lower()
        except ValueError:
            return "", ""
        if _address(host):
            return (self.known[host], host) if host in self.known else ("", "")
        labels = host.split(".")
        for i in range(max(len(labels) - self.suffix(labels), 0)):
            name = ".".join(labels[i:])
            if name in self.known:
                return self.known[name], name
        return "", ""


def _address(host: str) -> Any:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass(frozen=True)
class Entry:
    """One entry of a word list: its parts (a compound hits only when all occur) and its level."""

    parts: tuple[str, ...]
    level: str


class WordList:
    """Finds all entries in one pass. `score(text)` adds up the levels' points: 100, 10, 1 and 0.1 for L1 to L4."""

    def __init__(self, entries: Iterable[tuple[str, str]]):
        self.entries, self.ignored = [], 0
        for word, level in entries:
            if level not in LEVELS:
                raise UserError(f"the level '{level}' of an entry is not known", f"known are {', '.join(LEVELS)}")
            parts = tuple(p.strip().lower() for p in word.split("&&&") if p.strip())
            if not parts or (len(parts) == 1 and _short(parts[0])):
                self.ignored += 1  # a short English word is in too many others
                continue
            self.entries.append(Entry(parts, level))
        self._build()

    def _build(self) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.fail, self.ends = [0], [[]]  # type: ignore[var-annotated]
        for part in {p for e in self.entries for p in e.parts}:
            at = 0
            for c in part:
                if c not in self.next[at]:
                    self.next[at][c] = len(self.next)
                    self.next.append({})
                    self.fail.append(0)
                    self.ends.append([])
                at = self.next[at][c]
            self.ends[at].append(part)
        queue = deque(self.next[0].values())
        while queue:
            at = queue.popleft()
            for c, to in self.next[at].items():
                back = self.fail[at]
                while back and c not in self.next[back]:
                    back = self.fail[back]
                self.fail[to] = self.next[back].get(c, 0) if self.next[back].get(c, 0) != to else 0
                self.ends[to] = self.ends[to] + self.ends[self.fail[to]]
                queue.append(to)

    def count(self, text: str) -> dict[str, int]:
        """How often each part occurs; an English one only where no letter touches it."""
        low, at, found = text.lower(), 0, {}  # type: ignore[var-annotated]
        for i, c in enumerate(low):
            while at and c not in self.next[at]:
                at = self.fail[at]
            at = self.next[at].get(c, 0)
            for part in self.ends[at]:
                before, after = low[i - len(part) : i - len(part) + 1] if i >= len(part) else "", low[i + 1 : i + 2]
                if not _english(part) or not (before.isalpha() or after.isalpha()):
                    found[part] = found.get(part, 0) + 1
        return found

    def score(self, text: str) -> tuple[float, list[str]]:
        """Points of the text, and the levels that were hit; each occurrence of a part counts 1 / parts."""
        found, points, levels = self.count(text), 0.0, set()
        for e in self.entries:
            if all(p in found for p in e.parts):
                points += LEVELS[e.level] * sum(found[p] for p in e.parts) / len(e.parts)
                levels.add(e.level)
        return points, sorted(levels)


def _english(word: str) -> bool:
    return word.isascii() and any(c.isalpha() for c in word)


def _short(word: str) -> bool:
    return word.isascii() and word.isalpha() and len(word) <= 4


_MAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[a-z\d-]{1,63}\.){1,8}[a-z]{2,24}\b", re.I)
_IP4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)")
_IP6 = re.compile(r"(?<![\w:])(?:[\da-f]{1,4}:){2,7}:?(?:[\da-f]{1,4}:?){0,6}[\da-f]{0,4}(?![\w:])", re.I)
_PHONE = re.compile(r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?)(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}(?![\w/-]|\.\d)")
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}(?: ?[A-Z\d]{1,3})?\b")


def luhn(number: str) -> bool:
    """The check digit of card numbers."""
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return len(digits) > 12 and sum(d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(digits)) % 10 == 0


def iban(number: str) -> bool:
    """The check digits of bank accounts: 1 modulo 97."""
    text = number.replace(" ", "")
    return len(text) >= 15 and int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def _global(text: str) -> bool:
    address = _address(text)
    return address is not None and address.is_global


_KINDS = (  # in this order
    ("EMAIL", _MAIL, lambda t: True),
    ("IBAN", _IBAN, iban),
    ("CARD", _CARD, luhn),
    ("IP", _IP4, _global),
    ("IP", _IP6, _global),
    ("PHONE", _PHONE, lambda t: 8 <= sum(c.isdigit() for c in t) <= 15),
)


def mask(text: str) -> tuple[str, dict[str, int]]:
    """The text with e-mail addresses, bank accounts, cards, global IP addresses and phone numbers as <KIND>, and how many.

    What only looks like one stays: numbers whose check digits are wrong, private addresses, versions such as 1.2.3.4.5. The number of
    lines does not change, and masking twice changes nothing more.
    """
    counts: dict[str, int] = {}
    before = ""
    while text != before:  # what was masked may part what stands beside it
        before = text
        for kind, pattern, right in _KINDS:

            def put(m: re.Match, kind: str = kind, right: Any = right) -> str:
                if not right(m[0]):
                    return m[0]
                counts[kind] = counts.get(kind, 0) + 1
                return f"<{kind}>"

            text = pattern.sub(put, text)
    return text, counts
